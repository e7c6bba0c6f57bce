"""From text and images to prompt ids, spans, tiles and visual tokens, through vLLM's front end.

No engine runs: a stand-in model class carries the processor, so that neither the text backbone nor
the scheduler can spoil these tests.
"""

import asyncio
import copy
import json
import math
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import MultiModalProcessorOnlyCache, engine_receiver_cache_from_config
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.renderers import ChatParams
from vllm.renderers.registry import renderer_from_config

from tests import tiny_checkpoint
from vllm_dvlm.bench import checkpoint_files as files
from vllm_dvlm.models import processing, renderer
from vllm_dvlm.models.configuration import LlavaLLaDAConfig
from vllm_dvlm.models.vision import VisionStack, build_projector

GOLDEN = Path(__file__).parents[1] / "golden" / "llada_v"
WITH_IMAGES = [
    "b1_image_steps_eq_gen",
    "b2_image_square",
    "b3_image_grid2x1",
    "b4_image_after_text",
]
WITH_IMAGES += ["b5_same_as_g1", "i1_two_images_anyres", "i2_two_images_pad", "i3_one_image_pad"]
WITH_IMAGES += ["l1_big_image_downsampled"]
TEXT_ONLY = ["a1_text_single_block", "a2_text_blocks_k2"]
PREPROCESSING = sorted(path.stem for path in GOLDEN.glob("p*.json"))
REFERENCE_PLACEHOLDER = -200
ARCHITECTURE = "DvlmProcessingStandIn"


