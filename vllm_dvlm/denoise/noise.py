"""Random numbers that are a function of (seed, step, position, column) and of nothing else.

So neither chunks of rows, nor the batch, nor a preemption, nor the device changes a request's noise, and no row waits
for another. The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a row is a stream of its own, whose state
is a counter, so that element ``i`` is computed without those before it.

N = rows (masked canvas positions).
"""

from __future__ import annotations

import torch

_GAMMA = 0x9E3779B97F4A7C15
# (shift, factor) of the rounds that mix a counter; the last one only shifts.
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def _signed(number: int) -> int:
    """The same 64 bits as a signed number, as torch has them."""
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number


def _mix_(x: torch.Tensor) -> torch.Tensor:
    """Mix 64-bit counters, in place. int64; products wrap around."""
    for shift, factor in _ROUNDS:
        # torch shifts the sign in from the left; the generator shifts zeros.
        x ^= (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        if factor != 1:
            x *= _signed(factor)
    return x


def _mixed(number: int) -> int:
    """``_mix_`` of one number on the host."""
    number %= 2**64
    for shift, factor in _ROUNDS:
        number = (number ^ number >> shift) * factor % 2**64
    return number


def row_keys(seed: int, step: int, positions: torch.Tensor) -> torch.Tensor:
    """Where the stream of each row begins.

    Args:
        seed: of the request, any integer.
        step: denoising step of the request, from 0.
        positions: [N] int64 canvas positions.

    Returns:
        [N] int64, on the device of ``positions``.
    """
    key = _mixed(_mixed(seed + _GAMMA) + step + _GAMMA)
    return _mix_(positions * _signed(_GAMMA) + _signed(key))


def uniform(keys: torch.Tensor, first: int, num: int) -> torch.Tensor:
    """Numbers in (0, 1), neither end included, of columns ``first`` to ``first + num``. [N, num] float64.

    keys: [N] int64, from ``row_keys``.
    """
    columns = torch.arange(first + 1, first + num + 1, device=keys.device).mul_(_signed(_GAMMA))
    x = _mix_(keys[:, None] + columns)
    # The upper 53 bits, which a float64 holds exactly, in the middle of their interval.
    return (x >> 11).bitwise_and_(2**53 - 1).double().add_(0.5).mul_(2.0**-53)
