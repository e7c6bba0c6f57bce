"""RedVTP: attention that response tokens pay to visual tokens in the first denoising step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vllm_dvlm.pruning.base import Pruner, StepView
from vllm_dvlm.pruning.rows import mean_over_rows


@dataclass(frozen=True)
class RedVTP(Pruner):
    """Mean over layers, heads and still-masked canvas rows of the attention that each visual token gets.

    Source: RedVTP, arXiv 2511.12428; golden README points 32 to 37. The other choices of ``rows`` are those of the
    paper's ablation.
    """

    rows: str = "masked"

    def __post_init__(self) -> None:
        if self.rows == "last":
            raise ValueError("prune_rows: redvtp takes masked, committed, response_prompt or all, not 'last'")

    @property
    def reads(self) -> Literal["none", "canvas", "prompt"]:
        return "canvas" if self.rows in ("masked", "committed") else "prompt"

    def importance(self, view: StepView) -> torch.Tensor:
        return mean_over_rows(view, self.rows)