@MULTIMODAL_REGISTRY.register_processor(
    processing.LLaDAVMultiModalProcessor,
    info=processing.LLaDAVProcessingInfo,
    dummy_inputs=processing.LLaDAVDummyInputsBuilder,
)
class StandIn(torch.nn.Module, SupportsMultiModal):
    """Just enough for vLLM to take it for a multimodal text generator."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()

    @classmethod
    def get_placeholder_str(cls, modality, i):
        return renderer.IMAGE_PLACEHOLDER

    def embed_input_ids(self, input_ids): ...

    def embed_multimodal(self, **kwargs): ...

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None): ...

    def compute_logits(self, hidden_states): ...


def engine_config(folder, **kwargs):
    overrides = {"architectures": [ARCHITECTURE], **kwargs.pop("hf_overrides", {})}
    args = EngineArgs(model=str(folder), dtype="float32", hf_overrides=overrides, **kwargs)
    config = args.create_engine_config()
    renderer.configure_model(config.model_config)
    return config


@pytest.fixture(scope="module", autouse=True)
def registered():
    AutoConfig.register("llava_llada", LlavaLLaDAConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, StandIn)
    renderer.register_renderer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint.build(folder)
    return folder


@pytest.fixture(scope="module")
def config(checkpoint):
    return engine_config(checkpoint)


@pytest.fixture(scope="module")
def front_end(config):
    made = renderer_from_config(config)
    yield made
    made.shutdown()


@pytest.fixture
def fresh(front_end):
    front_end.clear_mm_cache()
    return front_end


def load(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def images_of(case):
    return [Image.open(GOLDEN / "images" / image["file"]) for image in case["images"]]


def mm_options(case):
    ratio = case.get("settings", {}).get("image_aspect_ratio")
    return {"mm_processor_kwargs": {"image_aspect_ratio": ratio}} if ratio else {}


def render(front_end, prompt):
    return front_end.render_cmpl([prompt])[0]


def expanded(case, image_token_id):
    images = iter(case["images"])
    for token in case["prompt_ids"]:
        if token == REFERENCE_PLACEHOLDER:
            yield from [image_token_id] * next(images)["visual_tokens"]
        else:
            yield token


def same_as(case, result):
    image_token_id = 126349
    assert result["prompt_token_ids"] == list(expanded(case, image_token_id))
    assert len(result["prompt_token_ids"]) == case["prompt_len"]
    spans = [[p.offset, p.offset + p.length] for p in result["mm_placeholders"]["image"]]
    assert spans == [image["span"] for image in case["images"]]
    assert all(p.is_embed is None for p in result["mm_placeholders"]["image"])
    for item, image in zip(result["mm_kwargs"]["image"], case["images"], strict=True):
        fields = item.get_data()
        assert fields["image_sizes"].tolist() == image["size_wh"]
        assert fields["num_tiles"].item() == image["tiles"] == len(fields["pixel_values"])
        total = fields["pixel_values"].double().sum().item()
        assert total == pytest.approx(image["pixel_stats"]["sum"], rel=1e-9)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_ids_spans_and_tiles(fresh, name):
    case = load(name)
    prompt = {"prompt": case["prompt_text"], "multi_modal_data": {"image": images_of(case)}}
    same_as(case, render(fresh, {**prompt, **mm_options(case)}))


def test_pieces_of_any_tokenizer():
    """1 is BOS, 9 the placeholder; letters are their code points."""
    plain = lambda text: [1 if c == "^" else ord(c) for c in text]  # noqa: E731
    a, b, c = (ord(letter) for letter in "abc")
    pieces = renderer.tokenize_pieces
    assert pieces("^a<image>bc<image>", plain, 1, 9) == [1, a, 9, c, 9]
    assert pieces("^a<image><image>bc", plain, 1, 9) == [1, a, 9, 9, c]
    assert pieces("a<image>bc", plain, 1, 9) == [a, 9, b, c]
    assert pieces("<image>bc", plain, 1, 9) == [9, b, c]
    assert pieces("^a<image>bc", plain, None, 9) == [1, a, 9, b, c]
    with_bos = lambda text: [1, *plain(text)]  # noqa: E731
    assert pieces("a<image>bc<image>", with_bos, 1, 9) == [1, a, 9, b, c, 9]


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_ids_of_text(fresh, name):
    case = load(name)
    assert render(fresh, {"prompt": case["prompt_text"]})["prompt_token_ids"] == case["prompt_ids"]


@pytest.mark.parametrize("name", ["i1_two_images_anyres", "i3_one_image_pad"])
def test_async_path_and_token_prompts(fresh, name):
    case = load(name)
    extra = {"multi_modal_data": {"image": images_of(case)}, **mm_options(case)}
    ids = [126349 if i == REFERENCE_PLACEHOLDER else i for i in case["prompt_ids"]]
    for prompt in ({"prompt": case["prompt_text"]}, {"prompt_token_ids": ids}):
        same_as(case, asyncio.run(fresh.render_cmpl_async([{**prompt, **extra}]))[0])


def test_cached_images_need_no_work_and_change_nothing(fresh, monkeypatch):
    case = load("i1_two_images_anyres")
    prompt = {"prompt": case["prompt_text"], "multi_modal_data": {"image": images_of(case)}}
    calls, real = [], processing.preprocess
    monkeypatch.setattr(processing, "preprocess", lambda *args: calls.append(0) or real(*args))
    first = render(fresh, dict(prompt))
    assert len(calls) == 2
    again = render(fresh, dict(prompt))
    assert len(calls) == 2, "both were cached"
    same_as(case, again)
    assert again["mm_hashes"] == first["mm_hashes"]
    # One of two cached, and in another order.
    big = Image.open(GOLDEN / "images" / "square_384x384.png")
    mixed = {"image": [images_of(case)[1], big]}
    result = render(fresh, {"prompt": case["prompt_text"], "multi_modal_data": mixed})
    assert len(calls) == 3
    assert [p.length for p in result["mm_placeholders"]["image"]] == [891, 1485]
    # A request's own mode is another entry.
    case = load("i2_two_images_pad")
    prompt = {"prompt": case["prompt_text"], "multi_modal_data": {"image": images_of(case)}}
    same_as(case, render(fresh, {**prompt, **mm_options(case)}))


def test_refused_request_leaves_no_trace(fresh, config):
    """The front end always sends its images and the engine core keeps none, so they cannot differ.

    vLLM's default cache sends None for an image that it has rendered before.
    """
    assert isinstance(fresh.mm_processor_cache, MultiModalProcessorOnlyCache)
    assert engine_receiver_cache_from_config(config) is None
    case = load("b1_image_steps_eq_gen")
    prompt = {"prompt": case["prompt_text"], "multi_modal_data": {"image": images_of(case)}}
    render(fresh, dict(prompt))  # never reaches an engine
    again = render(fresh, dict(prompt))
    assert all(item is not None for item in again["mm_kwargs"]["image"])


def test_without_cache_images_keep_their_identity(checkpoint):
    front_end = renderer_from_config(engine_config(checkpoint, mm_processor_cache_gb=0))
    case = load("b1_image_steps_eq_gen")
    prompt = {"prompt": case["prompt_text"], "multi_modal_data": {"image": images_of(case)}}
    hashes = [render(front_end, dict(prompt))["mm_hashes"]["image"] for _ in range(2)]
    assert hashes[0] == hashes[1] and "renderer" not in hashes[0][0]
    front_end.shutdown()


def chat(front_end, content, **kwargs):
    return front_end.render_chat([[{"role": "user", "content": content}]], ChatParams(**kwargs))[1][0]


def front_end_of(folder, change=lambda folder, settings: None, **tokenizer_settings):
    """A front end whose tokenizer files say something else; `change` may write further files."""
    files.write_configs(folder, tiny_checkpoint.SIZES)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | tokenizer_settings
    settings = {name: value for name, value in settings.items() if value is not None}
    files.write_json(folder / "tokenizer_config.json", settings)
    change(folder, settings)
    return renderer_from_config(engine_config(folder))


def is_official(front_end, name):
    """Chats that repeat a recorded prompt, the places of images left to the template or written in the text."""
    case = load(name)
    parts = [{"type": "image_pil", "image_pil": image} for image in images_of(case)]
    text = {"type": "text", "text": case["question"].replace("<image>\n", "")}
    same_as(case, chat(front_end, [*parts, text]))
    same_as(case, chat(front_end, [*parts, {"type": "text", "text": case["question"]}]))
    plain = load("a1_text_single_block")
    assert chat(front_end, plain["question"])["prompt_token_ids"] == plain["prompt_ids"]
    return True


@pytest.mark.parametrize("name", ["b1_image_steps_eq_gen", "i1_two_images_anyres"])
def test_chat_is_the_official_conversation(fresh, name):
    """The tokenizer files bring LLaDA's template, which knows neither the system text nor images."""
    assert fresh.get_tokenizer().name_or_path and is_official(fresh, name)
    with pytest.raises(VLLMValidationError, match="placeholder"):
        chat(fresh, load(name)["question"])


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": None},
        {"chat_template": [{"name": "default", "template": files.CHAT_TEMPLATE}, {"name": "x", "template": "<image>"}]},
        {"chat_template": [{"name": "x", "template": "<image>"}, {"name": "y", "template": "y"}]},
        # The official code writes begin-of-text as a constant.
        {"bos_token": None, "chat_template": None},
    ],
    ids=["none", "named", "named without default", "no begin of text"],
)
def test_official_conversation_whatever_the_files_lack(tmp_path, settings):
    front_end = front_end_of(tmp_path, **settings)
    plain = load("a1_text_single_block")
    assert chat(front_end, plain["question"])["prompt_token_ids"] == plain["prompt_ids"]
    front_end.shutdown()


