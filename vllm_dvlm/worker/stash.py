"""Requests that were removed before their end, for those that were preempted and come back.

vLLM's hook does not say whether a request was preempted or aborted, so what is kept is bounded. A request whose
entry is gone restarts (``DiffusionScheduler._restart``).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dvlm.steps import Position
from vllm_dvlm.worker.states import COLUMN

if TYPE_CHECKING:
    from vllm_dvlm.worker.states import RequestSlot

# An entry is a few kB, a few dozen if the request is pruned or wants logprobs.
MIN_STASHED = 1024


class Stash:
    """Rows and slots by request id; the oldest goes first.

    A reset preempts all running requests at once, and each waits at the head of the queue: as many aborts again fit.
    """

    def __init__(self, max_num_reqs: int) -> None:
        self.max_entries = max(MIN_STASHED, 2 * max_num_reqs)
        self.entries: OrderedDict[str, tuple[np.ndarray, RequestSlot]] = OrderedDict()

    def put(self, req_id: str, row: np.ndarray, slot: RequestSlot) -> None:
        """Keep a request. row: what ``CanvasStates.snapshot`` returned."""
        slot.prompt_token_ids = []  # comes again with the request
        slot.prompt_embeds = None
        if slot.logprobs is not None:
            slot.logprobs.to(torch.device("cpu"))
        self.entries[req_id] = row, slot
        if len(self.entries) > self.max_entries:
            self.entries.popitem(last=False)

    def take(self, req_id: str, position: Position) -> tuple[np.ndarray, RequestSlot] | None:
        """The request as it stood at ``position``, which is the scheduler's; None if that is not known any more."""
        found = self.entries.pop(req_id, None)
        if found is None:
            return None
        row = found[0]
        stood = Position(*(int(row[COLUMN[name]]) for name in ("block_start", "step_in_block", "num_emitted")))
        return found if stood == position else None

    def drop(self, req_id: str) -> None:
        """Forget a request, if it is known."""
        self.entries.pop(req_id, None)
