"""Counts per step against every recorded row, and properties that hold for any request."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.golden import lavida_cases as cases
from vllm_dvlm.denoise.schedule import (
    SCHEDULES,
    counts_per_step,
    counts_table,
    grid_table,
    planned_count,
    steps_on_grid,
    steps_per_block,
)
from vllm_dvlm.placement import resolve
from vllm_dvlm.settings import ServerSettings
from vllm_dvlm.synthetic.lavida_files import DREAM

names = st.sampled_from(SCHEDULES)
RECORDED = [case for case in cases.all_cases() if case.raw.get("num_transfer_source") != "timesteps"]
ON_GRID = [case for case in cases.all_cases() if case not in RECORDED]


def options_of(case):
    args = {name.removeprefix("diffusion_"): value for name, value in cases.extra_args(case).items()}
    schedule = (args.get("schedule") or "uniform", args.get("schedule_shift"))
    return args["canvas_length"], args.get("block_length"), args.get("max_steps"), args.get("step_ratio"), schedule


def test_every_recorded_row():
    rows = cases.counts_table()
    assert len(rows) == 1416 and sum(row.depends_on_float32 for row in rows) > 100
    for row in rows:
        got = counts_per_step(row.masks, row.steps, row.schedule or "uniform", row.shift)
        assert got == row.counts, row


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case.name)
def test_steps_and_counts_of_runs(case):
    canvas_len, block_len, max_steps, step_ratio, schedule = options_of(case)
    effective = case.raw["effective"]
    if case.kind is DREAM:
        grid, steps = steps_on_grid(canvas_len, max_steps, step_ratio)
        assert (grid, steps) == (effective["timestep_grid_steps"], effective["loop_steps"])
        masks = [canvas_len - (case.first_token is not None)]
    else:
        steps = steps_per_block(canvas_len, block_len, max_steps, step_ratio)
        assert (canvas_len // block_len, steps) == (effective["blocks"], effective["steps_per_block"])
        canvas = (case.draft_ids or []) + [case.kind.mask] * canvas_len
        masks = [canvas[i : i + block_len].count(case.kind.mask) for i in range(0, canvas_len, block_len)]
    table = counts_table(max(masks), steps, *schedule)
    assert [counts_per_step(m, steps, *schedule) for m in masks] == case.counts
    for m, counts in zip(masks, case.counts, strict=True):
        assert table[m].tolist() == counts + [0] * (steps - len(counts))


@pytest.mark.parametrize("case", ON_GRID, ids=lambda case: case.name)
def test_time_grid_of_runs(case):
    canvas_len, _, max_steps, step_ratio, _ = options_of(case)
    grid, steps = steps_on_grid(canvas_len, max_steps, step_ratio)
    effective = case.raw["effective"]
    assert (grid, steps) == (effective["timestep_grid_steps"], effective["loop_steps"])
    table = grid_table(canvas_len, grid, steps)
    left = [step["masked_before"] for step in case.steps]
    assert table[left, np.arange(steps)].tolist() == case.counts[0] == [step["k"] for step in case.steps]


def test_the_ratio_is_of_the_canvas_not_of_the_grid():
    assert steps_on_grid(32, 24, 0.5) == (24, 16)
    assert steps_on_grid(32, 24) == (24, 24)
    assert steps_on_grid(32) == steps_on_grid(32, 512) == (32, 32)


@given(st.integers(0, 200), st.integers(1, 130), names)
def test_counts_sum_to_the_masks(masks, steps, schedule):
    counts = counts_per_step(masks, steps, schedule)
    assert sum(counts) == masks and len(counts) <= steps
    assert schedule == "uniform" or all(count >= 1 for count in counts)


@given(st.integers(0, 100), st.integers(1, 60), st.integers(1, 60))
def test_the_grid_unmasks_everything(masks, grid, steps):
    table, left = grid_table(masks, grid, min(steps, grid)), masks
    for step in range(min(steps, grid)):
        left -= table[left, step]
        assert left >= 0
    assert left == 0


def test_tables_are_shared_and_cannot_be_changed():
    assert counts_table(8, 4, "cosine") is counts_table(8, 4, "cosine")
    with pytest.raises(ValueError):
        counts_table(8, 4, "cosine")[0] = 1
    with pytest.raises(ValueError):
        grid_table(8, 4, 4)[0] = 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((4, 2, "exponential"), "use one of uniform, linear, shift"),
        ((4, 0), "at least one step"),
        ((4, 2, "shift", 0.0), "positive"),
        ((4, 2, "shift", float("nan")), "positive"),
        ((4, 2, "cosine", 3.0), "schedule='shift'"),
    ],
)
def test_bad_schedules(args, message):
    with pytest.raises(ValueError, match=message):
        counts_per_step(*args)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: steps_per_block(16, 5), "does not divide"),
        (lambda: steps_per_block(16, 4, 6), "multiple of 4"),
        (lambda: steps_per_block(16, 1, step_ratio=0.5), "No step is left"),
        (lambda: steps_on_grid(16, 512, 0.0), r"\(0, 1\]"),
        (lambda: steps_on_grid(16, 512, 1.5), r"\(0, 1\]"),
        (lambda: steps_on_grid(1, 512, 0.5), "No step is left"),
        (lambda: steps_on_grid(16, 0), "No step is left"),
        (lambda: steps_on_grid(32, 8, 0.5), "takes 16 steps for 32 positions, the grid has 8"),
        (lambda: grid_table(4, 2, 3), "grid of 2"),
    ],
)
def test_impossible_steps(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "uniform"])
@pytest.mark.parametrize("num_emitted", [0, 1, 3])
def test_a_request_that_restarts_fills_its_canvas(schedule, num_emitted):
    """Dream's first token is a step of its own; one that has restarted may know it already."""
    settings = ServerSettings(architecture="LlavaDreamForMaskedDiffusion")
    params = resolve({"diffusion_canvas_length": 16, "diffusion_schedule": schedule}, 16, settings)
    num_steps = params.plan(100).steps_per_block
    at_start = left = 16 - num_emitted
    for step in range(num_steps):
        count = planned_count(params, num_steps, step, at_start, left, num_emitted > 0)
        left -= count if step or not num_emitted else 0  # in step 0 only the first position may be filled
    assert left == 0