OWN = "{% for m in messages %}{{ m.role }}: {{ m.content | replace('<image>', '[<image>]') }};{% endfor %}"
OF_PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{% if part.type == 'image' %}[<image>]"
    "{% else %}{{ part.text }}{% endif %}{% endfor %};{% endfor %}"
)


def text_of(front_end, *content, **kwargs):
    """Prompt text of one user turn; "@" stands for an image."""
    image = {"type": "image_pil", "image_pil": Image.new("RGB", (20, 20))}
    parts = [image if part == "@" else {"type": "text", "text": part} for part in content]
    return chat(front_end, parts, **kwargs)["prompt"]


def write_jinja(folder, settings):
    (folder / "chat_template.jinja").write_text(OF_PARTS)


def write_processor(folder, settings):
    """Files of a processor, with a template of its own and image settings that the official code has as constants."""
    clip = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.3], "size": {"shortest_edge": 100}}
    files.write_json(folder / "preprocessor_config.json", clip | {"processor_class": "LlavaProcessor"})
    of_processor = {"processor_class": "LlavaProcessor", "image_token": "[CLS]", "patch_size": 14}
    files.write_json(folder / "processor_config.json", of_processor | {"vision_feature_select_strategy": "default"})
    files.write_json(folder / "chat_template.json", {"chat_template": settings.pop("of_processor")})


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"chat_template": OF_PARTS}, None),
        ({"chat_template": [{"name": "default", "template": OF_PARTS}, {"name": "tool_use", "template": "x"}]}, None),
        ({}, write_jinja),
        ({"of_processor": OF_PARTS}, write_processor),
    ],
    ids=["tokenizer_config.json", "named", "chat_template.jinja", "processor"],
)
def test_a_template_of_the_checkpoint_that_knows_images_is_kept(tmp_path, settings, change):
    """Content stays parts, as it asks for; so images stand where their parts do."""
    front_end = front_end_of(tmp_path, **settings, **({"change": change} if change else {}))
    assert text_of(front_end, "a", "@", "b") == "user: a[<image>]b;"
    assert front_end.get_tokenizer().get_chat_template() == OF_PARTS
    case = load("b1_image_steps_eq_gen")
    prompt = {"prompt": case["prompt_text"], "multi_modal_data": {"image": images_of(case)}}
    same_as(case, render(front_end, prompt))
    # A request may name another one, or bring it.
    assert text_of(front_end, "a", "@", "b", chat_template=OWN) == "user: [<image>]\na\nb;"
    assert text_of(front_end, "a", "@", chat_template_kwargs={"chat_template": OWN}) == "user: [<image>]\na;"
    front_end.shutdown()


