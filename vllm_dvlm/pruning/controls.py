"""Random and uniform pruning: what a method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_dvlm.pruning.base import Pruner, StepView


@dataclass(frozen=True)
class RandomPruner(Pruner):
    """A random subset, seeded by the request."""

    def importance(self, view: StepView) -> torch.Tensor:
        # Drawn on the host, so that every device and rank draws the same numbers.
        generator = torch.Generator().manual_seed(view.seed % 2**63)
        return torch.rand(view.visual_embeds.shape[0], generator=generator).to(view.visual_embeds.device)


@dataclass(frozen=True)
class UniformPruner(Pruner):
    """Even along the token sequence: every prefix of the ranking is spread over all of it.

    Visual tokens lie row by row, so an even choice of indices spreads over the picture, too, unless a row's length
    (newline included) is a power of two. The ranking is that of the bit-reversed index (van der Corput), whose first k
    points are even for every k.
    """

    def importance(self, view: StepView) -> torch.Tensor:
        num = view.visual_embeds.shape[0]
        index = torch.arange(num, dtype=torch.int64)
        reverse = torch.zeros(num, dtype=torch.int64)
        bits = max(1, (num - 1).bit_length())
        for bit in range(bits):
            reverse |= ((index >> bit) & 1) << (bits - 1 - bit)
        # 2**24 visual tokens would be needed for two of these to coincide in float32.
        return (1 - reverse.double() / 2**bits).float().to(view.visual_embeds.device)
