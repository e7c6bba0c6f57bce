"""Move kept KV rows to the front of a request's KV blocks.

    before   [t t v v | v v v v | v t t c | c c . .]      t text, v visual, c canvas; | block border
    kept      ^ ^   ^     ^         ^ ^                   4 of 7 visual tokens dropped
    after    [t t v v | t t . . ]                         the canvas is computed anew in the next step

B = block size, H = KV heads, D = head size, K = kept rows. Rows are gathered before any is written, since source and
target overlap.
"""

from __future__ import annotations

import torch

from vllm_dvlm.kv.layout import PageLayout


def rotate_keys(keys: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Keys turned from their old rotary position to the new one (rotary embedding in halves).

    Both positions are given as the model's own cosines and sines, so the result is what the model would have computed
    at the new position: at 4,000 positions the rounded angles are off by up to 2e-4, the same way on both sides.

    Args:
        keys: [K, H, D'] with D' >= the rotated width; channels behind it (padding) stay.
        old, new: [K, width] rows of the rotary embedding's table, cosines then sines.

    Returns:
        [K, H, D'] in the dtype of ``keys``; computed in float32, the angle in float64.
    """
    half = old.shape[1] // 2
    (cos_old, sin_old), (cos_new, sin_new) = (t.double()[:, None].split(half, dim=-1) for t in (old, new))
    cos = (cos_new * cos_old + sin_new * sin_old).float()
    sin = (sin_new * cos_old - cos_new * sin_old).float()
    first, second, rest = keys.float().split([half, half, keys.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(keys.dtype)


def compact_rows(
    kv_cache: torch.Tensor,
    layout: PageLayout,
    block_ids: torch.Tensor,
    kept: torch.Tensor,
    rotary_table: torch.Tensor | None,
) -> None:
    """Move the kept rows of one request in one layer's cache to its first rows, in place.

    Args:
        kv_cache: [blocks, H, B, 2 * D], possibly packed inside a page as ``layout`` says.
        layout: offsets of a row's channels inside a page.
        block_ids: [n] the request's row of the block table, long enough for all of ``kept``.
        kept: [K] int64 ascending rows that survive.
        rotary_table: [positions, width] cosines and sines; keys turn from position ``kept[i]`` to ``i``. None leaves
            them as they are.
    """
    block_size = layout.key.shape[0]
    pages = kv_cache.flatten(2)
    target = torch.arange(kept.shape[0], device=kept.device)
    rows = _rows(pages, layout, block_ids, kept, block_size)
    if rotary_table is not None:
        rows = (rotate_keys(rows[0], rotary_table[kept], rotary_table[target]), rows[1])
    block = block_ids[target // block_size].long()
    head = torch.arange(pages.shape[1], device=pages.device)
    for values, offsets in zip(rows, (layout.key, layout.value), strict=True):
        pages[block[:, None, None], head[:, None], offsets[target % block_size][:, None, :]] = values


def _rows(
    pages: torch.Tensor, layout: PageLayout, block_ids: torch.Tensor, rows: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of rows, each [K, H, D]."""
    block = block_ids[rows // block_size].long()
    head = torch.arange(pages.shape[1], device=pages.device)
    key, value = (
        pages[block[:, None, None], head[:, None], offsets[rows % block_size][:, None, :]]
        for offsets in (layout.key, layout.value)
    )
    return key, value


def read_rows_reference(
    kv_cache: torch.Tensor, layout: PageLayout, block_ids: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin for tests: the first ``num_rows`` keys and values of a request, row by row. Each [num_rows, H, D]."""
    block_size = layout.key.shape[0]
    keys, values = [], []
    for row in range(num_rows):
        page = kv_cache[int(block_ids[row // block_size])].flatten(1)
        keys.append(page[:, layout.key[row % block_size]])
        values.append(page[:, layout.value[row % block_size]])
    return torch.stack(keys), torch.stack(values)
