"""Pruning in the step in which it happens: score, select, shorten, compact.

The model calls ``StepPruner`` between its layers, in steps in which it is the forward plan's observer; the model state
calls it before and after the step. Requests that prune are few and prune once, so per-request work here is no matter of
the hot path.

C = canvas positions, N = visual tokens, P = prompt tokens before pruning, K = prompt tokens after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group, tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context

from vllm_dvlm.kv.compaction import KeyRotation, compact_rows
from vllm_dvlm.kv.layout import PageLayout, probe_cpu_layout
from vllm_dvlm.models.probe import attention_to_columns
from vllm_dvlm.pruning import StepView, create
from vllm_dvlm.pruning.select import kept_prompt_rows, select
from vllm_dvlm.worker.image_layouts import visual_places
from vllm_dvlm.worker.step_batch import PruneJob
from vllm_dvlm.worker.transfer import to_device

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_dvlm.denoise.step import StepOutput
    from vllm_dvlm.models.llada import LLaDAAttention
    from vllm_dvlm.worker.attention_rows import Segment
    from vllm_dvlm.worker.shared import WorkerState
    from vllm_dvlm.worker.states import RequestSlot


def from_first_rank(numbers: torch.Tensor) -> torch.Tensor:
    """The first rank's numbers on every rank, in one broadcast."""
    if get_tensor_model_parallel_world_size() == 1:
        return numbers
    return get_tp_group().broadcast(numbers.contiguous(), src=0)


