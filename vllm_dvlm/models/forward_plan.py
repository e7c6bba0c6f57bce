"""What layers must know of the forward pass that runs, decided once before it rather than once per layer.

One object per worker, shared by the model and by those who prepare its steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import nn


class LayerObserver(Protocol):
    """Somebody who looks at layers while they run, and may take rows away between them."""

    def observe(
        self, layer: int, attention: nn.Module, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        """Queries and keys of a layer after the rotary embedding, [rows, heads * head size].

        lse: [rows, heads] log-sum-exp of each row's scores, where the attention that ran has it.
        """

    def after_layer(
        self, layer: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows for the next layer."""

    def finish_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows as they were scheduled, from the rows that are left."""


@dataclass
class ForwardPlan:
    """Facts of one forward pass; the defaults are those of a batch that nobody prepared (vLLM's warm-up).

    final_rows: [rows] int64 ascending, the rows whose final hidden state is read; None for all. Behind the last
        layer's attention only these are computed, the others end as zeros.
    keeps_kv: True if a later step of a request in the batch reads the KV that this step writes.
    whole_spans: token ranges of the rows of attention, (first query, end, first key), if each row attends to tokens of
        this pass only, [first key, end), so that no KV need be read; else None.
    observer: who looks on; None in steps that need no observing.
    """

    final_rows: torch.Tensor | None = None
    keeps_kv: bool = True
    whole_spans: list[tuple[int, int, int]] | None = None
    observer: LayerObserver | None = None

    def reset(self) -> None:
        """Back to the defaults."""
        self.__init__()
