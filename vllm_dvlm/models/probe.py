"""Attention that chosen rows pay to chosen columns, without keeping the attention matrix.

R = query rows, T = tokens of the sequence, H = query heads of this rank, D = head size, N = columns of interest.
"""

from __future__ import annotations

import torch

# Bound on the scores alive at once: heads are taken in groups.
_CHUNK_BYTES = 64 * 2**20


def attention_to_columns(
    query: torch.Tensor, key: torch.Tensor, scale: float, columns: torch.Tensor, out: torch.Tensor
) -> None:
    """Add softmax(q k^T)[columns], summed over heads, to ``out``.

    The denominator runs over the whole sequence. Twin: ``attention_to_columns_reference``.

    Args:
        query: [R, H, D] after rotary embedding.
        key: [T, H_kv, D] after rotary embedding; H is a multiple of H_kv.
        scale: factor on the scores.
        columns: [N] int64 positions in 0 .. T-1.
        out: [R, N] float32, added to.
    """
    num_rows, num_heads, _ = query.shape
    group = num_heads // key.shape[1]
    step = max(1, _CHUNK_BYTES // (4 * num_rows * key.shape[0]))
    keys = key.transpose(0, 1)
    for first in range(0, num_heads, step):
        heads = torch.arange(first, min(first + step, num_heads), device=query.device)
        scores = torch.matmul(query[:, heads].transpose(0, 1), keys[heads // group].transpose(1, 2)).float()
        scores.mul_(scale)
        denominator = torch.logsumexp(scores, dim=-1, keepdim=True)
        out += (scores.index_select(2, columns) - denominator).exp_().sum(dim=0)


def attention_to_columns_reference(
    query: torch.Tensor, key: torch.Tensor, scale: float, columns: torch.Tensor
) -> torch.Tensor:
    """Twin: the attention matrix in float64, head by head. Returns [R, N] float32."""
    group = query.shape[1] // key.shape[1]
    total = torch.zeros(query.shape[0], len(columns), dtype=torch.float64)
    for head in range(query.shape[1]):
        scores = query[:, head].double() @ key[:, head // group].double().T * scale
        total += torch.softmax(scores, dim=-1)[:, columns].cpu()
    return total.float()
