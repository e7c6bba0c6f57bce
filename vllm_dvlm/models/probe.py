"""Attention that chosen rows pay to chosen columns, without keeping the attention matrix.

R = query rows, T = tokens of the sequence, H = query heads of this rank, D = head size, N = columns of interest.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton


def attention_to_columns(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    columns: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """Add softmax(q k^T)[columns], summed over heads, to ``out``.

    The denominator runs over the whole sequence. Twin: ``attention_to_columns_reference``.

    Args:
        query: [R, H, D] after rotary embedding.
        key: [T, H_kv, D] after rotary embedding; H is a multiple of H_kv.
        scale: factor on the scores.
        columns: [N] int64 positions in 0 .. T-1.
        out: [R, N] float32, added to.
        lse: [R, H] logarithm of the denominators, where the attention that ran has them; None: they are computed.
    """
    if query.is_cuda:
        attention_to_columns_triton(query, key, scale, columns, out, lse)
        return
    group = query.shape[1] // key.shape[1]
    # Head by head: one head's scores stay in the cache, all heads' at once took 1.6 times as long. In float32 whatever
    # the model's dtype: bfloat16 scores would be off by percents.
    if lse is not None:
        for head in range(query.shape[1]):
            keys = key[:, head // group].index_select(0, columns).float()
            scores = (query[:, head].float() * scale) @ keys.T
            out += scores.sub_(lse[:, head, None]).exp_()
        return
    total = torch.zeros(query.shape[0], key.shape[0], dtype=torch.float32, device=query.device)
    for head in range(query.shape[1]):
        scores = (query[:, head].float() * scale) @ key[:, head // group].float().T
        total += torch.softmax(scores, dim=-1)
    # Columns are taken after the sum over heads: few rows to pick from.
    out += total.index_select(1, columns)


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


@triton.jit
def _load_rows(base, stride, rows, row_mask, dims, dim_mask):
    """[rows, dims] of a matrix with unit stride in its last dimension."""
    return tl.load(base + rows[:, None] * stride + dims[None, :], mask=row_mask[:, None] & dim_mask[None, :], other=0.0)


@triton.jit
def _denominator_kernel(
    query, key, lse, scale, num_rows, num_tokens, q_row, q_head, k_row, k_head, group,
    HEAD: tl.constexpr, HEAD_PADDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """lse[head, row] = log of the sum over all tokens of exp(score). One program per head and block of rows."""
    head = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, HEAD_PADDED)
    q = _load_rows(query + head * q_head, q_row, rows, rows < num_rows, dims, dims < HEAD)
    best = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, num_tokens, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        k = _load_rows(key + (head // group) * k_head, k_row, tokens, tokens < num_tokens, dims, dims < HEAD)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((tokens < num_tokens)[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        total = total * tl.exp(best - new_best) + tl.sum(tl.exp(scores - new_best[:, None]), axis=1)
        best = new_best
    tl.store(lse + head * num_rows + rows, best + tl.log(total), mask=rows < num_rows)


@triton.jit
def _columns_kernel(
    query, key, lse, columns, out, scale, num_rows, num_columns, num_heads, q_row, q_head, k_row, k_head, group,
    HEAD: tl.constexpr, HEAD_PADDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[row, column] += sum over heads of exp(score - lse), in head order. One program per tile of ``out``."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    places = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_PADDED)
    column = tl.load(columns + places, mask=places < num_columns, other=0)
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for head in range(num_heads):
        q = _load_rows(query + head * q_head, q_row, rows, rows < num_rows, dims, dims < HEAD)
        k = _load_rows(key + (head // group) * k_head, k_row, column, places < num_columns, dims, dims < HEAD)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        denominator = tl.load(lse + head * num_rows + rows, mask=rows < num_rows, other=0.0)
        total += tl.exp(scores - denominator[:, None])
    inside = (rows < num_rows)[:, None] & (places < num_columns)[None, :]
    target = out + rows[:, None] * num_columns + places[None, :]
    tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)


def attention_to_columns_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    columns: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """``attention_to_columns`` for GPUs: two kernels, no score leaves the chip, the same bits in every run.

    The second kernel adds the heads of a tile one after another instead of with atomics, so that every run and rank
    gets the same sums; with ``lse`` it is the only one. ``out`` must be contiguous; query and key need unit stride in
    the last dimension.
    """
    num_rows, num_heads, head_size = query.shape
    num_tokens, group = key.shape[0], num_heads // key.shape[1]
    sizes = {"HEAD": head_size, "HEAD_PADDED": max(16, triton.next_power_of_2(head_size)), "BLOCK_R": 32}
    strides = (query.stride(0), query.stride(1), key.stride(0), key.stride(1), group)
    row_blocks = triton.cdiv(num_rows, 32)
    if lse is None:
        sums = torch.empty(num_heads, num_rows, dtype=torch.float32, device=query.device)
        _denominator_kernel[(num_heads, row_blocks)](
            query, key, sums, scale, num_rows, num_tokens, *strides, **sizes, BLOCK_T=64
        )
    else:
        sums = lse.T.float().contiguous()
    num_columns = columns.shape[0]
    _columns_kernel[(row_blocks, triton.cdiv(num_columns, 64))](
        query, key, sums, columns, out, scale, num_rows, num_columns, num_heads, *strides, **sizes, BLOCK_N=64
    )
