"""Similarity pruning without attention: keep visual tokens that say something new."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_dvlm.pruning.base import Pruner, StepView


@dataclass(frozen=True)
class DiversityPruner(Pruner):
    """Distance of each token from the tokens ranked before it, over strided pivots.

    In the spirit of DART (arXiv 2502.11494) and CDPruner (arXiv 2506.10967): duplicates go first. A pivot set of
    ``num_pivots`` evenly spaced tokens is kept; every other token is as important as it is unlike its most similar
    pivot (one minus cosine similarity). One matrix product instead of a greedy loop, so it costs little.
    """

    num_pivots: int = 16

    def importance(self, view: StepView) -> torch.Tensor:
        embeds = torch.nn.functional.normalize(view.visual_embeds.float(), dim=-1)
        num = embeds.shape[0]
        pivots = torch.linspace(0, num - 1, min(self.num_pivots, num), device=embeds.device).round().long()
        importance = 1 - (embeds @ embeds[pivots].T).amax(dim=1)
        # Cosine distance is at most 2: pivots rank first.
        return importance.index_fill(0, pivots, 3.0)
