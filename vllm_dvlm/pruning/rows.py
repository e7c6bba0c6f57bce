"""Mean attention over a choice of query rows, shared by the methods that read attention."""

from __future__ import annotations

import torch

from vllm_dvlm.pruning.base import StepView


def mean_over_rows(view: StepView, rows: str) -> torch.Tensor:
    """Mean attention that visual tokens get from the chosen rows. [N] float32.

    Args:
        view: the step.
        rows: 'masked', 'committed', 'response_prompt', 'all' or 'last' (see ``names.ROWS``). Without any such row
            the result is zero everywhere.
    """
    attention = view.attention
    if rows == "last":
        return attention[-1]
    if rows in ("masked", "committed"):
        chosen = view.is_masked if rows == "masked" else view.is_committed
        weight = chosen.to(attention.dtype)
        # No host round trip to learn whether there is a row at all.
        return (weight @ attention) / weight.sum().clamp(min=1)
    total = attention.sum(dim=0) + view.prompt_attention
    count = attention.shape[0] + view.num_prompt_rows
    if rows == "all":
        total = total + view.visual_attention
        count += attention.shape[1]
    return total / count
