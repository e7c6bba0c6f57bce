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
        return torch.rand(view.visual_embeds.shape[0], generator=generator)


# Powers of the reciprocal of the plastic number, the root of x**3 = x + 1: the generators of the R2 sequence (Roberts,
# "The unreasonable effectiveness of quasirandom sequences", 2018).
_ROW_STEP, _COLUMN_STEP = 0.7548776662466927, 0.5698402909980532


@dataclass(frozen=True)
class UniformPruner(Pruner):
    """Even over the picture: any rectangle of any tile keeps its share, whatever the keep count.

    A token at row r and column c has the rank frac(r * a + c * b) with the generators of the R2 sequence. The cells
    below any threshold are spread evenly, in every direction and for rows of every length; an even choice of indices
    would make whole columns where rows have a power of two of tokens.
    """

    def importance(self, view: StepView) -> torch.Tensor:
        # On the host and in float64, so that every device and rank ranks alike.
        places = view.visual_places.cpu().double()
        rank = (places[:, 0] * _ROW_STEP + places[:, 1] * _COLUMN_STEP) % 1
        return (1 - rank).float()
