"""Attention of steps whose keys are all among the step's own tokens: exact mode, refreshes, first steps.

Nothing need be read from the KV cache then, and the log-sum-exp of each row can come out beside it: a step that prunes
may take its denominators from there instead of going over all keys once more.

N = tokens of the step, H = query heads of this rank, G = KV heads, D = head size. A span is (first query, end, first
key): queries [first, end) attend to keys [first key, end), see ``ForwardPlan.whole_spans``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Span = tuple[int, int, int]
# (q [N, H, D], k and v [N, G, D], spans, scale, rows, with_lse) -> (out [rows, H * D], log-sum-exp [N, H] or None).
WholeAttention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def choose(setting: str, device_type: str, dtype: torch.dtype) -> WholeAttention | None:
    """The implementation that a setting (``attention_whole``) means; None: vLLM's attention layer, through the cache.

    "auto" is what was measured: torch in float32 on a CPU, where it takes 3.3 ms against the backend's 5.0 ms at 945
    tokens, 4 heads of 16 (padded to 32 for vLLM's), and 18 against 32 ms with 8 heads of 64, on one core; else vLLM's.

    Raises:
        ValueError: "xformers" where it cannot run.
    """
    if setting == "xformers":
        if device_type != "cuda":
            raise ValueError(
                'attention_whole "xformers" needs an NVIDIA GPU, its kernels do not run on a CPU: use "auto"'
            )
        load_xformers()
        return with_xformers
    if setting == "auto" and device_type == "cpu" and dtype == torch.float32:
        return with_torch
    return None


def sums_are_worth_it(attention: WholeAttention) -> bool:
    """Whether a step that prunes should ask for the log-sum-exp.

    On a CPU it saves nothing (`vllm-dvlm bench scoring`): nearly all keys are visual tokens, which are scored anyway,
    and the sum over the others costs less than handing the denominators out.
    """
    return attention is with_xformers


def load_xformers() -> Any:
    """The module ``xformers.ops.fmha``. ValueError that says how to install it."""
    try:
        from xformers.ops import fmha
    except ImportError as error:
        raise ValueError(f"attention_whole \"xformers\": pip install 'vllm-dvlm[xformers]' ({error})") from None
    return fmha


def with_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: list[Span],
    scale: float,
    rows: torch.Tensor | None = None,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Span by span by torch's kernel. Twin: ``reference``.

    rows: [queries] int64 ascending, what is computed; None for all. Then there is no log-sum-exp.
    """
    bounds = [span[:2] for span in spans]
    lse = None
    if rows is not None:
        q = q[rows]
        bounds = torch.searchsorted(rows, torch.tensor(bounds)).tolist()
    elif with_lse:
        lse = q.new_empty(q.shape[:2])
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for (_, end, first_key), (top, bottom) in zip(spans, bounds, strict=True):
        if top == bottom:
            continue
        part = q[top:bottom].transpose(0, 1)[None]
        keys, values = (x[first_key:end].transpose(0, 1)[None] for x in (k, v))
        if lse is None:
            mixed = F.scaled_dot_product_attention(part, keys, values, scale=scale, enable_gqa=group > 1)
        else:  # what the line above calls, which does not hand the second result on
            if group > 1:
                keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
            mixed, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(part, keys, values, scale=scale)
            lse[top:bottom] = sums[0].T
        out[top:bottom] = mixed[0].transpose(0, 1)
    return out.flatten(1), lse


def with_xformers(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: list[Span],
    scale: float,
    rows: torch.Tensor | None = None,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All spans in one kernel, on GPUs. Arguments as ``with_torch``. Twin: ``reference``."""
    fmha = load_xformers()
    heads, kv_heads = q.shape[1], k.shape[1]
    # One sequence; grouped heads as a dimension of their own, which keys and values do not have in memory.
    q = q.view(1, len(q), kv_heads, heads // kv_heads, -1)
    k, v = (x[None, :, :, None].expand(-1, -1, -1, heads // kv_heads, -1) for x in (k, v))
    if heads == kv_heads:
        q, k, v = (x.squeeze(3) for x in (q, k, v))
    out, lse = fmha.memory_efficient_attention_partial(q, k, v, attn_bias=_mask_of_step(spans, q.device), scale=scale)
    out = out.reshape(q.shape[1], -1)
    sums = lse.reshape(heads, -1)[:, : len(out)].T if with_lse and rows is None else None
    return (out if rows is None else out[rows]), sums


_last: tuple[list[Span], Any] | None = None


def _mask_of_step(spans: list[Span], device: torch.device) -> Any:
    """``gappy_mask``, made once for all layers that are given the same list."""
    global _last
    if _last is None or _last[0] is not spans:
        _last = spans, gappy_mask(spans, device)
    return _last[1]


def gappy_mask(spans: list[Span], device: torch.device | None = None) -> Any:
    """The spans as xformers' mask; they must follow each other without a gap between their queries.

    Rows of attention, not requests: a prompt that attends to itself alone and the canvas behind it are two blocks
    whose keys begin at the same one.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalGappyKeysMask

    starts = [first_key for _, _, first_key in spans]
    return BlockDiagonalGappyKeysMask.from_seqlens(
        q_seqlen=[end - first for first, end, _ in spans],
        kv_seqstarts=[*starts, spans[-1][1]],
        kv_seqlen=[end - first_key for _, end, first_key in spans],
        device=device,
    )


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin in float64: the whole matrix and a mask [N, N] that is added to the scores. Returns as ``with_torch``."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) * scale + mask.double()
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1), scores.logsumexp(-1).T