def test_a_processors_template_for_text_gives_way(tmp_path):
    front_end = front_end_of(tmp_path, write_processor, of_processor=files.CHAT_TEMPLATE)
    assert is_official(front_end, "b1_image_steps_eq_gen")
    front_end.shutdown()


def test_a_template_for_text_that_knows_images_is_kept(tmp_path):
    front_end = front_end_of(tmp_path, chat_template=OWN)
    assert text_of(front_end, "a", "@", "b") == "user: [<image>]\na\nb;"
    front_end.shutdown()


def test_a_named_template_wins(fresh):
    """The checkpoint's own by argument, as a user would who wants it: no system text, images first."""
    text = text_of(fresh, "a", "@", "b", chat_template=files.CHAT_TEMPLATE)
    assert text.startswith("<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n<image>\na\nb<|eot_id|>")
    assert text_of(fresh, "a", "@", "b", chat_template=OF_PARTS) == "user: a[<image>]b;"
    assert "assistant. You are able" in text_of(fresh, "a", "@", "b")


def test_tools_are_not_left_out(fresh):
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(VLLMValidationError, match="tools: the chat template"):
        text_of(fresh, "a", chat_template_kwargs={"tools": tools})
    writes_them = "{{ tools[0].function.name }}: {{ messages[0].content }}"
    assert text_of(fresh, "a", chat_template=writes_them, chat_template_kwargs={"tools": tools}) == "f: a"
    assert text_of(fresh, "a", chat_template_kwargs={"tools": tools}, tool_choice="none").count("a<|eot_id|>") == 1


