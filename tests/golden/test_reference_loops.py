"""Both reference loops against the recorded runs of the original code, step by step."""

import functools

import pytest
import torch

from tests.golden import cases
from vllm_dvlm.reference.loops import (
    LoopOptions,
    lean_loop,
    num_passing,
    num_unmasked_per_step,
    official_loop,
)
from vllm_dvlm.reference.model import Prompt, ReferenceModel, conversation, prompt_token_ids
from vllm_dvlm.synthetic.tiny_checkpoint import checkpoint

RECORDED = cases.by_mode("plain", "fast_dllm", "redvtp")
CONFIDENCE_TOLERANCE = 5e-4  # golden README, "Tolerance to expect"
EMBEDDING_TOLERANCE = 1e-4
# Float32 runs differ by up to 9e-4 from float64 (same section).
IMPORTANCE_TOLERANCE = 2e-3

# The official loop takes 2 s per forward of 950 positions: every text run, and of the runs with
# images one per feature. The lean loop covers all.
OFFICIAL_IMAGE_CASES = {"e3_stop_k2", "f1_redvtp_keep25", "g3_fast_r32_none", "g5_fast_r8_thr1"}
OFFICIAL = [case for case in RECORDED if not case.image_records or case.name in OFFICIAL_IMAGE_CASES]


@pytest.fixture(scope="module")
def load_model(tmp_path_factory):
    root = tmp_path_factory.getbasetemp() / "checkpoints"

    @functools.lru_cache(maxsize=3)
    def load(build_args):
        return ReferenceModel.load(checkpoint(root, **dict(build_args)))

    return lambda case: load(tuple(sorted(case.build_args.items())))


@pytest.fixture(scope="module")
def merged_prompt(load_model):
    """Merged prompt of a case; images are encoded once per seed: the tower is shared."""
    features = {}

    def merge(case) -> Prompt:
        model = load_model(case)
        files = tuple(record["file"] for record in case.image_records)
        key = (case.build_args["seed"], case.image_aspect_ratio, files)
        if key not in features:
            features[key] = model.image_features(cases.images(case), case.image_aspect_ratio)
        return model.merge(case.prompt_ids, features[key])

    return merge


def loop_options(case) -> LoopOptions:
    settings = case.settings
    return LoopOptions(
        canvas_length=settings["gen_length"],
        max_steps=settings["steps"],
        block_length=settings["block_length"],
        refresh_interval=settings.get("prefix_refresh_interval", 1),
        threshold=settings.get("threshold"),
        suffix_ids=tuple(case.raw["suffix_ids"]),
        cfg_scale=settings.get("cfg_scale", 0.0),
        prune_keep_ratio=settings.get("keep_ratio"),
    )


def pruned_as_recorded(case, prompt: Prompt) -> Prompt:
    """The prompt, with the original's wrong span in the informative case (point 37)."""
    if not case.is_informative:
        return prompt
    start, (first, end) = prompt.visual_spans[0][0], prompt.visual_spans[-1]
    return Prompt(prompt.embeddings, ((start, start + end - first),))


def assert_matches(result, case) -> None:
    exact = ("step", "pos", "ids", "k", "candidates", "forward_len", "forward_batch")
    recorded = [{key: step[key] for key in exact} for step in case.steps]
    assert [{key: step[key] for key in exact} for step in result.steps] == recorded
    for ours, theirs in zip(result.steps, case.steps, strict=True):
        assert ours["conf"] == pytest.approx(theirs["conf"], rel=0, abs=CONFIDENCE_TOLERANCE)
    assert result.final_ids == case.final_ids
    assert result.stopped_at == case.stopped_at
    assert result.forward_shapes == case.raw["forward_shapes"]
    assert len(result.forward_shapes) == case.raw["num_forward_passes"]
    if case.pruning is None:
        assert result.kept_local_indices is None
    else:
        assert result.kept_local_indices == case.pruning["kept_local_indices"]
        assert len(result.kept_local_indices) == case.pruning["keep_count"]
        assert result.importance.numpy() == pytest.approx(case.importance, rel=IMPORTANCE_TOLERANCE, abs=0)


