"""Noise as a function of its place."""

import numpy as np
import torch

from vllm_dvlm.denoise.noise import _mix_, _mixed, row_keys, uniform


def test_the_generator_is_splitmix64():
    """Known first outputs of the generator seeded with 0."""
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert uniform(torch.zeros(1, dtype=torch.int64), 0, 3)[0].tolist() == [(x >> 11) / 2**53 + 2**-54 for x in outputs]


def test_host_and_device_mix_alike():
    numbers = [0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0]
    signed = torch.tensor([n - 2**64 if n >= 2**63 else n for n in numbers])
    assert [int(x) % 2**64 for x in _mix_(signed)] == [_mixed(n) for n in numbers]


def test_columns_are_those_of_a_longer_draw():
    keys = row_keys(3, 4, torch.arange(5))
    assert torch.equal(uniform(keys, 7, 20), uniform(keys, 0, 50)[:, 7:27])


def test_numbers_are_uniform_and_rows_independent():
    drawn = uniform(row_keys(-1, 2, torch.arange(64)), 0, 4096)
    assert drawn.min() > 0 and drawn.max() < 1
    # The mean of each has a deviation of 0.29 / sqrt(n); five of them.
    assert (drawn.mean(1) - 0.5).abs().max() < 5 * 0.29 / 64
    assert (drawn.mean(0) - 0.5).abs().max() < 5 * 0.29 / 8
    counts = np.histogram(drawn.numpy(), bins=64, range=(0, 1))[0]
    expected = drawn.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5
    correlation = torch.corrcoef(drawn) - torch.eye(64)
    assert correlation.abs().max() < 5.5 / 64


def test_keys_do_not_collide():
    keys = [row_keys(seed, step, torch.arange(100)) for seed in (0, 1, 2**40) for step in range(20)]
    assert len(torch.cat(keys).unique()) == 3 * 20 * 100
    assert torch.equal(row_keys(2**63 + 5, 0, torch.arange(2)), row_keys(5 - 2**63, 0, torch.arange(2)))
