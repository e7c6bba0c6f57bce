"""Records of one step: what is computed, read and pruned; made before the forward pass and gone behind the sampler.

R = requests of the batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dvlm.denoise.schedule import planned_count
from vllm_dvlm.placement import MASKED
from vllm_dvlm.steps import step_at
from vllm_dvlm.worker.states import COLUMN, CanvasStates, RequestSlot

if TYPE_CHECKING:
    from vllm_dvlm.pruning import Pruner


@dataclass(frozen=True)
class Standing:
    """Where one request of the batch stands as the step begins, read from the host mirror."""

    canvases: CanvasStates
    req_idx: int
    slot: RequestSlot
    mask_token_id: int

    def check_schedule(self, start: int, query_len: int) -> None:
        """RuntimeError unless the scheduler computes what this side expects; a resumed request always starts at 0."""
        if self.slot.is_lost:
            return
        step = step_at(self.slot.plan, self.canvases.position(self.req_idx))
        if start not in (0, step.query_start) or start + query_len != step.query_end:
            raise RuntimeError(
                f"request {self.slot.req_id}: scheduled tokens [{start}, {start + query_len}), expected "
                f"[{step.query_start}, {step.query_end}); scheduler and worker disagree"
            )

    def rows_to_score(self) -> np.ndarray:
        """Canvas positions whose logits the step reads, ascending: ``denoise.step.candidates``. [rows] int64."""
        slot, plan = self.slot, self.slot.plan
        if slot.is_lost:
            return np.empty(0, dtype=np.int64)
        row = self.canvases.mirror_np[self.req_idx]
        masked = np.flatnonzero(self.canvases.tokens_np(self.req_idx)[: plan.canvas_len] == self.mask_token_id)
        if plan.first_token_from_prompt and row[COLUMN["step_in_block"]] == 0:
            return masked[masked == 0]
        stop = row[COLUMN["stop"]]
        limit = stop if stop >= 0 else row[COLUMN["block_start"]] + row[COLUMN["block_len"]]
        first = max(0, step_at(plan, self.canvases.position(self.req_idx)).query_start - plan.prompt_len)
        return masked[(masked >= first) & (masked < limit)]

    def planned_count(self) -> int:
        """Positions that the step unmasks by a schedule that is not uniform; -1 without one."""
        params, plan = self.slot.params, self.slot.plan
        if self.slot.is_lost or plan.steps_per_block is None or not params.follows_table:
            return -1
        position = self.canvases.position(self.req_idx)
        tokens = self.canvases.tokens_np(self.req_idx)
        block = tokens[position.block_start : position.block_start + plan.block_len]
        num_masked = at_start = int((block == self.mask_token_id).sum())
        if position.step_in_block:
            at_start = int(self.canvases.mirror_np[self.req_idx, COLUMN["num_masked_at_start"]])
        # Without its draft a canvas begins with nothing known, unless the request has emitted tokens and restarted.
        num_open = plan.canvas_len - sum(token != MASKED for token in params.texts.draft)
        return planned_count(
            params, plan.steps_per_block, position.step_in_block, at_start, num_masked, at_start < num_open
        )


@dataclass
class StepBatch:
    """One step's work, from ``prepare_inputs`` to the sampler.

    row_request / row_position: for each row of logits, index into ``slots`` and canvas position. [rows] int64, host.
    query_len / kv_len: tokens computed and tokens attended to, per request. [R] int, host.
    planned: positions to unmask by a schedule that is not uniform, -1 for requests without one. [R] int64, host.
    """

    slots: list[RequestSlot]
    req_idx: list[int]
    idx: torch.Tensor
    width: int
    row_request: np.ndarray
    row_position: np.ndarray
    query_len: np.ndarray
    kv_len: np.ndarray
    planned: np.ndarray

    def pruning(self) -> list[tuple[RequestSlot, bool]]:
        """Each request, and whether it prunes in this step."""
        return [(s, s.pruned_plan is not None and s.num_steps == 0) for s in self.slots]


@dataclass
class PruneJob:
    """One request that prunes in this step.

    first: row of the request's first token in the layers that run now (moves when another request is shortened).
    num_filled: positions of the canvas before the block that the step works on.
    canvas / text_sum / visual_sum: attention summed over layers and heads; see ``StepView``.
    kept: indices of the survivors among the visual tokens, ascending, once they are chosen.
    spent_s: host time of scoring, choosing and compacting so far; on a GPU that is the time to launch it.
    """

    slot: RequestSlot
    batch_index: int
    req_idx: int
    pruner: Pruner
    layer: int | None
    first: int
    num_filled: int
    visual: torch.Tensor
    text: torch.Tensor
    canvas: torch.Tensor
    text_sum: torch.Tensor
    visual_sum: torch.Tensor
    num_observed: int = 0
    kept: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    spent_s: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time inside to ``spent_s``."""
        started = time.perf_counter()
        yield
        self.spent_s += time.perf_counter() - started
