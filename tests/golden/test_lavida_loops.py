"""The dense LaViDa reference against the recorded runs of the original code, step by step."""

import functools
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from tests.golden import lavida_cases as cases
from vllm_dvlm.reference.lavida_loops import LavidaOptions, lean_loop, official_loop
from vllm_dvlm.reference.lavida_model import LavidaModel, PrefixKVCache, conversation, prune_prefix
from vllm_dvlm.reference.model import prompt_token_ids, rotate
from vllm_dvlm.synthetic import tiny_lavida
from vllm_dvlm.synthetic.lavida_files import DREAM, KINDS, LLADA

RECORDED = [case for case in cases.all_cases() if not case.records_defect]
# Golden README, section "Files".
EMBEDDING_TOLERANCE = 1e-4
SUM_TOLERANCE = 0.05
IMPORTANCE_TOLERANCE = 1e-5

# The official loop makes logits of every row: one run per feature, the cheap ones.
OFFICIAL = ["text_prefix", "text_entrophy_blocks", "dream_text_prefix_entropy", "dream_text_full_maskgit"]


@pytest.fixture(scope="module")
def load_model(tmp_path_factory):
    root = tmp_path_factory.getbasetemp() / "checkpoints"
    return functools.cache(lambda kind: LavidaModel.load(tiny_lavida.checkpoint(root, kind)))


@pytest.fixture(scope="module")
def merged_prompt(load_model):
    """Merged prompt of a case; an image is encoded once."""
    features = {}

    def merge(case):
        model = load_model(case.kind)
        if case.image_record is None:
            return model.merge(case.prompt_ids)
        key = (case.kind.name, case.image_record["file"], *case.config_overrides.values())
        if key not in features:
            features[key] = model.image_features([cases.image(case)], **case.config_overrides)
        return model.merge(case.prompt_ids, features[key])

    return merge


def loop_options(case, **changes) -> LavidaOptions:
    options = {name.removeprefix("diffusion_"): value for name, value in cases.extra_args(case).items()}
    assert options.pop("prune_method", "redvtp") == "redvtp"
    options["draft"] = tuple(options.get("draft") or ())
    sampling = cases.sampling_args(case)
    assert sampling.pop("temperature") == 0
    return LavidaOptions(**options | sampling | changes)


def confidence_tolerance(case) -> float:
    return 1e-3 if loop_options(case).remasking == "entropy" else 2e-4


def assert_matches(result, case) -> None:
    exact = ("step", "k", "positions", "tokens") + (("block",) if case.kind is LLADA else ())
    assert [{key: step[key] for key in exact} for step in result.steps] == [
        {key: step[key] for key in exact} for step in case.steps
    ]
    for ours, theirs in zip(result.steps, case.steps, strict=True):
        assert ours["confidence"] == pytest.approx(theirs["confidence"], rel=0, abs=confidence_tolerance(case))
    assert result.final_ids == case.final_ids
    assert result.first_token == case.first_token
    assert result.kept_local_indices == case.kept_indices
    if case.kept_indices is not None:
        recorded = torch.from_numpy(case.array("importance"))
        assert torch.allclose(result.importance, recorded, rtol=0, atol=IMPORTANCE_TOLERANCE)


