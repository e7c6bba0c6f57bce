"""Costs by count: the 8B model beside the shapes that are timed."""

import pytest

from vllm_dvlm.bench.counted import (
    LLADA_8B,
    Generation,
    Shape,
    flops,
    ideal_speedup,
    keep_ratio_for,
    prefix_speedup,
    work_shares,
)
from vllm_dvlm.synthetic.checkpoint_files import SIZES_8B

# The papers' setting, and the shape of `bench pruning`.
WORK = Generation(prompt_len=3729, num_visual=3669, canvas_len=32, num_steps=16)
BENCH = Shape(384, 6, 1152, 126464, 6, 6)


def test_ideals_depend_on_the_shape():
    """Attention grows with the square of the length, and is a smaller part of a wide model."""
    assert ideal_speedup(LLADA_8B, WORK, 0.5) == pytest.approx(1.95, abs=0.005)
    assert ideal_speedup(LLADA_8B, WORK, 0.25) == pytest.approx(3.43, abs=0.005)
    assert ideal_speedup(BENCH, WORK, 0.5) == pytest.approx(2.49, abs=0.005)
    assert ideal_speedup(BENCH, WORK, 0.25) == pytest.approx(4.92, abs=0.005)


def test_shares_of_the_work():
    wide, narrow = work_shares(LLADA_8B, WORK), work_shares(BENCH, WORK)
    assert sum(wide.values()) == pytest.approx(1) and sum(narrow.values()) == pytest.approx(1)
    assert wide["attention"] == pytest.approx(0.12, abs=0.01)
    assert narrow["attention"] > 0.5
    # The shape that stands for the 8B in the benches, on a prompt of 486, with the official loop's logits.
    small = Shape(SIZES_8B.hidden, SIZES_8B.layers, SIZES_8B.intermediate, SIZES_8B.vocab_rows, 8, 8)
    there = work_shares(LLADA_8B, WORK, every_position=True)
    here = work_shares(small, Generation(486, 423, 32, 16), every_position=True)
    for part in there:
        assert here[part] == pytest.approx(there[part], abs=0.02), part
    assert there["logits"] > wide["logits"]


def test_keep_ratio_for_a_saving():
    ours, theirs = (keep_ratio_for(c, WORK, 0.65, c.num_hidden_layers // 2) for c in (BENCH, LLADA_8B))
    assert ours == 0.46 and 0.33 <= theirs <= 0.35
    whole = flops(LLADA_8B, WORK)
    assert flops(LLADA_8B, WORK, theirs, 16) <= 0.35 * whole < flops(LLADA_8B, WORK, theirs + 0.01, 16)


def test_nothing_pruned_is_nothing_saved():
    assert ideal_speedup(LLADA_8B, WORK, 1.0) == 1


def test_a_prompt_that_is_computed_once():
    """LaViDa's settings: what is left is the prompt once and the canvas in every step."""
    work = Generation(prompt_len=1068, num_visual=1008, canvas_len=64, num_steps=32)
    rows = (32 * (1068 + 64)) / (1068 + 32 * 64)
    assert prefix_speedup(LLADA_8B, work) == pytest.approx(rows, rel=0.05)
    assert prefix_speedup(LLADA_8B, Generation(1068, 1008, 64, 1)) == pytest.approx(1, abs=0.05)
    # Vocabulary logits are the same on both sides, and most of what a narrow model does.
    assert prefix_speedup(Shape(64, 4, 128, 126464, 4, 4), work) < rows / 2
