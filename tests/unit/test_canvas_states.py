"""Integers of request slots, on the device and in their mirror on the host."""

import dataclasses

import numpy as np
import pytest
import torch

from vllm_dvlm.denoise.step import Canvases
from vllm_dvlm.worker.states import FIELDS, NUM_FIELDS, CanvasStates

SLOTS, WIDTH = 9, 7


def changed(states, req_idx, width, by):
    canvases = states.gather(torch.tensor(req_idx), width)
    return Canvases(**{f.name: getattr(canvases, f.name) + by for f in dataclasses.fields(Canvases)})


@pytest.fixture(params=[False, True], ids=["shared", "apart"])
def states(request):
    states = CanvasStates(SLOTS, WIDTH, torch.device("cpu"), request.param)
    numbers = np.random.default_rng(0).integers(0, 100, (SLOTS, NUM_FIELDS + WIDTH))
    for index, row in enumerate(numbers):
        states.restore(index, row, None)
    states.numbers = numbers
    return states


def test_the_mirror_follows_every_step(states):
    expected = states.numbers.copy()
    for req_idx, width, by in (([3, 1, 8], 5, 1), ([1], 7, 10), ([0, 8], 2, 100)):
        states.scatter(torch.tensor(req_idx), req_idx, changed(states, req_idx, width, by))
        expected[req_idx, : NUM_FIELDS + width] += by
        assert np.array_equal(states.rows.numpy(), expected)
        assert np.array_equal(states.mirror_np, expected)


def test_steps_that_nobody_reads_between(states):
    expected = states.numbers.copy()
    for req_idx in ([2, 4], [4, 5]):
        states.scatter(torch.tensor(req_idx), req_idx, changed(states, req_idx, WIDTH, 1))
        expected[req_idx] += 1
    assert np.array_equal(states.mirror_np, expected)


def test_a_slot_that_is_taken_again_before_its_last_step_was_read(states):
    states.scatter(torch.tensor([2, 4]), [2, 4], changed(states, [2, 4], WIDTH, 1))
    row = np.full(NUM_FIELDS + WIDTH, 77)
    states.restore(4, row, 0.5)
    assert states.tokens_np(4).tolist() == [77] * WIDTH and states.rows[4].tolist() == row.tolist()
    assert states.snapshot(2).tolist() == (states.numbers[2] + 1).tolist()
    assert states.threshold[4] == 0.5


def test_what_travels_is_the_batch_and_not_the_table():
    states = CanvasStates(1024, 511, torch.device("cpu"), True)
    req_idx = list(range(32))
    states.scatter(torch.tensor(req_idx), req_idx, changed(states, req_idx, 64, 0))
    _, rows = states._arriving
    assert rows.numel() == 32 * (len(FIELDS) + 64)