@pytest.mark.parametrize("rebuild", [lambda t: t, copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_the_placeholder_has_a_string_and_no_word(fresh, rebuild):
    tokenizer = rebuild(fresh.get_tokenizer())
    ids = [300, 126349, 126349, 301]
    a, b = tokenizer.decode([300]), tokenizer.decode([301])
    assert tokenizer.convert_ids_to_tokens(ids)[1:3] == ["<image>"] * 2 and None not in tokenizer.convert_ids_to_tokens(
        ids
    )
    assert (
        tokenizer.convert_ids_to_tokens(126349) == tokenizer.decode(126349) == tokenizer.decode([126349]) == "<image>"
    )
    assert tokenizer.decode(ids) == tokenizer.decode(torch.tensor(ids)) == f"{a}<image><image>{b}"
    assert tokenizer.batch_decode([ids, [300], []]) == [f"{a}<image><image>{b}", a, ""]
    assert tokenizer.decode(ids, skip_special_tokens=True) == a + b
    assert len(tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)) == 2
    # The vocabulary does not know.
    assert len(tokenizer) == tokenizer.max_token_id + 1 == 126349
    assert "<image>" not in tokenizer.get_vocab() and 126349 not in tokenizer.get_vocab().values()
    assert 126349 not in tokenizer.encode("a <image> b")


@pytest.mark.parametrize(
    ("prompt", "num_images"),
    [("<image>\nHi", 0), ("Hi", 1), ("<image><image>", 1), ("<image>", 2), ("<image>", 0)],
)
def test_placeholders_must_match_images(fresh, prompt, num_images):
    image = Image.new("RGB", (20, 20))
    request = {"prompt": prompt}
    if num_images:
        request["multi_modal_data"] = {"image": [image] * num_images}
    with pytest.raises(VLLMValidationError, match="exactly once per image"):
        render(fresh, dict(request))
    with pytest.raises(VLLMValidationError, match="exactly once per image"):
        asyncio.run(fresh.render_cmpl_async([dict(request)]))


def turns(*messages):
    """Messages of (role, contents); "@" stands for an image."""
    image = {"type": "image_pil", "image_pil": Image.new("RGB", (20, 20))}
    parts = lambda content: [image if part == "@" else {"type": "text", "text": part} for part in content]  # noqa: E731
    return [{"role": role, "content": c if isinstance(c, str) else parts(c)} for role, c in messages]


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        # As many places as images, but an image would stand in another message than its own.
        ([("user", "What is <image>?"), ("user", ["@", "@", "<image>"])], 1),
        ([("user", ["@", "@", "<image>"]), ("user", "What is <image>?")], 1),
        ([("user", ["@", "<image> <image>"]), ("user", ["@", "@", "<image>"])], 1),
        ([("user", ["@", "Hi"]), ("user", ["@", "@", "<image>"]), ("assistant", "<image>")], 2),
        ([("system", ["<image>"]), ("user", ["@", "@", "<image>"])], 1),
        ([("user", ["@", "@", "<image>"]), ("tool", "saw <image>"), ("user", "?")], 1),
        ([("user", ["@", "a"]), ("tool", "saw <image>"), ("user", "?")], 2),
        ([("user", ["<ima", "ge>"]), ("user", ["@", "@", "<image>"])], 1),
        ([("user", ["@"]), ("user", ["<image>"])], 2),
        ([("user", "Is <image> a tag?")], 1),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_images_stay_in_their_message(fresh, messages, wrong, is_async):
    with pytest.raises(VLLMValidationError, match=rf"Message {wrong} \(.*write <image> once per image of the same"):
        if is_async:
            asyncio.run(fresh.render_chat_async([turns(*messages)], ChatParams()))
        else:
            fresh.render_chat([turns(*messages)], ChatParams())


def test_templates_for_text_cannot_misplace_images(tmp_path):
    """vLLM itself writes what a message lacks, so a place in another message is one too many."""
    front_end = front_end_of(tmp_path, chat_template=OWN)
    for messages in (
        [("user", "What is <image>?"), ("user", ["@", "@", "<image>"])],
        [("user", ["@", "@", "<image>"]), ("assistant", "<image>")],
    ):
        with pytest.raises(VLLMValidationError, match="3 image placeholder.*2 image"):
            front_end.render_chat([turns(*messages)], ChatParams())
    front_end.shutdown()


def test_messages_that_place_their_own_images(fresh):
    messages = turns(
        ("user", ["@", "@", "a <image> b <image>"]), ("assistant", "c"), ("user", ["d", "@"]), ("user", "e")
    )
    prompt = fresh.render_chat([messages], ChatParams())[1][0]
    assert prompt["prompt"].count("<image>") == len(prompt["mm_placeholders"]["image"]) == 3
    assert "a <image> b <image><|eot_id|>" in prompt["prompt"] and "d<image>\n<|eot_id|>" in prompt["prompt"]


def test_expanded_prompt_is_not_expanded_again(fresh):
    case = load("b1_image_steps_eq_gen")
    ids = list(expanded(case, 126349))
    with pytest.raises(VLLMValidationError, match="869 image placeholder"):
        render(fresh, {"prompt_token_ids": ids, "multi_modal_data": {"image": images_of(case)}})


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "I", "F", "PA", "YCbCr"])
def test_images_of_any_mode(fresh, mode):
    image = Image.new("RGB", (40, 30), (200, 30, 60))
    if mode == "PA":
        image = image.convert("P").convert("PA")
    elif mode == "I;16":
        image = Image.fromarray(np.full((30, 40), 40000, dtype=np.uint16))
    else:
        image = image.convert(mode)
    assert image.mode == mode
    request = {"prompt": "<image>\nHi", "multi_modal_data": {"image": image}}
    item = render(fresh, request)["mm_kwargs"]["image"][0].get_data()
    overview = image.convert("RGB").resize((384, 384))
    expected = (np.asarray(overview, dtype=np.float32) / 255 - 0.5) / 0.5
    assert np.allclose(item["pixel_values"][0], expected.transpose(2, 0, 1), atol=1e-6)


def test_transparency_is_dropped_not_blended(fresh):
    image = Image.new("RGBA", (40, 30), (200, 30, 60, 0))
    assert processing.to_rgb(image).getpixel((0, 0)) == (200, 30, 60)
    assert fresh.model_config.multimodal_config.media_io_kwargs["image"]["image_mode"] is None
    path = GOLDEN / "images" / "small_97x61.png"
    from_http = ImageMediaIO(image_mode=None).load_bytes(path.read_bytes())
    request = {"prompt": "<image>", "multi_modal_data": {"image": [from_http]}}
    assert render(fresh, request)["mm_placeholders"]["image"][0].length == 1205


