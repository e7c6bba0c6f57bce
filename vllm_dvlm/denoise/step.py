"""One denoising step of a batch of canvases, on the device, without a host round trip.

R = requests of the batch, C = widest canvas (suffix included), K = most stop tokens of one request.
All integers are int64. Source of the rules: golden README points 18 to 31 and 38 to 45.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_dvlm.denoise.remask import num_by_schedule, num_by_threshold, rank_positions


@dataclass
class Canvases:
    """State of the requests of one batch; ``take_step`` returns the next.

    Rows of ``tokens`` are [canvas | suffix | unused]. ``suffix_len`` counts the suffix tokens to be handed out: 0 also
    where the reply ends inside the canvas. ``stop`` is the canvas position of the leftmost stop token, -1 without one.
    ``num_masked_at_start`` is the number of masked positions of the current block when it began.
    """

    tokens: torch.Tensor  # [R, C]
    canvas_len: torch.Tensor  # [R]
    suffix_len: torch.Tensor  # [R]
    prompt_len: torch.Tensor  # [R]
    block_len: torch.Tensor  # [R]
    steps_per_block: torch.Tensor  # [R], 0 in threshold mode
    refresh_interval: torch.Tensor  # [R]
    block_start: torch.Tensor  # [R]
    step_in_block: torch.Tensor  # [R]
    num_emitted: torch.Tensor  # [R]
    stop: torch.Tensor  # [R]
    num_masked_at_start: torch.Tensor  # [R]
    caches_prompt: torch.Tensor  # [R], 1 where the prompt is computed once and steps compute the canvas alone


@dataclass
class StepOutput:
    """What a step changed.

    emitted: [R, C + 1] tokens for the user, row r valid up to ``num_emitted[r]``.
    committed: [R, C] bool, positions written in this step.
    next_start: [R] first token, in request coordinates, that the next step computes; 0 for a finished request.
    """

    canvases: Canvases
    emitted: torch.Tensor
    num_emitted: torch.Tensor
    committed: torch.Tensor
    next_start: torch.Tensor
    finished: torch.Tensor


def candidates(state: Canvases, mask_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked positions among those computed in this step, and those it may unmask (point 26). Two [R, C] bool.

    A cached step computes nothing before its block, so positions left masked there wait for a refresh (point 40).
    """
    pos = torch.arange(state.tokens.shape[1], device=state.tokens.device)
    refresh = state.step_in_block % state.refresh_interval == 0
    computed = (pos >= torch.where(refresh, 0, state.block_start)[:, None]) & (pos < state.canvas_len[:, None])
    masked = (state.tokens == mask_token_id) & computed
    limit = torch.where(state.stop >= 0, state.stop, state.block_start + state.block_len)
    return masked, masked & (pos < limit[:, None])


