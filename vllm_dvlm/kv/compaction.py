"""Move kept KV rows to the front of a request's KV blocks.

    before   [t t v v | v v v v | v t t c | c c . .]      t text, v visual, c canvas; | block border
    kept      ^ ^   ^     ^         ^ ^                   4 of 7 visual tokens dropped
    after    [t t v v | t t . . ]                         the open canvas is computed anew in the next step

B = block size, H = KV heads, D = head size, K = kept rows. Rows are gathered before any is written, since source and
target overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_dvlm.kv.layout import PageLayout


@dataclass(frozen=True)
class KeyRotation:
    """Turns keys from their old rotary position to the new one (rotary embedding in halves). Made once per request.

    Both positions are given as the model's own cosines and sines, so the result is what the model would have computed
    at the new position: at 4,000 positions the rounded angles are off by up to 2e-4, the same way on both sides.

    cos, sin: [K, 1, half] float32 of the angle between the positions.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def between(cls, old: torch.Tensor, new: torch.Tensor) -> KeyRotation:
        """old, new: [K, width] rows of the rotary embedding's table, cosines then sines; the angle in float64."""
        half = old.shape[1] // 2
        (cos_old, sin_old), (cos_new, sin_new) = (t.double()[:, None].split(half, dim=-1) for t in (old, new))
        return cls((cos_new * cos_old + sin_new * sin_old).float(), (sin_new * cos_old - cos_new * sin_old).float())

    def apply(self, keys: torch.Tensor) -> torch.Tensor:
        """[K, H, D'] with D' >= the rotated width; channels behind it (padding) stay. Same shape and dtype, computed
        in float32 without temporaries, which took two thirds of the time."""
        half = self.cos.shape[-1]
        wide = keys.float()
        first, second, rest = wide.split([half, half, keys.shape[-1] - 2 * half], dim=-1)
        out = torch.empty_like(wide)
        out[..., 2 * half :] = rest
        torch.mul(first, self.cos, out=out[..., :half]).addcmul_(second, self.sin, value=-1)
        torch.mul(second, self.cos, out=out[..., half : 2 * half]).addcmul_(first, self.sin)
        return out.to(keys.dtype)


def compact_rows(
    kv_cache: torch.Tensor,
    layout: PageLayout | None,
    block_ids: torch.Tensor,
    kept: torch.Tensor,
    rotation: KeyRotation | None,
) -> None:
    """Move the kept rows of one request in one layer's cache to its first rows, in place.

    Args:
        kv_cache: [blocks, H, B, 2 * D].
        layout: offsets of a row's channels inside a packed page of contiguous memory. None: rows lie in the cache as
            its shape says, key then value in the last dimension, in any memory order.
        block_ids: [n] the request's row of the block table, long enough for all of ``kept``.
        kept: [K] int64 ascending rows that survive.
        rotation: of key ``i`` from position ``kept[i]`` to ``i``. None leaves keys as they are.
    """
    block_size = kv_cache.shape[2]
    target = torch.arange(kept.shape[0], device=kept.device)
    sources = _places(kv_cache, layout, block_ids[kept // block_size].long(), kept % block_size)
    keys, values = (page[place] for page, place in sources)
    if rotation is not None:
        keys = rotation.apply(keys)
    targets = _places(kv_cache, layout, block_ids[target // block_size].long(), target % block_size)
    for rows, (page, place) in zip((keys, values), targets, strict=True):
        page[place] = rows


def _places(
    kv_cache: torch.Tensor, layout: PageLayout | None, block: torch.Tensor, row: torch.Tensor
) -> list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """Where keys and values of rows lie: (view of the cache, index into it that yields [K, H, D]) for each.

    A layout with strides is indexed by whole rows, 2.6 times as fast on a CPU as channel by channel.
    """
    if layout is None:
        return [(half, (block, row)) for half in kv_cache.transpose(1, 2).chunk(2, dim=-1)]
    # A view and never a copy, which would swallow the rows written to it: an error where memory is not contiguous.
    pages = kv_cache.view(*kv_cache.shape[:2], -1)
    if layout.strides is not None:
        size = (*pages.shape[:2], *layout.key.shape)
        views = (
            pages.as_strided(size, (*pages.stride()[:2], *steps), pages.storage_offset() + first)
            for first, *steps in layout.strides
        )
        return [(view.transpose(1, 2), (block, row)) for view in views]
    head = torch.arange(pages.shape[1], device=pages.device)[:, None]
    return [(pages, (block[:, None, None], head, offsets[row][:, None, :])) for offsets in (layout.key, layout.value)]


def read_rows_reference(
    kv_cache: torch.Tensor, layout: PageLayout | None, block_ids: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin for tests: the first ``num_rows`` keys and values of a request, row by row. Each [num_rows, H, D]."""
    block_size = kv_cache.shape[2]
    keys, values = [], []
    for row in range(num_rows):
        page = kv_cache[int(block_ids[row // block_size])]
        if layout is None:
            key, value = page[:, row % block_size].chunk(2, dim=-1)
            keys.append(key)
            values.append(value)
            continue
        page = page.flatten(1)
        keys.append(page[:, layout.key[row % block_size]])
        values.append(page[:, layout.value[row % block_size]])
    return torch.stack(keys), torch.stack(values)