def test_arrays(fresh):
    pixels = np.asarray(Image.open(GOLDEN / "images" / "small_97x61.png"))
    # A bare 3-D tensor means embeddings to vLLM.
    for array in (pixels, pixels.transpose(2, 0, 1), [torch.from_numpy(pixels.copy())]):
        request = {"prompt": "<image>", "multi_modal_data": {"image": array}}
        assert render(fresh, request)["mm_placeholders"]["image"][0].length == 1205
    for bad in (pixels.astype(np.float32), np.zeros((5, 5, 5), np.uint8)):
        request = {"prompt": "<image>", "multi_modal_data": {"image": [bad]}}
        with pytest.raises(VLLMValidationError, match="are no image"):
            render(fresh, request)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 1000), (385, 1), (800, 2)])
def test_odd_sizes_work_or_are_refused(fresh, size):
    request = {"prompt": "<image>", "multi_modal_data": {"image": Image.new("RGB", size)}}
    try:
        result = render(fresh, request)
    except VLLMValidationError as error:
        assert "too thin" in str(error)
    else:
        assert result["mm_placeholders"]["image"][0].length > 729


def test_unusable_options(fresh):
    request = {"prompt": "<image>", "multi_modal_data": {"image": Image.new("RGB", (900, 900))}}
    for options, message in (
        ({"image_aspect_ratio": "square"}, "anyres_max_N"),
        ({"aspect": "pad"}, "not settings"),
        ({"images_kwargs": 3}, "not settings"),
        ({"image_aspect_ratio": "anyres"}, "sized for"),
    ):
        with pytest.raises(VLLMValidationError, match=message):
            render(fresh, {**request, "mm_processor_kwargs": options})