def take_step(
    state: Canvases,
    proposed: torch.Tensor,
    confidence: torch.Tensor,
    threshold: torch.Tensor,
    stop_token_ids: torch.Tensor,
    mask_token_id: int,
    planned: torch.Tensor | None = None,
) -> StepOutput:
    """Unmask, look for stops, move on to the next block, say what is emitted.

    Args:
        state: the canvases before the step; not changed.
        proposed: [R, C] token per position; read at masked positions only.
        confidence: [R, C] float64 of the proposed token; read at candidates only.
        threshold: [R] float64 factor of the threshold rule, nan for requests that follow the schedule.
        stop_token_ids: [R, K], ascending, padded with -1 in front.
        mask_token_id: a position that holds it is masked, also when the model predicted it (point 24).
        planned: [R] positions to unmask by a schedule that is not uniform, -1 for the others; None: all others.
    """
    pos = torch.arange(state.tokens.shape[1], device=state.tokens.device)
    block_end = state.block_start + state.block_len
    masked, candidate = candidates(state, mask_token_id)
    in_block = (pos >= state.block_start[:, None]) & (pos < block_end[:, None])
    at_start = torch.where(state.step_in_block == 0, (masked & in_block).sum(1), state.num_masked_at_start)

    by_threshold = ~threshold.isnan()
    values, ranks = rank_positions(confidence.masked_fill(~candidate, float("-inf")))
    scheduled = num_by_schedule(at_start, state.steps_per_block.clamp(min=1), state.step_in_block)
    if planned is not None:
        scheduled = torch.where(planned >= 0, planned, scheduled)
    count = torch.where(
        by_threshold,
        num_by_threshold(values, masked.sum(1), threshold.nan_to_num(1.0)),
        scheduled,
    )
    # The count may exceed the candidates; the reference then fills up with arbitrary positions of confidence -inf,
    # none of which shows in its results (points 27 and 44).
    committed = candidate & (ranks < count[:, None])
    tokens = torch.where(committed, proposed, state.tokens)

    in_canvas = pos < state.canvas_len[:, None]
    still_masked = (tokens == mask_token_id) & in_canvas
    # Written once, a position is never written again, and nothing behind a stop is: a new stop lies before the old one.
    stop = _first(_is_in(proposed, stop_token_ids) & committed, state.stop)
    prefix = torch.minimum(_first(still_masked, tokens.shape[1]), state.canvas_len)

    # The scheduler follows the same rule with the same numbers: steps.advance.
    step = state.step_in_block + 1
    used_up = (step >= state.steps_per_block) & ~by_threshold
    limit = torch.where(stop >= 0, stop, state.canvas_len)
    upto = torch.minimum(prefix, limit)
    moves_on = (upto >= block_end) | used_up
    block_start = torch.where(
        moves_on, torch.maximum(block_end, upto // state.block_len * state.block_len), state.block_start
    )
    # A finished canvas hands out everything up to its end or stop, places that are still masked included.
    finished = (prefix >= limit) | (moves_on & (block_start >= limit))
    upto = torch.where(finished, limit, upto)
    emitted, num_new = _emission(state, tokens, stop, upto, finished)

    step = torch.where(moves_on, 0, step)
    refresh = step % state.refresh_interval == 0
    first = torch.where(refresh, state.caches_prompt * state.prompt_len, state.prompt_len + block_start)
    next_start = torch.where(finished, 0, first)
    after = Canvases(
        tokens,
        state.canvas_len,
        state.suffix_len,
        state.prompt_len,
        state.block_len,
        state.steps_per_block,
        state.refresh_interval,
        block_start,
        step,
        upto,
        stop,
        at_start,
        state.caches_prompt,
    )
    return StepOutput(after, emitted, num_new, committed, next_start, finished)


# Columns that are cheaper to compare one by one than to search (CPU, 1 to 256 requests).
_FEW_STOPS = 4


def _is_in(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Whether each token is one of its row's ids, without a tensor over tokens and ids together. [R, C] bool.

    tokens: [R, C]; ids: [R, K], ascending.
    """
    num = ids.shape[1]
    if num > _FEW_STOPS:
        place = torch.searchsorted(ids, tokens).clamp_(max=num - 1)
        return ids.gather(1, place) == tokens
    found = tokens == ids[:, :1]
    for k in range(1, num):
        found |= tokens == ids[:, k : k + 1]
    return found


def _first(flags: torch.Tensor, default: int | torch.Tensor) -> torch.Tensor:
    """Index of the first True per row, ``default`` (a number or [R]) without one. [R, C] bool -> [R]."""
    return torch.where(flags.any(1), flags.long().argmax(1), default)


def _emission(
    state: Canvases, tokens: torch.Tensor, stop: torch.Tensor, upto: torch.Tensor, finished: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [num_emitted, upto) of the canvas; at the end also the suffix and then the stop token (point 30).

    The stop token comes last, behind the suffix: vLLM ends the request at the token it sees, and the reference's
    result is the canvas before the stop followed by the suffix.
    """
    width = tokens.shape[1] + 1
    rest = upto - state.num_emitted
    offset = torch.arange(width, device=tokens.device) - rest[:, None]
    has_stop = finished & (stop >= 0)
    suffix = torch.where(finished, state.suffix_len, 0)[:, None]
    source = torch.where(offset < 0, upto[:, None] + offset, state.canvas_len[:, None] + offset)
    source = torch.where(offset == suffix, stop[:, None], source)
    emitted = tokens.gather(1, source.clamp(0, tokens.shape[1] - 1))
    return emitted, rest + suffix[:, 0] + has_stop