def test_every_recorded_generation_is_covered():
    assert len(RECORDED) == 48
    assert {case.mode for case in cases.all_cases()} - {"preprocess"} == {case.mode for case in RECORDED}
    assert {case.name for case in OFFICIAL} >= OFFICIAL_IMAGE_CASES


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case.name)
def test_lean_loop(case, load_model, merged_prompt):
    prompt = pruned_as_recorded(case, merged_prompt(case))
    assert_matches(lean_loop(load_model(case), prompt, loop_options(case)), case)


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda case: case.name)
def test_official_loop(case, load_model, merged_prompt):
    result = official_loop(load_model(case), merged_prompt(case), loop_options(case), chunk_rows=128)
    assert_matches(result, case)


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case.name)
def test_merged_embeddings(case, merged_prompt):
    prompt = merged_prompt(case)
    assert prompt.embeddings.shape[0] == case.prompt_len
    assert list(prompt.visual_spans) == case.visual_spans
    recorded = case.raw["merged_embeddings"]
    rows = recorded.get("rows") or {"0": recorded["first_row"], "-1": recorded["last_row"]}
    for row, values in rows.items():
        assert prompt.embeddings[int(row)].tolist() == pytest.approx(values, rel=0, abs=EMBEDDING_TOLERANCE)
    stats = recorded["stats"]
    total = float(prompt.embeddings.double().sum())
    assert total == pytest.approx(stats["sum"], rel=0, abs=1e-5 * stats["abs_sum"])


def test_prompt_token_ids(load_model):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(load_model(RECORDED[0]).folder)
    for case in RECORDED:
        assert conversation(cases.question(case)) == cases.prompt_text(case)
        assert prompt_token_ids(tokenizer, cases.prompt_text(case)) == case.prompt_ids
        suffix = case.settings.get("generation_suffix", "")
        assert tokenizer(suffix, add_special_tokens=False)["input_ids"] == case.raw["suffix_ids"]


def test_sharded_checkpoint_is_the_same_model(load_model, tmp_path):
    whole, shards = (
        load_model(RECORDED[0]),
        ReferenceModel.load(checkpoint(tmp_path, seed=0, shards=3)),
    )
    assert torch.equal(whole.text.head, shards.text.head)
    assert all(
        torch.equal(a[name], b[name]) for a, b in zip(whole.text.layers, shards.text.layers, strict=True) for name in a
    )


def test_bfloat16_decodes(load_model):
    case = RECORDED[0]
    model = ReferenceModel.load(load_model(case).folder, torch.bfloat16)
    result = lean_loop(model, model.merge(case.prompt_ids), loop_options(case))
    assert len(result.steps) == len(case.steps)
    assert all(0 <= token < 126349 for token in result.final_ids)


@pytest.mark.parametrize(
    ("num_masked", "num_steps", "expected"),
    [(16, 6, [3, 3, 3, 3, 2, 2]), (8, 8, [1] * 8), (3, 5, [1, 1, 1, 0, 0])],
)
def test_num_unmasked_per_step(num_masked, num_steps, expected):
    assert num_unmasked_per_step(num_masked, num_steps) == expected


@pytest.mark.parametrize(
    ("confidences", "num_open", "expected"),
    [
        ([0.1, 0.05, 0.01], 3, 1),
        ([0.9, 0.7, 0.7], 9, 2),  # bounds 2/3, 3/4
        ([0.9, 0.7, 0.7], 3, 3),  # the first failure is the last open one
        ([0.1, 0.1], 2, 2),
        ([0.9, 0.9, 0.9], 3, 3),
        ([0.9], 5, 1),
    ],
)
def test_num_passing(confidences, num_open, expected):
    assert num_passing(confidences, num_open, factor=1.0) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"block_length": 5},
        {"block_length": 4, "max_steps": 6},
        {"threshold": 1.0, "prune_keep_ratio": 0.5},
        {"refresh_interval": 4, "cfg_scale": 0.5},
        {"cfg_scale": 0.5, "prune_keep_ratio": 0.5},
    ],
)
def test_impossible_options_are_refused(settings):
    with pytest.raises(ValueError):
        LoopOptions(**{"canvas_length": 16, "max_steps": 16, "block_length": 16} | settings)
