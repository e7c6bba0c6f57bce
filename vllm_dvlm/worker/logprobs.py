"""Log-probabilities of the tokens that a request writes, as of the step in which each was chosen.

N = rows of one request in a chunk, V = vocabulary, C = canvas positions, K = alternatives that the request wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import pad
from vllm.v1.outputs import LogprobsTensors

from vllm_dvlm.worker.transfer import to_device

if TYPE_CHECKING:
    from vllm_dvlm.denoise.step import StepOutput
    from vllm_dvlm.worker.states import RequestSlot


@dataclass
class RowLogprobs:
    """What a chunk of logits says about one request's rows, the chosen token first.

    request: index in the batch. positions: [N] int64 canvas positions. ids: [N, K + 1] int32. values: [N, K + 1]
    float32. ranks: [N] int64, from 1.
    """

    request: int
    positions: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor
    ranks: torch.Tensor


def row_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, num: int, wanted: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the chosen tokens and of the ``num`` best; one temporary of the size of ``logits``.

    Args:
        logits: [N, V] float32, forbidden tokens at -inf; not changed.
        tokens: [N] int64.
        wanted: [num] int64, other tokens to look at than the best.

    Returns:
        (ids [N, num + 1] int32, values [N, num + 1] float32, rank of the chosen token [N] int64), see ``RowLogprobs``.
    """
    own = logits.gather(1, tokens[:, None])
    if wanted is None:
        others, indices = logits.topk(num, dim=1)
    else:
        indices = wanted.expand(len(logits), -1)
        others = logits.gather(1, indices)
    ids = torch.cat([tokens[:, None], indices], dim=1).int()
    values = torch.cat([own, others], dim=1) - torch.logsumexp(logits, dim=1, keepdim=True)
    return ids, values, (logits > own).sum(dim=1) + 1


class LogprobTable:
    """One request's canvas: ids and values [C, K + 1], ranks [C]; id -1 where no step has chosen a token."""

    def __init__(self, canvas_len: int, num: int, device: torch.device) -> None:
        self.ids = torch.full((canvas_len, num + 1), -1, dtype=torch.int32, device=device)
        self.values = torch.zeros(canvas_len, num + 1, device=device)
        self.ranks = torch.zeros(canvas_len, dtype=torch.int64, device=device)

    def to(self, device: torch.device) -> None:
        """Move the table: to the host while its request is preempted, and back."""
        self.ids, self.values, self.ranks = (x.to(device) for x in (self.ids, self.values, self.ranks))

    def write(self, rows: RowLogprobs, committed: torch.Tensor) -> None:
        """Take over the rows of positions that the step has written. committed: [N] bool."""
        at = rows.positions
        for table, new in ((self.ids, rows.ids), (self.values, rows.values), (self.ranks, rows.ranks)):
            chosen = committed.view(-1, *[1] * (new.dim() - 1))
            table[at] = torch.where(chosen, new, table[at])

    def read(self, positions: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of emitted tokens. Those that no step chose have log-probability 0 and rank 0.

        positions: [n] int64, -1 for a token of the suffix; tokens: [n] int64. Returns ids, values and ranks of n rows.
        """
        at = positions.clamp(min=0)
        chosen = (positions >= 0) & (self.ids[at, 0] >= 0)
        ids = torch.where(chosen[:, None], self.ids[at], tokens[:, None].int())
        return ids, self.values[at] * chosen[:, None], self.ranks[at] * chosen


def emitted_logprobs(slots: list[RequestSlot], out: StepOutput) -> LogprobsTensors | None:
    """The tables' rows for a step's emitted tokens; requests that want none have no rows.

    Waits for the device, once; only batches with a request that wants logprobs come here.
    """
    after = out.canvases
    numbers = torch.stack([out.num_emitted, after.num_emitted, after.stop, out.finished.long()]).cpu()
    width = max(slot.logprobs.ids.shape[1] for slot in slots if slot.logprobs is not None)
    pieces, starts = [], [0]
    for request, slot in enumerate(slots):
        num, upto, stop, finished = numbers[:, request].tolist()
        if slot.logprobs is None or not num:
            starts.append(starts[-1])
            continue
        suffix_len = slot.plan.suffix_len if slot.params.emits_suffix and finished else 0
        num_canvas = num - suffix_len - (finished and stop >= 0)
        # Canvas, suffix, stop token, as in ``denoise.step``.
        positions = np.full(num, -1)
        positions[:num_canvas] = np.arange(upto - num_canvas, upto)
        positions[num_canvas + suffix_len :] = stop
        at = to_device(positions, out.emitted.device)
        ids, values, ranks = slot.logprobs.read(at, out.emitted[request, :num])
        missing = (0, width - ids.shape[1])
        pieces.append((pad(ids, missing), pad(values, missing), ranks))
        starts.append(starts[-1] + num)
    if not pieces:
        return None
    ids, values, ranks = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return LogprobsTensors(ids, values, ranks, starts)


def rows_of(
    request: int, slot: RequestSlot, positions: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor
) -> RowLogprobs:
    """What a chunk of logits says about a request that wants log-probabilities; arguments as in ``RowLogprobs``."""
    asked = slot.sampling_params
    wanted = None if asked.logprob_token_ids is None else to_device(asked.logprob_token_ids, logits.device)
    return RowLogprobs(request, positions, *row_logprobs(logits, chosen, asked.num_logprobs or 0, wanted))


def collect(slots: list[RequestSlot], rows: list[RowLogprobs], out: StepOutput) -> LogprobsTensors | None:
    """Keep what was written in this step, hand out what is emitted; None in a batch that wants no logprobs."""
    if all(slot.logprobs is None for slot in slots):
        return None
    for found in rows:
        slots[found.request].logprobs.write(found, out.committed[found.request, found.positions])
    return emitted_logprobs(slots, out)
