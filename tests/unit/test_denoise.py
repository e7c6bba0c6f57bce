"""Ranks, counts and whole decodes: ``take_step`` against the plain rules, ``advance`` against ``take_step``."""

import dataclasses
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.decoding import MASK, Run, emitted, num_by_threshold, official
from vllm_dvlm import steps as arithmetic
from vllm_dvlm.denoise import remask
from vllm_dvlm.denoise.step import Canvases, candidates, take_step

# -- ranks and counts ------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([float("-inf"), 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=12))
def test_ranks(row):
    values, ranks = remask.rank_positions(torch.tensor([row], dtype=torch.float64))
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    assert values[0].tolist() == [row[i] for i in order]
    assert [ranks[0].tolist().index(r) for r in range(len(row))] == order


@given(st.integers(0, 70), st.integers(1, 80))
def test_schedule_agrees_with_the_schedulers_arithmetic(num_masked, num_steps):
    steps = torch.arange(num_steps)
    counts = remask.num_by_schedule(
        torch.full_like(steps, num_masked), torch.full_like(steps, num_steps), steps
    ).tolist()
    assert counts == arithmetic.num_scheduled_steps(num_masked, num_steps)
    assert sum(counts) == num_masked


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=10),
    st.integers(0, 3),
    st.floats(0.01, 20),
)
def test_threshold_rule(confidences, num_out_of_bounds, factor):
    best_first = sorted(confidences, reverse=True)
    row = [*best_first, *[float("-inf")] * (num_out_of_bounds + 2)]  # two positions that are not masked
    num_open = len(best_first) + num_out_of_bounds
    got = remask.num_by_threshold(
        torch.tensor([row], dtype=torch.float64), torch.tensor([num_open]), torch.tensor([factor], dtype=torch.float64)
    )
    assert got.tolist() == [num_by_threshold(best_first, num_open, factor)]


@pytest.mark.parametrize(
    ("confidences", "num_open", "count"),
    [
        ([0.1, 0.1, 0.1, 0.1], 4, 1),  # the first always passes
        ([0.9, 0.7, 0.6, 0.5], 4, 2),  # bounds with f = 1: 2/3, 3/4, 4/5; the run ends at the first failure
        ([0.9, 0.7, 0.7], 3, 3),  # the first failure is the very last masked position
        ([0.9, 0.9, 0.9], 3, 3),
        ([0.9], 2, 2),  # one out of bounds: named, too
    ],
)
def test_threshold_examples(confidences, num_open, count):
    got = remask.num_by_threshold(
        torch.tensor([confidences + [float("-inf")]], dtype=torch.float64),
        torch.tensor([num_open]),
        torch.tensor([1.0], dtype=torch.float64),
    )
    assert got.tolist() == [count]


# -- whole decodes ---------------------------------------------------------------------------------------------


@st.composite
def runs(draw, **fixed):
    """Settings in any combination; small canvases, so that every corner comes up."""
    block_len = draw(st.integers(1, 6))
    values = {
        "canvas_len": block_len * draw(st.integers(1, 4)),
        "block_len": block_len,
        "steps_per_block": draw(st.integers(1, block_len + 2)),
        "refresh_interval": draw(st.sampled_from([1, 1, 2, 3, 50])),
        "threshold": draw(st.none() | st.sampled_from([0.3, 1.0, 2.5])),
        "suffix": draw(st.sampled_from([(), (), (20,), (21, 22, 23)])),
        "stop_ids": draw(st.sampled_from([(), (), (3,), (3, 5), (MASK + 99,), (3, *range(100, 200))])),
        "mask_share": draw(st.sampled_from([0.0, 0.0, 0.2, 0.7])),
        "levels": draw(st.sampled_from([1, 4, 1000])),
        "prompt_len": draw(st.integers(1, 9)),
        "caches_prompt": False,
        "seed": draw(st.integers(0, 10**6)),
    }
    values |= fixed
    if values["refresh_interval"] == 1:
        values["caches_prompt"] = draw(st.booleans())
    return Run(**values)


