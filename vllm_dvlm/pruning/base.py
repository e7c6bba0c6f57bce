"""The ``Pruner`` interface and the step view it is given.

C = canvas positions, N = visual tokens of one request (all images together), D = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

# The front end imports this package to check options; it needs no torch for that.
if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StepView:
    """What a method may look at, for one request, after the commit of the first denoising step.

    Attention is the probability after softmax over the whole sequence, averaged over the heads of all ranks and over
    the layers that the method asked for; the parts that it did not ask for are None.
    """

    attention: torch.Tensor | None  # [C, N] float32, rows are canvas positions
    prompt_attention: torch.Tensor | None  # [N] float32, summed over the text rows of the prompt
    visual_attention: torch.Tensor | None  # [N] float32, summed over the visual rows of the prompt
    num_prompt_rows: int  # text rows of the prompt
    is_masked: torch.Tensor  # [C] bool, masked before the step and not committed in it
    is_committed: torch.Tensor  # [C] bool, committed in this step, also where that token is the mask token itself
    visual_embeds: torch.Tensor  # [N, D], embeddings as they entered the first layer
    visual_places: torch.Tensor  # [N, 2] int64 on the host, row and column in the tile or map it belongs to, from 0;
    # a newline token is the column behind the last
    seed: int  # of the request, the same on every rank


@dataclass(frozen=True)
class Pruner:
    """One pruning method. Subclasses are frozen dataclasses; their fields are the method's knobs.

    Methods named in ``names.AT_LAYER`` are asked inside the first step, after layer ``prune_layer``, with that layer's
    attention alone; the others after the step, with the attention of all layers.
    """

    @property
    def reads(self) -> Literal["none", "canvas", "prompt"]:
        """Attention rows that the method needs: 'none', those of the canvas, or also those of the prompt."""
        return "none"

    def importance(self, view: StepView) -> torch.Tensor:
        """Importance per visual token, [N] float32, higher is kept; ties go to the lower index. On the host or not."""
        raise NotImplementedError
