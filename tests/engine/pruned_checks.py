"""What tests of pruning ask of a finished request: is it as recorded, or as the dense reference says?

The engine is imported inside functions only, as in the tests that use this.
"""

import functools

import numpy as np
import pytest

from tests.engine import pruned_reference
from tests.golden import cases

IMPORTANCE_TOLERANCE, CONFIDENCE_TOLERANCE = 2e-3, 5e-4
# A run decides a test only if its closest choice is farther from a tie than float32 can move it.
CLEAR = {"token": 1e-3, "confidence": 1e-3, "importance": 5e-4}


def request(case, **options):
    """A golden case's prompt, with its own options or the given ones instead."""
    from vllm import SamplingParams

    from tests.engine.engines import case_params, case_prompt

    if not options:
        return case_prompt(case), case_params(case)
    extra_args = {"diffusion_trace": 1, **options}
    length = options.get("diffusion_canvas_length", 16)
    return case_prompt(case), SamplingParams(temperature=0, max_tokens=length, extra_args=extra_args)


@functools.cache
def merged(model, name):
    return pruned_reference.case_prompt(model, cases.load(name))


def prompt_of(model, case):
    """A golden case's merged prompt, made once per model."""
    return merged(model, case.name)


def importance(engine, name):
    """[visual tokens] of a traced request."""
    with np.load(engine.trace_dir / f"{name}.npz") as arrays:
        return arrays["importance"]


def conserved(engine):
    """A check after every engine step: no KV block is lost or owned twice, on either side."""
    manager = engine.scheduler.kv_cache_manager
    pool = manager.block_pool

    def check():
        owned = [
            block.block_id
            for owner in manager.coordinator.single_type_managers
            for blocks in owner.req_to_blocks.values()
            for block in blocks
        ]
        assert len(owned) == len(set(owned))
        assert pool.get_num_free_blocks() + len(owned) == engine.num_idle_blocks

    return check


def blocks_of(engine, num_tokens):
    return -(-num_tokens // engine.kv_block_size)


def assert_as_golden(engine, case, output):
    """Tokens, steps, lengths, pruning and KV blocks of one finished request equal the recorded run's."""
    from tests.engine.engines import case_tokens, tokens

    assert tokens(output) == case_tokens(case)
    assert output.outputs[0].finish_reason == ("length" if case.stopped_at is None else "stop")
    assert len(output.prompt_token_ids) == case.prompt_len, "usage counts the prompt as it was sent"
    trace = engine.trace(case.name)
    assert trace["final_ids"] == case.final_ids and trace["stopped_at"] == case.stopped_at
    assert trace["num_forward_passes"] == case.raw["num_forward_passes"]
    for ours, theirs in zip(trace["steps"], case.steps, strict=True):
        assert (ours["pos"], ours["ids"]) == (theirs["pos"], theirs["ids"])
        assert ours["conf"] == pytest.approx(theirs["conf"], rel=0, abs=CONFIDENCE_TOLERANCE)
        assert ours["refresh"]
    assert [[1, step["query_len"]] for step in trace["steps"]] == case.raw["forward_shapes"]
    (first, end), settings = case.visual_spans[0], case.settings
    total = case.prompt_len + settings["gen_length"]
    after = total - (end - first) + case.pruning["keep_count"]
    pruning = trace["pruning"]
    assert pruning["method"] == "redvtp" and pruning["layer"] is None and pruning["num_visual"] == end - first
    assert pruning["keep_count"] == case.pruning["keep_count"]
    assert pruning["kept_local_indices"] == case.pruning["kept_local_indices"]
    assert pruning["kv_blocks_before"] == blocks_of(engine, total)
    assert pruning["kv_blocks_after"] == blocks_of(engine, after)
    assert {step["kv_blocks"] for step in trace["steps"]} == {blocks_of(engine, after)}
    assert [step["seq_len"] for step in trace["steps"]] == [total] + [after] * (len(case.steps) - 1)
    assert importance(engine, case.name) == pytest.approx(case.importance, rel=IMPORTANCE_TOLERANCE, abs=0)
    assert np.abs(importance(engine, case.name) - np.asarray(case.importance)).max() < 1e-5


def assert_clear(dense):
    """The reference's own choices are no ties."""
    for what, distance in dense.distances.items():
        assert distance > CLEAR[what], f"the reference itself hangs on a tie ({what}); choose another setting"


def assert_as_dense(engine, name, output, dense, pruned=True):
    """Tokens, steps, lengths and pruning of one finished request equal the dense reference's."""
    assert_clear(dense)
    trace = engine.trace(name)
    assert list(output.outputs[0].token_ids) == dense.canvas
    for ours, theirs in zip(trace["steps"], dense.steps, strict=True):
        found = {key: ours[key] for key in ("pos", "ids", "query_len", "seq_len")}
        assert found == {key: theirs[key] for key in found}
        assert ours["conf"] == pytest.approx(theirs["conf"], rel=0, abs=CONFIDENCE_TOLERANCE)
    if pruned:
        assert trace["pruning"]["kept_local_indices"] == dense.kept
        expected = dense.importance.numpy()
        assert importance(engine, name) == pytest.approx(expected, rel=IMPORTANCE_TOLERANCE, abs=0)
