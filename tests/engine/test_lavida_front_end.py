"""LaViDa prompts through vLLM's front end, as `vllm serve FOLDER` without a flag builds it: ids, spans and tiles as
recorded from the official code. No engine runs, and the folders hold no weights."""

import functools
import json

import pytest
from transformers import AutoTokenizer
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.renderers import ChatParams
from vllm.renderers.registry import renderer_from_config

from tests.golden import lavida_cases as cases
from vllm_dvlm.checkpoint.configuration import TokenIds, resolve_token_ids
from vllm_dvlm.checkpoint.dream_tokenizer import DreamTokenizer
from vllm_dvlm.checkpoint.renderer import TOKENIZER_MODE
from vllm_dvlm.families.lavida import LAVIDA_DREAM, LAVIDA_LLADA
from vllm_dvlm.synthetic import checkpoint_files
from vllm_dvlm.synthetic import lavida_files as files
from vllm_dvlm.synthetic.lavida_files import DREAM, KINDS, LLADA

USABLE = [case for case in cases.all_cases() if not case.records_defect]
# The first id that the tokenizer does not have.
IMAGE_TOKEN = {LLADA: LLADA.num_tokens, DREAM: DREAM.num_tokens}
REFERENCE_PLACEHOLDER = -200


@pytest.fixture(scope="module")
def front_end(tmp_path_factory):
    """``front_end(kind, **overrides)``: the renderer of a checkpoint with these keys of config.json changed."""
    folders, made = {}, []

    @functools.cache
    def build(kind, overrides):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind.name)
            files.write_configs(folders[kind], kind)
        made.append(renderer_of(folders[kind], hf_overrides=dict(overrides)))
        return made[-1]

    yield lambda kind, **overrides: build(kind, tuple(overrides.items()))
    for renderer in made:
        renderer.shutdown()


def renderer_of(folder, **flags):
    return renderer_from_config(EngineArgs(model=str(folder), **flags).create_engine_config())


def prompt_of(case):
    images = {} if case.image_record is None else {"multi_modal_data": {"image": cases.image(case)}}
    return {"prompt": case.prompt_text, **images}


def expanded(case):
    """Ids of the merged prompt, one per visual token."""
    visual = [IMAGE_TOKEN[case.kind]] * (case.image_record or {}).get("visual_tokens", 0)
    return [i for token in case.prompt_ids for i in (visual if token == REFERENCE_PLACEHOLDER else [token])]


def assert_recorded(result, case):
    assert result["prompt_token_ids"] == expanded(case) and len(expanded(case)) == case.prompt_len
    record = case.image_record
    if record is None:
        return
    (place,) = result["mm_placeholders"]["image"]
    assert (place.offset, place.offset + place.length) == case.visual_spans[0] and place.is_embed is None
    (item,) = result["mm_kwargs"]["image"]
    tiles = item.get_data()["pixel_values"].double()
    assert len(tiles) == record["views"] and item.get_data()["image_sizes"].tolist() == record["size"]
    for name, values in (("sum", tiles), ("abs_sum", tiles.abs()), ("sq_sum", tiles**2)):
        assert values.sum().item() == pytest.approx(record["pixel_values"][name], rel=1e-9)


@pytest.mark.parametrize("case", USABLE, ids=lambda case: case.name)
def test_recorded_text(case, front_end):
    renderer = front_end(case.kind, **case.config_overrides)
    assert_recorded(renderer.render_cmpl([prompt_of(case)])[0], case)


@pytest.mark.parametrize("case", USABLE, ids=lambda case: case.name)
def test_recorded_chat(case, front_end):
    """The place of the image left to the template, or written in the text; a question without one as plain text."""
    renderer, question = front_end(case.kind, **case.config_overrides), case.raw["question"]
    contents = [question, [{"type": "text", "text": question}]]
    if case.image_record is not None:
        image = {"type": "image_pil", "image_pil": cases.image(case)}
        contents = [[image, {"type": "text", "text": text}] for text in (question, f"<image>\n{question}")]
    for content in contents:
        (prompt,) = renderer.render_chat([[{"role": "user", "content": content}]], ChatParams())[1]
        assert prompt["prompt"] == case.prompt_text
        assert_recorded(prompt, case)


def test_all_usable_cases_are_covered():
    assert len(USABLE) == 31 and {case.kind for case in USABLE} == {LLADA, DREAM}


@pytest.mark.parametrize(("kind", "family"), [(LLADA, LAVIDA_LLADA), (DREAM, LAVIDA_DREAM)])
def test_no_flag_is_needed(kind, family, front_end):
    renderer = front_end(kind)
    model_config = renderer.model_config
    assert model_config.hf_config.family is family and not model_config.trust_remote_code
    assert model_config.tokenizer_mode == TOKENIZER_MODE and model_config.is_multimodal_model
    assert model_config.max_model_len == 4096
    assert family.name in renderer.templates[False].origin
    # Nothing is forbidden; an answer ends with the end of a turn.
    assert resolve_token_ids(model_config.hf_config, renderer.get_tokenizer()) == TokenIds(
        mask_token_id=kind.mask,
        bos_token_id=kind.bos,
        eos_token_id=kind.eos,
        end_of_turn_token_id={LLADA: 126348, DREAM: 151645}[kind],
        forbidden_token_ids=(),
        num_tokens=kind.num_tokens,
    )


