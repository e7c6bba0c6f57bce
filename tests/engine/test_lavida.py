"""LaViDa's recorded runs through the real engine: prefix and full attention, schedules, drafts, pruning."""

import json

import pytest

from tests.engine.run_lavida import request_of
from tests.golden import lavida_cases as cases
from vllm_dvlm.synthetic import tiny_lavida
from vllm_dvlm.synthetic.lavida_files import DREAM, LLADA

RECORDED = [case for case in cases.all_cases() if not case.records_defect]
# The engine's float32 sums in another order than the recordings'.
CONFIDENCE_TOLERANCE = 1e-3


def is_spatial(case):
    return case.config_overrides.get("mm_patch_merge_type") == "spatial"


def cases_of(kind, spatial=False):
    return [case for case in RECORDED if case.kind is kind and is_spatial(case) == spatial]


@pytest.fixture(scope="module")
def make_engine(tmp_path_factory):
    """``make_engine(kind, **changes)``: the engine of a checkpoint; the one before is closed."""
    from tests.engine.engines import Engine

    root, alive = tmp_path_factory.getbasetemp() / "checkpoints", {}

    def make(kind, **changes):
        key = (kind.name, json.dumps(changes, sort_keys=True))
        if key not in alive:
            for made in alive.values():
                made.close()
            alive.clear()
            folder = tiny_lavida.checkpoint(root, kind)
            alive[key] = Engine(lambda **_: folder, tmp_path_factory.mktemp("traces"), **changes)
        return alive[key]

    yield make
    for made in alive.values():
        made.close()


def assert_recorded(engine, case, output):
    assert list(output.outputs[0].token_ids) == case.final_ids, case.name
    trace = engine.trace(case.name)
    assert trace["prompt_len"] == case.prompt_len
    steps = list(trace["steps"])
    if case.first_token is not None:  # the pass over the prompt is a step that writes one token
        first = steps.pop(0)
        assert (first["pos"], first["ids"]) == ([0], [case.first_token])
    assert len(steps) == len(case.steps)
    for ours, theirs in zip(steps, case.steps, strict=True):
        order = sorted(range(len(theirs["positions"])), key=lambda i: theirs["positions"][i])
        for key, recorded in (("pos", "positions"), ("ids", "tokens")):
            assert ours[key] == [theirs[recorded][i] for i in order], (case.name, key, theirs["step"])
        assert ours["conf"] == pytest.approx([theirs["confidence"][i] for i in order], abs=CONFIDENCE_TOLERANCE)
    if case.kept_indices is not None:
        assert trace["pruning"]["kept_local_indices"] == case.kept_indices


@pytest.mark.parametrize("case", cases_of(LLADA), ids=lambda case: case.name)
def test_recorded_run(case, make_engine):
    engine = make_engine(LLADA)
    assert_recorded(engine, case, engine.run({case.name: request_of(case)})[case.name])


def test_recorded_runs_in_one_batch(make_engine):
    """Prefix and full, text and pictures, drafts, schedules and pruned requests side by side."""
    engine, mixed = make_engine(LLADA), cases_of(LLADA)
    assert {"prefix", "full"} == {cases.extra_args(case)["diffusion_attention"] for case in mixed}
    outputs = engine.run({case.name: request_of(case) for case in mixed})
    for case in mixed:
        assert_recorded(engine, case, outputs[case.name])


def test_pictures_without_unpadding(make_engine):
    engine, mixed = make_engine(LLADA, hf_overrides={"mm_patch_merge_type": "spatial"}), cases_of(LLADA, spatial=True)
    assert len(mixed) == 2
    outputs = engine.run({case.name: request_of(case) for case in mixed})
    for case in mixed:
        assert_recorded(engine, case, outputs[case.name])


def test_shifted_logits(make_engine):
    """Dream: alone, then all in one batch."""
    engine, mixed = make_engine(DREAM), cases_of(DREAM)
    for case in mixed:
        assert_recorded(engine, case, engine.run({case.name: request_of(case)})[case.name])
    outputs = engine.run({case.name: request_of(case) for case in mixed})
    for case in mixed:
        assert_recorded(engine, case, outputs[case.name])
