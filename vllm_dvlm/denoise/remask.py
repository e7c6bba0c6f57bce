"""Which masked positions a denoising step unmasks.

R = requests, C = canvas positions. Confidences are float64; higher is unmasked first, ties go to the left.
"""

from __future__ import annotations

import torch


def rank_positions(confidence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort positions by confidence, highest first, ties to the left.

    Args:
        confidence: [R, C] float64; -inf at positions that are no candidates.

    Returns:
        (sorted confidences [R, C], rank of each position [R, C] int64).
    """
    values, order = torch.sort(confidence, dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return values, ranks


def num_by_schedule(
    num_masked_at_start: torch.Tensor, steps_per_block: torch.Tensor, step_in_block: torch.Tensor
) -> torch.Tensor:
    """Positions to unmask by the uniform schedule. All [R] int64. Source: golden README point 20."""
    base = num_masked_at_start // steps_per_block
    return base + (step_in_block < num_masked_at_start % steps_per_block)


def num_by_threshold(
    sorted_confidence: torch.Tensor, num_masked: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    """Positions to unmask by the factor rule of Fast-dLLM. Source: golden README points 43 and 44.

    The n-th most confident passes if its confidence is at least 1 - f / (n + 1); the first always passes. The run
    ends at the first failure, unless that is the very last masked position, which then passes too.

    Args:
        sorted_confidence: [R, C] float64, from ``rank_positions``.
        num_masked: [R] int64, all masked positions of the request, out of bounds ones included.
        threshold: [R] float64, the factor f.

    Returns:
        [R] int64.
    """
    n = torch.arange(1, sorted_confidence.shape[1] + 1, device=sorted_confidence.device)
    passes = sorted_confidence >= 1 - threshold[:, None] / (n + 1)
    passes[:, 0] = True
    passes &= n <= num_masked[:, None]
    leading = passes.long().cumprod(dim=1).sum(dim=1)
    return torch.where(leading == num_masked - 1, num_masked, leading)
