"""Counts, lengths and positions on which scheduler and worker must agree."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.golden import cases
from vllm_dvlm import steps
from vllm_dvlm.steps import Plan, Position, Step, VisualSpan, advance, step_at

sizes = st.integers(1, 10_000)


@given(st.integers(0, 10**6), sizes)
def test_rounding_up(a, b):
    assert steps.cdiv(a, b) == math.ceil(a / b)
    assert a <= steps.round_up(a, b) < a + b and steps.round_up(a, b) % b == 0


@given(st.integers(1, 5000), st.floats(0.001, 1))
def test_kept_share(num_visual, keep_ratio):
    kept = steps.num_kept(num_visual, keep_ratio)
    assert 1 <= kept <= num_visual
    assert kept == 1 or num_visual * keep_ratio - 1 < kept <= num_visual * keep_ratio
    assert steps.num_kept(num_visual, 1.0) == num_visual
    assert steps.pruned_prompt_len(num_visual + 60, num_visual, keep_ratio) == 60 + kept


@pytest.mark.parametrize("case", cases.by_mode("redvtp"), ids=lambda case: case.name)
def test_kept_share_as_recorded(case):
    num_visual = sum(last - first for first, last in case.visual_spans)
    if case.is_informative:  # the original's wrong span of two images
        num_visual = case.visual_spans[-1][1] - case.visual_spans[-1][0]
    assert steps.num_kept(num_visual, case.settings["keep_ratio"]) == case.pruning["keep_count"]


@given(st.integers(0, 200), st.integers(1, 250))
def test_schedule(num_masked, num_steps):
    counts = steps.num_scheduled_steps(num_masked, num_steps)
    assert len(counts) == num_steps and sum(counts) == num_masked
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


@pytest.mark.parametrize("case", cases.by_mode("plain"), ids=lambda case: case.name)
def test_schedule_as_recorded(case):
    settings = case.settings
    num_blocks = settings["gen_length"] // settings["block_length"]
    scheduled = steps.num_scheduled_steps(settings["block_length"], settings["steps"] // num_blocks)
    if case.stopped_at is None:
        assert [step["k"] for step in case.steps] == scheduled * num_blocks
    else:
        assert [step["k"] for step in case.steps[: len(scheduled)]] == scheduled[: len(case.steps)]


def test_refresh_turns():
    assert [i for i in range(10) if steps.is_refresh(i, 4)] == [0, 4, 8]
    assert all(steps.is_refresh(i, 1) for i in range(5))


def test_span():
    assert len(VisualSpan(47, 916)) == 869


def plan(steps_per_block=4, refresh_interval=1, suffix_len=3):
    return Plan(100, 16, suffix_len, 4, steps_per_block, refresh_interval)


def test_lengths():
    assert plan().total_len == 119


@pytest.mark.parametrize(
    ("before", "num_new", "after"),
    [
        (Position(0, 0, 0), 0, Position(0, 1, 0)),  # nothing to hand out yet
        (Position(0, 2, 1), 2, Position(0, 3, 3)),
        (Position(0, 1, 1), 3, Position(4, 0, 4)),  # complete before its steps are used up
        (Position(0, 3, 0), 0, Position(4, 0, 0)),  # used up, places left open
        (Position(4, 3, 0), 16, Position(16, 0, 16)),
        (Position(4, 0, 2), 11, Position(12, 0, 13)),  # a block in between is complete: it takes no step
    ],
)
def test_advance(before, num_new, after):
    assert advance(plan(), before, num_new) == after


def test_threshold_blocks_have_no_last_step():
    position = Position()
    for _ in range(50):
        position = advance(plan(steps_per_block=None), position, 0)
    assert position == Position(0, 50, 0)
    assert advance(plan(steps_per_block=None), position, 4) == Position(4, 0, 4)


@pytest.mark.parametrize(
    ("refresh_interval", "starts"),
    [(1, [0] * 8), (3, [0, 100, 100, 0, 0, 104, 104, 0]), (32, [0, 100, 100, 100, 0, 104, 104, 104])],
)
def test_step_at(refresh_interval, starts):
    """Each block begins with a whole forward; cached steps begin at the block."""
    p, position, seen = plan(refresh_interval=refresh_interval), Position(), []
    for i in range(8):
        seen.append(step_at(p, position))
        position = advance(p, position, 4 * (i == 3))
    assert seen == [Step(start, 119, 119, is_refresh=start == 0) for start in starts]
    assert [step.query_len for step in seen] == [119 - start for start in starts]


class Config:
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads = 8, 20, 3, 4, 4


def test_flops_against_the_papers_formula():
    """LLaDA-FastV counts 4 n d^2 + 2 n^2 d + 2 n d m per layer; a gated MLP has three matrices instead of two."""
    n, d, m = 7, 8, 20
    assert steps.forward_flops(Config, n, n) == 3 * (4 * n * d * d + 2 * n * n * d + 3 * n * d * m)
    # A cached step computes few tokens that attend to all.
    assert steps.forward_flops(Config, 2, n) == 3 * (4 * 2 * d * d + 2 * 2 * n * d + 3 * 2 * d * m)


def test_flops_with_grouped_heads():
    class Grouped(Config):
        num_key_value_heads = 2

    fewer = steps.forward_flops(Config, 5, 9) - steps.forward_flops(Grouped, 5, 9)
    assert fewer == 3 * 5 * 2 * 8 * (8 - 4)  # half of the key and value projections
