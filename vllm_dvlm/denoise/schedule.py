"""How many positions each denoising step unmasks: tables made once on the host.

A schedule is a rising curve from 0 to 1 over the steps; its name and, for "shift", its parameter come from the request.
Everything is float32 and truncated, as in the reference: one unit in the last place decides some entries (golden
README of LaViDa, "Schedules" and "LaViDa-Dream").
"""

# M = masked positions, S = steps.

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dvlm.steps import steps_on_grid, steps_per_block

if TYPE_CHECKING:
    from vllm_dvlm.placement import ResolvedParams

__all__ = ["counts_per_step", "counts_table", "grid_table", "steps_on_grid", "steps_per_block"]

DEFAULT_SHIFT = 3.0
# Last value of the descending grid of `grid_table`: time never reaches 0.
_LAST_TIME = 1e-3


def _shift(t: torch.Tensor, shift: float) -> torch.Tensor:
    return shift * t / (1 + (shift - 1) * t)


def _cosine(t: torch.Tensor, shift: float) -> torch.Tensor:
    return 1 - (1 + torch.cos(torch.pi * t)) / 2


def _logit_normal(t: torch.Tensor, shift: float) -> torch.Tensor:
    # log of 0 and of 1 / 0 are infinite, and the normal CDF of that is 0 and 1.
    return (1 + torch.erf(torch.log(t / (1 - t)) / 2**0.5)) / 2


_CURVES = {
    "linear": lambda t, shift: t,
    "shift": _shift,
    "cosine": _cosine,
    "logit_normal": _logit_normal,
}
SCHEDULES = ("uniform", *_CURVES)


def counts_per_step(
    num_masked: int, num_steps: int, schedule: str = "uniform", shift: float | None = None
) -> list[int]:
    """Positions to unmask in each step of a block, in the order of the steps.

    Args:
        num_masked: masked positions when the block begins.
        num_steps: at least 1.
        schedule: one of SCHEDULES. "uniform" spreads evenly, the remainder over the first steps; more steps than masks
            leave zeros at the end. The others unmask at least one position per step, so they have at most `num_masked`
            steps; of a curve, the last rise comes first.
        shift: of "shift": below 1 unmasks many positions early, above 1 late; None is 3.

    Returns:
        At most `num_steps` numbers that sum to `num_masked`.

    Raises:
        ValueError: unknown schedule, no step, a shift of 0 or below, or a shift for another schedule.
    """
    check_schedule(schedule, shift)
    if num_steps < 1 or num_masked < 0:
        raise ValueError(f"{num_steps} steps for {num_masked} masked positions: at least one step is needed.")
    if schedule == "uniform":
        each, more = divmod(num_masked, num_steps)
        return [each + (i < more) for i in range(num_steps)]
    if num_masked == 0:
        return []
    num_steps = min(num_steps, num_masked)
    curve = _CURVES[schedule](torch.linspace(0, 1, num_steps + 1), DEFAULT_SHIFT if shift is None else shift)
    counts = (curve * num_masked).to(torch.int64).diff().clamp(min=1).tolist()
    excess, i = sum(counts) - num_masked, 0
    while excess > 0:  # one from each in turn, but never the last one
        if counts[i] > 1:
            counts[i] -= 1
            excess -= 1
        i = (i + 1) % num_steps
    return counts[::-1]


_cached_counts = lru_cache(maxsize=4096)(lambda *key: tuple(counts_per_step(*key)))


def planned_count(
    params: ResolvedParams, num_steps: int, step: int, num_at_start: int, num_masked: int, is_first_known: bool = False
) -> int:
    """Positions that a step of a block unmasks.

    Args:
        params: name the schedule, or the time grid.
        num_steps: steps of the block, at most.
        step: of them, from 0.
        num_at_start, num_masked: masked positions of the block when it began, and now.
        is_first_known: the canvas began with its first token, that of a request that has restarted.
    """
    options = params.options
    if params.first_token_from_prompt:  # a step of its own, before those of the schedule
        if step == 0:
            return 1
        num_steps, step, num_at_start = num_steps - 1, step - 1, num_at_start - (not is_first_known)
    if params.grid_steps is not None and options.diffusion_schedule == "uniform":
        return int(grid_table(params.block_len, params.grid_steps, num_steps)[num_masked, step])
    counts = _cached_counts(num_at_start, num_steps, options.diffusion_schedule, options.diffusion_schedule_shift)
    return counts[step] if step < len(counts) else 0


def check_schedule(schedule: str, shift: float | None) -> None:
    """Raise ValueError unless `counts_per_step` knows the schedule and takes the shift."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown: use one of {', '.join(SCHEDULES)}.")
    if shift is not None and schedule != "shift":
        raise ValueError(f"A shift of {shift} needs schedule='shift', not {schedule!r}.")
    if shift is not None and not 0 < shift < float("inf"):
        raise ValueError(f"The shift of a schedule must be a positive number, not {shift}.")


@lru_cache(maxsize=256)
def counts_table(max_masked: int, num_steps: int, schedule: str = "uniform", shift: float | None = None) -> np.ndarray:
    """`counts_per_step` for every number of masks: row m for a block that began with m masked positions.

    Returns:
        [max_masked + 1, num_steps] int32, read-only, 0 behind the last step. Errors as `counts_per_step`.
    """
    table = np.zeros((max_masked + 1, num_steps), np.int32)
    for num_masked in range(max_masked + 1):
        counts = counts_per_step(num_masked, num_steps, schedule, shift)
        table[num_masked, : len(counts)] = counts
    table.flags.writeable = False
    return table


@lru_cache(maxsize=256)
def grid_table(max_masked: int, grid_steps: int, num_steps: int) -> np.ndarray:
    """Counts of a decoder that follows a time grid: row m for a step that finds m masked positions.

    Of the masked positions a step from time t to s unmasks the share 1 - s / t, rounded down, so early steps may
    unmask none; the last step unmasks all that are left.

    Args:
        grid_steps: intervals of the grid from 1 to 0.001.
        num_steps: steps taken, at most `grid_steps`: a shortened loop ends early on the same grid.

    Returns:
        [max_masked + 1, num_steps] int32, read-only.

    Raises:
        ValueError: no step, or more steps than the grid has.
    """
    if not 1 <= num_steps <= grid_steps:
        raise ValueError(f"{num_steps} steps on a grid of {grid_steps}: take at least one and at most all.")
    times = torch.linspace(1, _LAST_TIME, grid_steps + 1)[: num_steps + 1]
    share = 1 - times[1:] / times[:-1]
    masked = torch.arange(max_masked + 1)
    table = (masked[:, None].float() * share).to(torch.int32)
    table[:, -1] = masked
    numbers = table.numpy()
    numbers.flags.writeable = False
    return numbers