def test_announced_size_is_checked_before_decoding(front_end):
    """A header of 30000 x 30000 pixels: Pillow's own error would become HTTP 500."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    png += struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT" + b"\0" * 8
    with pytest.raises(ValueError, match="VLLM_MAX_IMAGE_PIXELS"):
        ImageMediaIO(image_mode=None).load_bytes(png)


def test_image_embeddings_are_refused(fresh):
    request = {"prompt": "<image>", "multi_modal_data": {"image": torch.zeros(1, 7, 64)}}
    with pytest.raises(VLLMValidationError):
        render(fresh, request)


def test_server_options(checkpoint):
    limited = engine_config(checkpoint, hf_overrides={"max_image_tiles": 5})
    front_end = renderer_from_config(limited)
    request = {"prompt": "<image>", "multi_modal_data": {"image": Image.new("RGB", (1600, 1200))}}
    with pytest.raises(VLLMValidationError, match="needs 21 tiles.*takes 5.*pad"):
        render(front_end, dict(request))
    pad = {"mm_processor_kwargs": {"image_aspect_ratio": "pad"}}
    assert render(front_end, {**request, **pad})["mm_placeholders"]["image"][0].length == 730
    info = front_end.mm_processor.info
    assert info.get_mm_max_tokens_per_item(16384, {"image": 1})["image"] == 729 + 27 * 4 * 28
    front_end.shutdown()
    padded = engine_config(checkpoint, mm_processor_kwargs={"image_aspect_ratio": "pad"})
    front_end = renderer_from_config(padded)
    assert render(front_end, dict(request))["mm_placeholders"]["image"][0].length == 730
    front_end.shutdown()


def test_profiling_input_has_the_promised_size(front_end):
    processor = front_end.mm_processor
    promised = processor.info.get_mm_max_tokens_per_item(16384, {"image": 1})["image"]
    dummy = processor.get_dummy_mm_inputs({"image": 1})
    assert dummy["mm_placeholders"]["image"][0].length == promised
    assert processor.info.get_mm_max_tokens_per_item(100, {"image": 1})["image"] == 100


@pytest.fixture(scope="module")
def vision(config, checkpoint, tmp_path_factory):
    """The vision stack with the checkpoint's weights, on one rank without an engine."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.parallel_state import (
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    store = tmp_path_factory.mktemp("dist") / "store"
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        initialize_model_parallel(1, 1)

        class Holder(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.vision = VisionStack(config, prefix="vision")

        holder = Holder()
        weights = load_file(checkpoint / "model.safetensors").items()
        mapper = VisionStack.weights_mapper("vision.")
        mapped = [(n, w) for n, w in mapper.apply(weights) if n.startswith("vision.")]
        loaded = AutoWeightsLoader(holder).load_weights(mapped)
        assert loaded == {name for name, _ in holder.named_parameters()}
        process_weights_after_loading(holder, config.model_config, torch.device("cpu"))
        yield holder.vision.eval()
    cleanup_dist_env_and_memory()


def statistics(values):
    a = values.double().numpy()
    rows, columns = np.arange(a.shape[0])[:, None], np.arange(a.shape[1])
    wave = np.cos(0.1 * rows + 0.7 * columns)
    return {"sum": a.sum(), "abs_sum": np.abs(a).sum(), "cos_checksum": (a * wave).sum()}


def assert_close(values, recorded):
    assert list(values.shape) == recorded["shape"]
    found = statistics(values)
    for key in ("sum", "abs_sum", "cos_checksum"):
        assert math.isclose(found[key], recorded[key], abs_tol=1e-5 * recorded["abs_sum"]), key


@torch.no_grad()
@pytest.mark.parametrize("name", PREPROCESSING)
def test_tower_and_projector(fresh, vision, name):
    case = load(name)
    image = Image.open(GOLDEN / "images" / case["image"]["file"])
    ratio = {"image_aspect_ratio": case["image_aspect_ratio"]}
    request = {"prompt": "<image>", "multi_modal_data": {"image": image}}
    result = render(fresh, {**request, "mm_processor_kwargs": ratio})
    pixel_values = result["mm_kwargs"]["image"][0].get_data()["pixel_values"]
    tower = vision.vision_tower(pixel_values)
    projected = vision(pixel_values)
    for index in range(len(pixel_values)):
        assert_close(tower[index], case["vision_tower_output"][index])
        assert_close(projected[index], case["projector_output"][index])
    assert np.allclose(tower[0, 0], case["vision_tower_first_token"], atol=1e-4)
    assert np.allclose(projected[0, 0], case["projector_first_token"], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [*PREPROCESSING[1:], "b1_image_steps_eq_gen", "i2_two_images_pad"])
def test_merged_embeddings(fresh, vision, checkpoint, name):
    case = load(name)
    images = [case["image"]] if "image" in case else case["images"]
    if case.get("prompt_text") is None:
        begin, end = load("b1_image_steps_eq_gen")["prompt_text"].split("<image>\nPlease", 1)
        text = begin + "<image>" + end[end.index("<|eot_id|>") :]
    else:
        text = case["prompt_text"]
    ratio = case.get("image_aspect_ratio") or case["settings"].get("image_aspect_ratio")
    request = {
        "prompt": text,
        "multi_modal_data": {"image": [Image.open(GOLDEN / "images" / i["file"]) for i in images]},
        "mm_processor_kwargs": {"image_aspect_ratio": ratio} if ratio else {},
    }
    result = render(fresh, request)
    items = [("image", item) for item in result["mm_kwargs"]["image"]]
    ((_, _, batch),) = group_and_batch_mm_kwargs(items)
    tokens = vision.embed_multimodal(**batch)
    table = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    merged = table[torch.tensor(result["prompt_token_ids"])].clone()
    for place, rows in zip(result["mm_placeholders"]["image"], tokens, strict=True):
        merged[place.offset : place.offset + place.length] = rows
    recorded = case["merged_embeddings"]
    assert_close(merged, recorded["stats"])
    for row, values in recorded["rows"].items():
        assert np.allclose(merged[int(row)], values, atol=1e-4), row


@torch.no_grad()
def test_passes_of_the_tower_do_not_matter(vision, monkeypatch):
    torch.manual_seed(0)
    pixel_values = torch.randn(5, 3, 384, 384)
    whole = vision(pixel_values)
    monkeypatch.setattr("vllm_dvlm.models.vision._TILES_PER_PASS", 2)
    assert torch.allclose(vision(pixel_values), whole, atol=1e-4)


def test_projectors():
    assert [n for n, _ in build_projector("mlp3x_gelu", 4, 8).named_parameters()] == [
        f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")
    ]
    assert build_projector("linear", 4, 8).weight.shape == (8, 4)
    with pytest.raises(ValueError, match="mm_projector_type"):
        build_projector("pooler", 4, 8)
