"""Importance and keep count to kept indices: the only top-k on importance."""

from __future__ import annotations

import torch


def select(importance: torch.Tensor, keep_count: int) -> torch.Tensor:
    """Indices of the ``keep_count`` most important visual tokens, ascending.

    Ties go to the lower index. Several images of a request are ranked together. Source: golden README point 34.

    Args:
        importance: [N] float32.
        keep_count: 1 .. N, from ``steps.num_kept``.

    Returns:
        [keep_count] int64.
    """
    # topk breaks ties arbitrarily; a stable sort keeps the order of equals.
    order = torch.sort(importance, descending=True, stable=True).indices
    return order[:keep_count].sort().values


def kept_prompt_rows(prompt_len: int, visual: torch.Tensor, kept: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Prompt positions that survive, ascending: all text, and the kept visual tokens.

    Args:
        prompt_len: tokens of the prompt, for the check of the parts' sizes.
        visual: [N] int64 prompt positions of the visual tokens.
        kept: [K] int64 indices into ``visual``.
        text: [prompt_len - N] int64 prompt positions of everything else.

    Returns:
        [prompt_len - N + K] int64.
    """
    assert len(visual) + len(text) == prompt_len, "visual and text positions do not make up the prompt"
    return torch.cat([text, visual[kept]]).sort().values
