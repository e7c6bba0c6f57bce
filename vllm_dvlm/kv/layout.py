"""Where a token's key and value lie inside a packed KV page.

GPU backends keep caches as [blocks, heads, block, 2 * head size] in one memory order or another, key then value in the
last dimension: they are indexed as they are and need no layout. The CPU backend packs pages by instruction set
(float32: keys transposed, bfloat16 with AMX: in tiles), so there the layout is not assumed but probed: numbered rows
are written through vLLM's own operator into one page and read back.

B = block size, H = KV heads, D = head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch


@dataclass(frozen=True)
class PageLayout:
    """Flat offsets inside one head's page of 2 * B * D elements.

    key, value: [B, D] int64, offset of channel d of the token in place b.
    """

    key: torch.Tensor
    value: torch.Tensor

    @cached_property
    def strides(self) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
        """Of key and value: offset of the first row, step to the next row, step to the next channel.

        None if one of them is no such grid (bfloat16 tiles). Waits for the device, once per layout.
        """
        found = []
        for offsets in (self.key, self.value):
            first, row, channel = (int(offsets[i, j]) for i, j in ((0, 0), (1, 0), (0, 1)))
            row, channel = row - first, channel - first
            rows, channels = (torch.arange(n, device=offsets.device) for n in offsets.shape)
            if not torch.equal(offsets, first + rows[:, None] * row + channels * channel):
                return None
            found.append((first, row, channel))
        return found[0], found[1]


@lru_cache(maxsize=8)
def probe_cpu_layout(block_size: int, head_size: int, isa: str, dtype: torch.dtype) -> PageLayout:
    """The CPU backend's layout, found by writing numbers and looking where they went.

    Args:
        block_size, head_size: of the page.
        isa: the layer's instruction set (``layer.isa``).
        dtype: of the cache; bfloat16 holds integers exactly up to 256 only, hence digits to the base 128.

    Raises:
        RuntimeError: the numbers do not come back as a permutation, so the page holds something else than rows.
    """
    from vllm import _custom_ops as ops

    num = block_size * head_size
    base = 128
    digits = 1
    while base**digits < 2 * num:
        digits += 1
    found = torch.zeros(2 * num, dtype=torch.int64)
    numbers = torch.arange(2 * num)
    for digit in range(digits):
        values = (numbers // base**digit % base).to(dtype)
        page = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
        key_cache, value_cache = page.chunk(2, dim=2)
        key, value = values.view(2, block_size, 1, head_size)
        slots = torch.arange(block_size)
        ops.cpu_attn_reshape_and_cache(
            key, value, key_cache, value_cache, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )
        found += page.flatten().long() * base**digit
    if not torch.equal(found.sort().values, numbers):
        raise RuntimeError(f"the CPU attention kernels' KV page layout ({isa}, {dtype}) is not a permutation of rows")
    offsets = found.argsort()
    key, value = offsets.view(2, block_size, head_size)
    return PageLayout(key, value)
