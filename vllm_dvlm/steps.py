"""Span, count and block arithmetic that scheduler and worker must agree on.

Both sides run these functions on the same integers, so they never have to tell each other where a request stands.
Nothing but the standard library is imported here.

Coordinates of one request: ``[prompt | canvas | suffix]``. *Canvas positions* count from the start of the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisualSpan:
    """Half-open token range ``[start, end)`` of one image in the merged prompt."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


def pruned_prompt_len(prompt_len: int, num_visual: int, keep_ratio: float) -> int:
    """Tokens of the prompt once ``num_kept`` of its visual tokens are left."""
    return prompt_len - num_visual + num_kept(num_visual, keep_ratio)


def cdiv(a: int, b: int) -> int:
    """Smallest integer not below ``a / b``."""
    return -(-a // b)


def num_kept(num_visual: int, keep_ratio: float) -> int:
    """Visual tokens that survive pruning; rounding as in RedVTP (goldens README, point 34)."""
    return max(1, int(num_visual * keep_ratio))


def round_up(value: int, multiple: int) -> int:
    """``value`` rounded up to a whole multiple."""
    return cdiv(value, multiple) * multiple


def is_refresh(step_in_block: int, refresh_interval: int) -> bool:
    """True if this denoising step recomputes the whole sequence (goldens README, points 39 and 41)."""
    return step_in_block % refresh_interval == 0


@dataclass(frozen=True)
class Position:
    """Where a request stands between two denoising steps.

    block_start: first canvas position of the current block.
    step_in_block: denoising steps already made in it.
    num_emitted: canvas positions already handed to the user (the unmasked prefix).
    """

    block_start: int = 0
    step_in_block: int = 0
    num_emitted: int = 0


@dataclass(frozen=True)
class Plan:
    """What of a request's settings decides the course of its steps; constant over its life.

    steps_per_block is None in threshold mode, where a block runs until nothing in it is masked.
    caches_prompt: the prompt attends to itself only, so its KV is computed once, in the first forward pass.
    first_block_start: canvas position of the first block in which anything is masked, where a draft has filled others.
    row_offset: the row of a position's logits lies this many tokens before the position.
    first_token_from_prompt: the first step reads the prompt's last row alone and writes canvas position 0.
    """

    prompt_len: int
    canvas_len: int
    suffix_len: int
    block_len: int
    steps_per_block: int | None
    refresh_interval: int
    caches_prompt: bool = False
    first_block_start: int = 0
    row_offset: int = 0
    first_token_from_prompt: bool = False

    @property
    def start(self) -> Position:
        """Where the request begins."""
        return Position(block_start=self.first_block_start)

    @property
    def keeps_kv(self) -> bool:
        """True if a step reads KV that an earlier one has written."""
        return self.caches_prompt or self.refresh_interval > 1

    @property
    def total_len(self) -> int:
        """Tokens of prompt, canvas and suffix."""
        return self.prompt_len + self.canvas_len + self.suffix_len


def advance(plan: Plan, before: Position, num_new_tokens: int) -> Position:
    """Position after a denoising step that emitted ``num_new_tokens`` and did not finish the request.

    A block ends when its schedule is used up or everything up to its end is emitted. A block that is already
    complete when its turn comes takes no step (goldens README, point 21).
    """
    num_emitted = before.num_emitted + num_new_tokens
    step_in_block = before.step_in_block + 1
    block_end = before.block_start + plan.block_len
    used_up = plan.steps_per_block is not None and step_in_block >= plan.steps_per_block
    if num_emitted < block_end and not used_up:
        return Position(before.block_start, step_in_block, num_emitted)
    complete = num_emitted // plan.block_len * plan.block_len
    return Position(max(block_end, complete), 0, num_emitted)


@dataclass(frozen=True)
class Step:
    """What one denoising step computes and attends to, in request coordinates.

    query_start / query_end: tokens computed, half-open.
    kv_len: tokens attended to, from the first one on.
    is_refresh: True if the whole sequence is recomputed.
    """

    query_start: int
    query_end: int
    kv_len: int
    is_refresh: bool

    @property
    def query_len(self) -> int:
        """Tokens computed."""
        return self.query_end - self.query_start


def step_at(plan: Plan, position: Position) -> Step:
    """The step that a request at ``position`` makes next: everything at a refresh, else from the block's start on.

    Behind a prompt that is computed once it is the whole canvas. Where nothing of the request is in the KV cache, which
    is so before its first step and after a preemption, the pass computes the prompt as well.
    """
    total = plan.total_len
    if plan.caches_prompt:
        return Step(plan.prompt_len, total, total, is_refresh=False)
    if is_refresh(position.step_in_block, plan.refresh_interval):
        return Step(0, total, total, is_refresh=True)
    return Step(plan.prompt_len + position.block_start, total, total, is_refresh=False)


def restart_position(plan: Plan, num_emitted: int) -> Position:
    """Where a request goes on of which only the emitted tokens are known: at the start of the first open block.

    Tokens of the block that were written and not yet emitted are written anew, with all the block's steps.
    """
    start = max(plan.first_block_start, num_emitted // plan.block_len * plan.block_len)
    return Position(start, 0, num_emitted)


@dataclass(frozen=True)
class Resume:
    """What the scheduler tells the worker of a preempted request that comes back.

    position: where it stands. restarts: the worker has said that it does not know the request any more, so the canvas
    is made anew from the emitted tokens, and a request that was pruned is whole again.
    """

    position: Position
    restarts: bool = False

    def to_list(self) -> list[int]:
        """As plain numbers, for the way between processes."""
        return [self.position.block_start, self.position.step_in_block, self.position.num_emitted, int(self.restarts)]

    @classmethod
    def from_list(cls, numbers: list[int]) -> Resume:
        """Inverse of ``to_list``."""
        return cls(Position(*numbers[:3]), bool(numbers[3]))


# What the worker reports, instead of microseconds of pruning, for a request that it does not know any more.
LOST = -1


def num_scheduled_steps(num_masked: int, steps_per_block: int) -> list[int]:
    """How many positions each step of a block unmasks: ``m // n``, one more in the first ``m % n`` steps (point 20)."""
    base, extra = divmod(num_masked, steps_per_block)
    return [base + (i < extra) for i in range(steps_per_block)]


def forward_flops(config: object, query_len: int, kv_len: int, num_layers: int | None = None) -> int:
    """Floating point operations of the text layers for ``query_len`` tokens that attend to ``kv_len``.

    Per layer with width d and gated MLP width m: projections 4 n d^2, attention 2 n t d, MLP 3 n d m (the formula of
    LLaDA-FastV with a gated MLP and with real lengths; as there, a multiply-add counts once). Grouped KV heads make
    the key and value projections narrower.

    Args:
        config: the checkpoint's config (hidden_size, num_hidden_layers, ...).
        query_len: tokens computed, n.
        kv_len: tokens attended to, t.
        num_layers: layers to count; None for all.
    """
    d, m = config.hidden_size, config.intermediate_size  # type: ignore[attr-defined]
    kv_share = config.num_key_value_heads / config.num_attention_heads  # type: ignore[attr-defined]
    per_token = (2 + 2 * kv_share) * d * d + 2 * kv_len * d + 3 * d * m
    layers = config.num_hidden_layers if num_layers is None else num_layers  # type: ignore[attr-defined]
    return int(layers * query_len * per_token)


def step_flops(config: object, plan: Plan, query_len: int, pruned_plan: Plan | None, layer: int | None) -> int:
    """Floating point operations of one denoising step.

    Args:
        config: the checkpoint's config.
        plan: the course of the request as the step begins.
        query_len: tokens computed.
        pruned_plan: its course once pruned, in the step that prunes; else None.
        layer: layers that run before the request is shortened inside the step; None if it is shortened after it.
    """
    if pruned_plan is None or layer is None:
        return _rows_flops(config, plan, query_len, None)
    rest = config.num_hidden_layers - layer  # type: ignore[attr-defined]
    short = pruned_plan.total_len
    return _rows_flops(config, plan, query_len, layer) + _rows_flops(config, pruned_plan, short, rest)


def _rows_flops(config: object, plan: Plan, query_len: int, num_layers: int | None) -> int:
    """``forward_flops`` of the attention rows of a step."""
    if not plan.caches_prompt or query_len < plan.total_len:
        return forward_flops(config, query_len, plan.total_len, num_layers)
    prompt = forward_flops(config, plan.prompt_len, plan.prompt_len, num_layers)
    return prompt + forward_flops(config, plan.total_len - plan.prompt_len, plan.total_len, num_layers)


def steps_per_block(
    canvas_len: int, block_len: int, max_steps: int | None = None, step_ratio: float | None = None
) -> int:
    """Steps of each block of a canvas that is decoded block by block.

    Args:
        max_steps: steps of all blocks together; None: one per position.
        step_ratio: share of the steps that is taken, (0, 1].

    Raises:
        ValueError: lengths that do not divide, or no step is left.
    """
    if block_len < 1 or canvas_len % block_len:
        raise ValueError(f"The block length {block_len} does not divide the canvas length {canvas_len}.")
    blocks = canvas_len // block_len
    steps = canvas_len if max_steps is None else max_steps
    if steps % blocks:
        raise ValueError(f"{steps} steps cannot be spread over {blocks} blocks: use a multiple of {blocks}.")
    return _shortened(steps // blocks, step_ratio)


def steps_on_grid(canvas_len: int, max_steps: int | None = None, step_ratio: float | None = None) -> tuple[int, int]:
    """(intervals of the time grid, steps taken) of a canvas that is decoded as a whole.

    Args:
        max_steps: intervals wanted; at most one per position, which is the default.
        step_ratio: steps taken as a share of the canvas length, not of the grid, (0, 1]; None: the whole grid.

    Raises:
        ValueError: no step is left, or the grid has fewer.
    """
    grid = canvas_len if max_steps is None else min(max_steps, canvas_len)
    if step_ratio is None:
        return grid, _shortened(grid, None)
    steps = _shortened(canvas_len, step_ratio)
    if steps > grid:
        raise ValueError(
            f"A step ratio of {step_ratio} takes {steps} steps for {canvas_len} positions, the grid has {grid}: "
            "raise the number of steps or lower the ratio."
        )
    return grid, steps


def _shortened(num_steps: int, step_ratio: float | None) -> int:
    if step_ratio is not None and not 0 < step_ratio <= 1:
        raise ValueError(f"The step ratio must be in (0, 1], not {step_ratio}.")
    left = num_steps if step_ratio is None else int(num_steps * step_ratio)
    if left < 1:
        raise ValueError(f"No step is left of {num_steps} at step ratio {step_ratio}: raise one of them.")
    return left