def test_every_recorded_run_is_covered():
    assert Counter(case.variant for case in cases.all_cases()) == {
        "lavida": 21,
        "lavida-dream": 6,
        "redvtp-repaired": 4,
        "redvtp-as-released": 2,
    }
    assert len(RECORDED) == 31 and set(OFFICIAL) < {case.name for case in RECORDED}


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case.name)
def test_lean_loop(case, load_model, merged_prompt):
    result = lean_loop(load_model(case.kind), merged_prompt(case), loop_options(case))
    assert_matches(result, case)
    # A step that unmasks nothing needs no forward; the original makes one.
    num_prompts = len(case.forward_log) - len(case.steps)
    assert num_prompts == (loop_options(case).attention == "prefix")
    steps = [entry for entry, step in zip(case.forward_log[num_prompts:], case.steps, strict=True) if step["k"]]
    assert result.forward_log == case.forward_log[:num_prompts] + steps


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_loop(name, load_model, merged_prompt):
    case = cases.load(name)
    result = official_loop(load_model(case.kind), merged_prompt(case), loop_options(case))
    assert_matches(result, case)
    assert result.forward_log == case.forward_log


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case.name)
def test_merged_embeddings(case, load_model, merged_prompt):
    prompt = merged_prompt(case)
    assert list(prompt.visual_spans) == case.visual_spans
    parts = {"merged_embeds": prompt.embeddings}
    if case.visual_spans:
        parts["visual_embeds"] = prompt.embeddings[slice(*case.visual_spans[0])]
    for name, rows in parts.items():
        recorded = case.raw[name]
        assert list(rows.shape) == recorded["shape"]
        for row, values in ((rows[0], recorded["first_row"]), (rows[-1], recorded["last_row"])):
            assert row.tolist() == pytest.approx(values, rel=0, abs=EMBEDDING_TOLERANCE)
        wide = rows.double()
        assert float(wide.sum()) == pytest.approx(recorded["sum"], rel=0, abs=SUM_TOLERANCE)
        assert float(wide.abs().sum()) == pytest.approx(recorded["abs_sum"], rel=0, abs=SUM_TOLERANCE)
    if (whole := case.array("merged_embeds")) is not None:
        assert torch.allclose(prompt.embeddings, torch.from_numpy(whole), rtol=0, atol=EMBEDDING_TOLERANCE)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_conversation(kind, load_model):
    """The template, and the token after the image that LaViDa-LLaDA loses."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(load_model(kind).folder)
    assert len(tokenizer) == kind.num_tokens
    for case in cases.all_cases():
        if case.kind is kind:
            question = "<image>\n" * bool(case.image_record) + case.raw["question"]
            assert conversation(tokenizer, question) == case.prompt_text
            assert prompt_token_ids(tokenizer, case.prompt_text) == case.prompt_ids
            if case.draft_ids:
                assert tokenizer(case.raw["draft_text"], add_special_tokens=False)["input_ids"] == case.draft_ids
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    behind = [
        case.prompt_ids[case.prompt_ids.index(-200) + 1] for case in RECORDED if case.image_record and case.kind is kind
    ]
    assert all(token == newline[0] for token in behind) == (kind is DREAM)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_checkpoint_is_the_recorded_one(kind):
    recorded = {case.raw["checkpoint_sha256"] for case in cases.all_cases() if case.kind is kind}
    assert recorded == {tiny_lavida.digest(tiny_lavida.tensors(kind))}


@pytest.mark.parametrize("name", ["img_step_per_block", "dream_img_prefix_ratio_no_schedule"])
@pytest.mark.parametrize("positions", ["renumber", "keep"])
def test_pruning_with_a_prefix(name, positions, load_model, merged_prompt):
    """Both loops agree, and keeping every token changes nothing."""
    case = cases.load(name)
    model, prompt = load_model(case.kind), merged_prompt(case)
    options = loop_options(case, prune_keep_ratio=0.5, prune_positions=positions)
    result = lean_loop(model, prompt, options)
    if positions == "renumber":
        costly = official_loop(model, prompt, options)
        assert (costly.final_ids, costly.kept_local_indices) == (result.final_ids, result.kept_local_indices)
    num_visual = case.image_record["visual_tokens"]
    assert len(result.kept_local_indices) == num_visual // 2
    lengths = [cached for _, cached in result.forward_log]
    assert lengths[:3] == [0, case.prompt_len, case.prompt_len - num_visual + num_visual // 2]
    assert model.mask_id not in result.final_ids and result.final_ids != case.final_ids
    whole = lean_loop(model, prompt, loop_options(case, prune_keep_ratio=1.0, prune_positions=positions))
    assert whole.final_ids == case.final_ids


@dataclass
class _Masked:
    """Attention in which query row i sees key j where `seen[i, j]`."""

    seen: torch.Tensor

    def attend(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.seen)


@pytest.mark.parametrize("name", ["text_prefix", "dream_text_prefix_entropy"])
@torch.inference_mode()
def test_a_prefix_is_a_mask_over_the_whole_sequence(name, load_model, merged_prompt):
    """Row i sees key j where "j < P or i >= P"; pruned keys that keep their places are masked for the canvas."""
    case = cases.load(name)
    model, prompt = load_model(case.kind), merged_prompt(case).embeddings
    text, canvas, num_prompt = model.text, model.embed([model.mask_id] * 8), len(prompt)
    whole = torch.cat([prompt, canvas])[None]
    index = torch.arange(num_prompt + 8)
    seen = (index[None, :] < num_prompt) | (index[:, None] >= num_prompt)
    cache = PrefixKVCache(8)
    rows = text.forward(prompt[None], 0, cache), text.forward(canvas[None], num_prompt, cache)
    dense = text.forward(whole, probe=_Masked(seen))
    assert torch.allclose(torch.cat(rows, 1), dense, rtol=0, atol=5e-4)

    kept = torch.cat([torch.arange(0, 60, 2), torch.arange(100, num_prompt)])
    prune_prefix(cache, text, kept, renumber=False)
    rows = text.forward(canvas[None], len(kept), cache, rotary_start=num_prompt)
    seen[num_prompt:, [i for i in range(num_prompt) if i not in kept]] = False
    dense = text.forward(whole, probe=_Masked(seen))[:, num_prompt:]
    assert torch.allclose(rows, dense, rtol=0, atol=5e-4)


def test_renumbered_keys_are_those_of_the_new_places(load_model):
    text, kept = load_model(LLADA).text, torch.tensor([0, 1, 5, 6, 40, 41])
    key = torch.randn(1, 4, 50, 16, generator=torch.Generator().manual_seed(0))
    cache = PrefixKVCache(3)
    cache.update(0, 0, rotate(key, *text.rotation(torch.arange(50.0), key.dtype)), key)
    prune_prefix(cache, text, kept, renumber=True)
    keys, values = (t[:, :, : len(kept)] for t in cache.layers[0])
    expected = rotate(key[:, :, kept], *text.rotation(torch.arange(6.0), key.dtype))
    assert torch.allclose(keys, expected, rtol=0, atol=1e-4)
    assert torch.equal(values, key[:, :, kept]) and cache.layers[0][0].shape[2] == len(kept) + 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft": (1,) * 40}, "does not fit"),
        ({"remasking": "topk"}, "use one of"),
        ({"attention": "causal"}, "prefix or full"),
    ],
)
def test_impossible_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LavidaOptions(**{"canvas_length": 16} | changes)


def test_dream_has_one_block(load_model, merged_prompt):
    case = cases.load("dream_text_prefix_entropy")
    with pytest.raises(ValueError, match="one block"):
        lean_loop(load_model(DREAM), merged_prompt(case), loop_options(case, block_length=8))