class StepPruner:
    """The pruning jobs of the current step; a ``models.forward_plan.LayerObserver``. One per worker.

    segments: by layer, what the layers behind it run with; filled in by the model state.
    """

    def __init__(self, state: WorkerState) -> None:
        self.state = state
        self.jobs: list[PruneJob] = []
        self.segments: dict[int, Segment] = {}
        self._rows: torch.Tensor | None = None
        self._num_rows = 0

    @property
    def active(self) -> bool:
        """True in a step in which a request prunes."""
        return bool(self.jobs)

    # -- before the forward pass -------------------------------------------------------------------------------

    def begin(self, input_batch: InputBatch) -> None:
        """Find the requests of the batch that prune in this step."""
        self.jobs = []
        self.segments = {}
        self._rows = None
        for b, req_idx in enumerate(input_batch.idx_mapping_np.tolist()):
            slot = self.state.slots.get(req_idx)
            if slot is None or slot.req_id != input_batch.req_ids[b]:
                continue  # a dummy batch
            if slot.pruned_plan is None or slot.num_steps > 0:
                continue
            self.jobs.append(self._job(slot, b, req_idx, int(input_batch.query_start_loc_np[b])))

    def layers(self) -> list[int]:
        """Layers behind which requests of this step are shortened, ascending."""
        return sorted({job.layer for job in self.jobs if job.layer is not None})

    def removed_behind(self, layer: int, num_reqs: int) -> np.ndarray:
        """Tokens that each request of the batch has lost behind ``layer``. [num_reqs] int32."""
        removed = np.zeros(num_reqs, dtype=np.int32)
        for job in self.jobs:
            if job.layer is not None and job.layer <= layer:
                removed[job.batch_index] = job.slot.plan.total_len - job.slot.pruned_plan.total_len
        return removed

    def _job(self, slot: RequestSlot, batch_index: int, req_idx: int, first: int) -> PruneJob:
        device = self.state.device
        options = slot.params.options
        visual = np.concatenate([np.arange(s.start, s.end) for s in slot.visual_spans])
        text = np.setdiff1d(np.arange(slot.plan.prompt_len), visual)
        pruner = create(options.prune_method, options.prune_rows)
        num = len(visual)
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float32, device=device)  # noqa: E731
        # The option counts layers from 1; inside they count from 0.
        layers = slot.params.prune_after_layers(self.state.num_layers)
        layer = None if layers is None else layers - 1
        return PruneJob(
            slot,
            batch_index,
            req_idx,
            pruner,
            layer,
            first,
            self.state.canvases.position(req_idx).block_start,
            to_device(visual, device),
            to_device(text, device),
            zeros(slot.plan.canvas_len, num),
            zeros(num),
            zeros(num),
        )

    # -- inside the forward pass -------------------------------------------------------------------------------

    def observe(
        self,
        layer: int,
        attention: LLaDAAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Add up what a layer's attention says. query, key: [tokens, heads * head size] after rotary embedding.

        lse: [tokens, heads] log-sum-exp of each token's scores, if known.
        """
        q = query.view(query.shape[0], -1, attention.head_dim)
        k = key.view(key.shape[0], -1, attention.head_dim)
        for job in self.jobs:
            if job.pruner.reads == "none" or (job.layer is not None and job.layer != layer):
                continue
            with job.timed():
                # Another request may have been shortened; this one is whole as long as its own layer has not come.
                own = slice(job.first, job.first + job.slot.plan.total_len)
                self._score(job, q[own], k[own], attention.head_dim**-0.5, None if lse is None else lse[own])

    @staticmethod
    def _score(job: PruneJob, q: torch.Tensor, k: torch.Tensor, scale: float, lse: torch.Tensor | None) -> None:
        plan = job.slot.plan
        canvas = slice(plan.prompt_len, plan.prompt_len + plan.canvas_len)
        attention_to_columns(q[canvas], k, scale, job.visual, job.canvas, None if lse is None else lse[canvas])
        if job.pruner.reads == "prompt":
            if plan.caches_prompt:  # it does not see the canvas
                k = k[: plan.prompt_len]
            for rows, total in ((job.text, job.text_sum), (job.visual, job.visual_sum)):
                for chunk in rows.split(256):
                    part = total.new_zeros(len(chunk), len(total))
                    attention_to_columns(q[chunk], k, scale, job.visual, part, None if lse is None else lse[chunk])
                    total += part.sum(dim=0)
        job.num_observed += 1

    def after_layer(
        self, layer: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Shorten the requests that prune at this layer. positions: [rows]; hidden, residual: [rows, hidden size]."""
        segment = self.segments.get(layer)
        if segment is None:
            return positions, hidden, residual
        if self._rows is None:
            self._num_rows = hidden.shape[0]
            self._rows = torch.arange(hidden.shape[0], device=hidden.device)
        keep = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        jobs = [job for job in self.jobs if job.layer == layer]
        for job in jobs:
            # Inside the step none is committed, and all are masked unless the request has restarted.
            mask_token_id = self.state.token_ids.mask_token_id
            masked = self.state.canvases.is_masked(job.req_idx, job.slot.plan.canvas_len, mask_token_id)
            with job.timed():
                self._choose(job, masked, torch.zeros_like(masked))
            span = keep[job.first : job.first + job.slot.plan.prompt_len]
            span[job.visual] = False
            span[job.visual[job.kept]] = True
        # The number of survivors is known on the host, so the indices come without waiting for the device.
        num_kept = int(segment.rows.query_start[-1])
        index = torch.sort(keep.to(torch.int8), descending=True, stable=True).indices[:num_kept]
        self._rows = self._rows[index]
        positions, hidden, residual = positions[index], hidden[index], residual[index]
        for job in self.jobs:
            job.first = int(segment.rows.query_start[segment.rows.first_rows[job.batch_index]])
        for job in jobs:
            if job.slot.params.options.prune_positions == "renumber":
                length = job.slot.pruned_plan.total_len
                positions[job.first : job.first + length] = torch.arange(length, device=positions.device)
        context = get_forward_context()
        context.slot_mapping.update(segment.slots)
        self.state.forward_plan.whole_spans = segment.rows.whole_spans()
        return positions, hidden, residual

    def finish_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Back to one row per scheduled token; rows of dropped tokens are zero and read by nobody."""
        if self._rows is None:
            return hidden
        out = hidden.new_zeros(self._num_rows, hidden.shape[1])
        out[self._rows] = hidden
        self._rows = None
        return out

    # -- after the commit --------------------------------------------------------------------------------------

    def complete(self, masked: torch.Tensor, out: StepOutput) -> torch.Tensor:
        """Choose what is left to choose, then shorten every request that pruned.

        Args:
            masked: [R, W] bool, canvas positions still masked after the step.
            out: the step's result; rows are the batch's requests.

        Returns:
            [R] int32 on the host, microseconds that pruning took per request; 0 for those that did not prune.
        """
        spent_us = np.zeros(len(masked), dtype=np.int32)
        for job in self.jobs:
            with job.timed():
                self._finish(job, masked, out)
            spent_us[job.batch_index] = round(job.spent_s * 1e6)
            if job.slot.trace is not None and job.slot.trace.pruning is not None:
                job.slot.trace.pruning["prune_ms"] = job.spent_s * 1e3
        self.jobs = []
        return torch.from_numpy(spent_us)

    def _finish(self, job: PruneJob, masked: torch.Tensor, out: StepOutput) -> None:
        trace = job.slot.trace
        if job.kept is None:
            row, canvas_len = job.batch_index, job.slot.plan.canvas_len
            committed = out.committed[row, :canvas_len]
            # Where the model predicted the mask token and it was committed, the reference counts the row as committed.
            self._choose(job, masked[row, :canvas_len] & ~committed, committed)
            # A full canvas has no later step, so it does not matter what is kept. Only a trace, which waits for
            # the device anyway, is told; ranks without one have taken part in the choice, too.
            if trace is not None and not masked[row, :canvas_len].any():
                trace.pruning_skipped = "the canvas is full after the first step"
                return
        self._shorten(job)

    def _choose(self, job: PruneJob, masked: torch.Tensor, committed: torch.Tensor) -> None:
        num_scores = job.num_observed * self.state.num_heads
        reads = job.pruner.reads
        gather = self._sum_over_ranks
        view = StepView(
            attention=gather(job.canvas) / num_scores if reads != "none" else None,
            prompt_attention=gather(job.text_sum) / num_scores if reads == "prompt" else None,
            visual_attention=gather(job.visual_sum) / num_scores if reads == "prompt" else None,
            num_prompt_rows=len(job.text),
            is_masked=masked,
            is_committed=committed,
            visual_embeds=job.slot.prompt_embeds[job.visual],
            visual_places=torch.from_numpy(visual_places(job.slot.images, job.slot.visual_spans)),
            seed=job.slot.noise_seed,
        )
        # One rank decides, whatever a method reads: what others compute may differ in the last bit.
        importance = job.pruner.importance(view)
        if importance.device != view.visual_embeds.device:
            importance = to_device(importance.numpy(), view.visual_embeds.device)
        job.importance = from_first_rank(importance)
        keep_count = len(job.visual) - (job.slot.plan.prompt_len - job.slot.pruned_plan.prompt_len)
        job.kept = select(job.importance, keep_count)

    @staticmethod
    def _sum_over_ranks(total: torch.Tensor) -> torch.Tensor:
        """Sum of the ranks' head sums, in rank order on every rank: an all-reduce may differ in the last bit."""
        if get_tensor_model_parallel_world_size() == 1:
            return total
        return tensor_model_parallel_all_gather(total[None].contiguous(), 0).sum(0)

    def _shorten(self, job: PruneJob) -> None:
        """From here on the prompt *is* the kept tokens, on this side as on the scheduler's."""
        slot = job.slot
        before, after = slot.plan, slot.pruned_plan
        rows = kept_prompt_rows(before.prompt_len, job.visual, job.kept, job.text)
        slot.kept_rows = rows
        slot.prompt_embeds = slot.prompt_embeds[rows]
        keeps_angles = slot.params.options.prune_positions == "keep"
        if keeps_angles:
            tail = torch.arange(before.prompt_len, before.total_len, device=rows.device)
            slot.rope_positions = torch.cat([rows, tail])
        tables = self.state.block_tables
        blocks_before = self.state.num_kv_blocks(job.req_idx)
        if before.keeps_kv:
            # The canvas is computed anew in the next step, but for what a draft or an earlier life has filled of it.
            num_filled = 0 if before.caches_prompt else job.num_filled
            behind = torch.arange(before.prompt_len, before.prompt_len + num_filled, device=rows.device)
            self._compact(job, torch.cat([rows, behind]), rotate=not keeps_angles)
        for group, size in enumerate(tables.block_sizes):
            tables.num_blocks.np[group, job.req_idx] = -(-after.total_len // size)
        slot.plan, slot.pruned_plan = after, None
        if slot.trace is not None:
            slot.trace.record_pruning(job, blocks_before, self.state.num_kv_blocks(job.req_idx))

    def _compact(self, job: PruneJob, rows: torch.Tensor, rotate: bool) -> None:
        """Move the kept KV rows together in every layer that has computed the whole prompt."""
        tables = self.state.block_tables.block_tables
        last = self.state.num_layers if job.layer is None else job.layer + 1
        layers = self.state.model.model.layers[:last]
        rotation = None
        if rotate:  # the same in every layer
            table = layers[0].self_attn.rotary_emb.cos_sin_cache.to(rows.device)
            rotation = KeyRotation.between(table[rows], table[: len(rows)])
        for layer in layers:
            attention = layer.self_attn
            block_ids = tables[self.state.group_of[attention.attn.layer_name]].gpu[job.req_idx]
            compact_rows(attention.attn.kv_cache, self._layout(attention), block_ids, rows, rotation)

    @staticmethod
    def _layout(attention: LLaDAAttention) -> PageLayout | None:
        """How the layer's KV pages are packed; None on a GPU, where they are not."""
        cache = attention.attn.kv_cache
        if not cache.is_cpu:
            return None
        return probe_cpu_layout(cache.shape[2], attention.padded_dim, attention.attn.isa, cache.dtype)