def test_the_token_after_an_image(front_end):
    """LLaDA's text begins with BOS, so the token after a cut is lost, whatever it is; with Dream nothing is."""
    image = cases.image(cases.load("img_full"))
    for kind, after in ((LLADA, "ell"), (DREAM, "Tell")):
        renderer = front_end(kind)
        begin = cases.load({LLADA: "text_full", DREAM: "dream_text_full_maskgit"}[kind]).prompt_text[:40]
        request = {"prompt": f"{begin}<image>Tell", "multi_modal_data": {"image": image}}
        ids = renderer.render_cmpl([request])[0]["prompt_token_ids"]
        assert bytes(ids[len(ids) - ids[::-1].index(IMAGE_TOKEN[kind]) :]).decode() == after


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_request_chooses_its_mode_of_images(kind, front_end):
    request = {"prompt": "<image>", "multi_modal_data": {"image": cases.image(cases.load("img_full"))}}
    one_view = {**request, "mm_processor_kwargs": {"image_aspect_ratio": "pad"}}
    lengths = [front_end(kind).render_cmpl([r])[0]["mm_placeholders"]["image"][0].length for r in (request, one_view)]
    assert lengths == [1008, 197]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_largest_image(kind, front_end):
    """Budgets are sized by 5 views of 14 x 14 tokens and 28 newline tokens."""
    info = front_end(kind).mm_processor.info
    assert info.get_mm_max_tokens_per_item(16384, {"image": 1})["image"] == 5 * 196 + 28
    dummy = front_end(kind).mm_processor.get_dummy_mm_inputs({"image": 1})["mm_kwargs"]["image"][0].get_data()
    assert len(dummy["pixel_values"]) == 5


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_misplaced_images_are_refused(kind, front_end):
    for messages in (
        [{"role": "user", "content": "What is <image>?"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [1]}],
    ):
        with pytest.raises(VLLMValidationError):
            front_end(kind).render_chat([messages], ChatParams())


def dream_files(folder):
    """Tokenizer files as Dream releases them: a vocabulary and merges, and a class that comes as code beside them."""
    files.write_configs(folder, DREAM)
    (folder / "tokenizer.json").unlink()
    special = DREAM.special_texts()
    vocab = {char: byte for byte, char in checkpoint_files.byte_chars().items()}
    vocab |= {f"<filler_{i}>": i for i in range(256, DREAM.first_special)}
    checkpoint_files.write_json(folder / "vocab.json", vocab)
    checkpoint_files.write_json(folder / "added_tokens.json", {text: i for i, text in special.items()})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    shape = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    change_json(
        folder / "tokenizer_config.json",
        tokenizer_class="DreamTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        added_tokens_decoder={str(i): {"content": text, **shape} for i, text in special.items()},
    )


def change_json(path, **values):
    checkpoint_files.write_json(path, json.loads(path.read_text()) | values)


def with_code(folder):
    """A checkpoint that brings code of its own, as the second published layout of LaViDa does."""
    auto = {"AutoConfig": "modeling_lavida.LlavaLladaConfig", "AutoModelForCausalLM": "modeling_lavida.LlavaLlada"}
    files.write_configs(folder, LLADA)
    change_json(folder / "config.json", auto_map=auto)


@pytest.mark.parametrize(("write", "name"), [(dream_files, "dream_img_full_margin"), (with_code, "img_full")])
def test_code_in_a_checkpoint_is_neither_needed_nor_run(tmp_path, write, name):
    write(tmp_path)
    for file in ("modeling_lavida.py", "tokenization_dream.py"):
        (tmp_path / file).write_text("raise SystemExit('code of the checkpoint ran')\n")
    renderer, case = renderer_of(tmp_path), cases.load(name)
    assert_recorded(renderer.render_cmpl([prompt_of(case)])[0], case)
    renderer.shutdown()


def test_dreams_tokenizer_from_its_own_files(tmp_path, front_end):
    dream_files(tmp_path)
    renderer = front_end(DREAM)  # registers
    made = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(made, DreamTokenizer)
    for text in (
        "<|im_start|>user\nIt's 12 € !<|im_end|>\n<|mask|>",
        "e\u0301 \n\n  x",
        "<|beginoftext|><|endoftext|>",
    ):
        ids = made(text, add_special_tokens=False)["input_ids"]
        if "\u0301" not in text:  # the tiny tokenizer does not normalise
            assert ids == renderer.get_tokenizer()(text, add_special_tokens=False)["input_ids"]
        assert made.decode(ids) == text.replace("e\u0301", "\u00e9")