def plan_of(run):
    steps = None if run.threshold is not None else run.steps_per_block
    return arithmetic.Plan(
        run.prompt_len, run.canvas_len, len(run.suffix), run.block_len, steps, run.refresh_interval, run.caches_prompt
    )


def fresh_canvases(batch):
    """The state before the first step, padded to the widest request."""
    width = max(run.canvas_len + len(run.suffix) for run in batch)
    rows = [[MASK] * r.canvas_len + list(r.suffix) for r in batch]

    def column(value):
        return torch.tensor([value(r) for r in batch])

    zero = torch.zeros(len(batch), dtype=torch.int64)
    return Canvases(
        tokens=torch.tensor([row + [77] * (width - len(row)) for row in rows]),
        canvas_len=column(lambda r: r.canvas_len),
        suffix_len=column(lambda r: len(r.suffix)),
        prompt_len=column(lambda r: r.prompt_len),
        block_len=column(lambda r: r.block_len),
        steps_per_block=column(lambda r: 0 if r.threshold is not None else r.steps_per_block),
        refresh_interval=column(lambda r: r.refresh_interval),
        block_start=zero,
        step_in_block=zero,
        num_emitted=zero,
        stop=zero - 1,
        num_masked_at_start=zero,
        caches_prompt=column(lambda r: int(r.caches_prompt)),
    )


def rows_of(state, keep):
    return Canvases(**{f.name: getattr(state, f.name)[keep] for f in dataclasses.fields(state)})


def step_batch(batch, state):
    """One ``take_step`` with what the runs say; garbage wherever the rules must not look."""
    width = state.tokens.shape[1]
    proposed = torch.full((len(batch), width), 66)
    confidence = torch.full((len(batch), width), 9.0, dtype=torch.float64)
    _, candidate = candidates(state, MASK)
    for r, run in enumerate(batch):
        block_start, step = int(state.block_start[r]), int(state.step_in_block[r])
        for p in candidate[r].nonzero()[:, 0].tolist():
            proposed[r, p], confidence[r, p] = run.says(block_start, step, p)
    threshold = [float("nan") if run.threshold is None else run.threshold for run in batch]
    num_stops = max(1, *(len(run.stop_ids) for run in batch))
    stop_ids = [[*[-1] * (num_stops - len(run.stop_ids)), *sorted(run.stop_ids)] for run in batch]
    return take_step(
        state, proposed, confidence, torch.tensor(threshold, dtype=torch.float64), torch.tensor(stop_ids), MASK
    )


def decode(batch):
    """Run all requests together until all are finished, as engine and scheduler do.

    Checks after every step that the scheduler, which sees the number of emitted tokens and nothing else, stands where
    the worker stands. Returns per request (canvas, stop, steps as in ``Outcome``, emitted tokens).
    """
    state, live = fresh_canvases(batch), list(range(len(batch)))
    positions = [arithmetic.Position()] * len(batch)
    steps, tokens, last = [[] for _ in batch], [[] for _ in batch], [None] * len(batch)
    for _ in range(1000):
        before = state
        out = step_batch([batch[i] for i in live], state)
        for r, i in enumerate(live):
            committed = out.committed[r].nonzero()[:, 0].tolist()
            steps[i].append((int(before.block_start[r]), int(before.step_in_block[r]), committed))
            num_new = int(out.num_emitted[r])
            tokens[i] += out.emitted[r, :num_new].tolist()
            if out.finished[r]:
                canvas = out.canvases.tokens[r, : batch[i].canvas_len].tolist()
                stop = int(out.canvases.stop[r])
                last[i] = (canvas, None if stop < 0 else stop)
                assert out.next_start[r] == 0
                continue
            plan = plan_of(batch[i])
            positions[i] = arithmetic.advance(plan, positions[i], num_new)
            worker = (out.canvases.block_start[r], out.canvases.step_in_block[r], out.canvases.num_emitted[r])
            assert positions[i] == arithmetic.Position(*map(int, worker))
            assert arithmetic.step_at(plan, positions[i]).query_start == int(out.next_start[r])
        keep = (~out.finished).nonzero()[:, 0]
        state, live = rows_of(out.canvases, keep), [live[r] for r in keep.tolist()]
        if not live:
            return [(*last[i], steps[i], tokens[i]) for i in range(len(batch))]
    raise AssertionError("a request does not finish")


