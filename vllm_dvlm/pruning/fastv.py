"""LLaDA-FastV: attention of one middle-to-late layer, pruned inside the first denoising step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vllm_dvlm.pruning.base import Pruner, StepView
from vllm_dvlm.pruning.rows import mean_over_rows


@dataclass(frozen=True)
class FastV(Pruner):
    """Mean over heads and response rows of the attention in layer ``prune_layer`` of the first step.

    Later layers of that step and all later steps see the reduced sequence. Inside the first step every response row is
    still masked, so 'masked' means the whole canvas there.

    Source: LLaDA-FastV, arXiv 2601.20168 (no code is public); ``rows='last'`` is FastV's own choice.
    """

    rows: str = "masked"

    def __post_init__(self) -> None:
        if self.rows not in ("masked", "last", "all", "response_prompt"):
            raise ValueError("prune_rows: fastv takes masked, response_prompt, all or last; no row is committed yet")

    @property
    def reads(self) -> Literal["none", "canvas", "prompt"]:
        return "canvas" if self.rows in ("masked", "last") else "prompt"

    def importance(self, view: StepView) -> torch.Tensor:
        return mean_over_rows(view, self.rows)