def assert_official(batch):
    for run, (canvas, stop, steps, tokens) in zip(batch, decode(batch), strict=True):
        outcome = official(run)
        assert [step for step in steps if step[2]] == [step for step in outcome.steps if step[2]]
        assert (canvas, stop) == (outcome.canvas, outcome.stop)
        assert tokens == emitted(run, outcome)
        if not run.mask_share:
            # Nor is a forward pass wasted. Where the mask token was predicted, places of earlier blocks stay open; the
            # scheduler, which sees emitted tokens only, then gives a block all its steps.
            assert steps == outcome.steps


@settings(max_examples=200, deadline=None)
@given(st.lists(runs(), min_size=1, max_size=4))
@example([Run(8, 4, 4, stop_ids=(3,), seed=1), Run(4, 4, 1, suffix=(9,))])
def test_decodes_follow_the_official_rules(batch):
    assert_official(batch)


@settings(max_examples=100, deadline=None)
@given(runs(threshold=1.0, mask_share=0.0))
def test_threshold_decodes(run):
    assert_official([run])


@settings(max_examples=100, deadline=None)
@given(runs(mask_share=0.6, threshold=None, refresh_interval=3))
def test_open_places_before_the_block_wait_for_a_refresh(run):
    assert_official([run])
    for block_start, step, committed in official(run).steps:
        assert step % 3 == 0 or all(p >= block_start for p in committed)


@settings(max_examples=50, deadline=None)
@given(st.lists(runs(), min_size=2, max_size=4))
def test_company_changes_nothing(batch):
    assert decode(batch) == [decode([run])[0] for run in batch]


def test_emission_never_shows_a_place_that_can_still_change():
    """Whatever was handed out at some time is the beginning of the end result."""
    for seed in range(200):
        rng = random.Random(seed)
        block = rng.randint(1, 5)
        run = Run(block * 3, block, rng.randint(1, block), stop_ids=(3,), mask_share=0.2, seed=seed)
        state, handed_out = fresh_canvases([run]), []
        while True:
            out = step_batch([run], state)
            handed_out += out.emitted[0, : int(out.num_emitted[0])].tolist()
            if out.finished[0]:
                break
            assert MASK not in handed_out and 3 not in handed_out
            assert handed_out == out.canvases.tokens[0, : len(handed_out)].tolist()
            state = out.canvases
        assert handed_out == emitted(run, official(run))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        self.num = max([self.num, *(x.untyped_storage().nbytes() // x.itemsize for x in made if torch.is_tensor(x))])
        return out


@pytest.mark.parametrize("num_stops", [1, 2, 4, 5, 128, 3000])
def test_stop_tokens_cost_no_more_than_their_list(num_stops):
    """Nothing as large as requests x positions x stop tokens is made; the one stop that is written is found."""
    stop_ids = (5, *range(1000, 999 + num_stops))
    batch = [Run(24, 24, 1, stop_ids=stop_ids, seed=seed) for seed in range(6)] + [Run(24, 24, 1, seed=9)]
    with LargestTensor() as largest:
        out = step_batch(batch, fresh_canvases(batch))
    assert largest.num <= max(len(batch) * 25, len(batch) * num_stops)
    assert out.canvases.stop.tolist() == [-1 if (o := official(run)).stop is None else o.stop for run in batch]
    assert (out.canvases.stop >= 0).sum() >= 4 and out.canvases.stop[-1] == -1


def test_state_is_not_changed():
    state = fresh_canvases([Run(6, 3, 2, suffix=(8,))])
    copies = {f.name: getattr(state, f.name).clone() for f in dataclasses.fields(state)}
    step_batch([Run(6, 3, 2, suffix=(8,))], state)
    for name, copy in copies.items():
        assert torch.equal(getattr(state, name), copy), name
