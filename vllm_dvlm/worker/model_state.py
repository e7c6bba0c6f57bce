"""vLLM's ModelState hooks for masked-diffusion models: translate, call the pure parts, hand back.

One step, in the order in which the runner calls: ``add_request`` / ``remove_request``, ``prepare_attn``,
``prepare_inputs_embeds``, ``prepare_inputs``, the model, the sampler (``worker/sampler.py``).

R = requests of the batch, N = its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_dvlm.models.forward_plan import ForwardPlan
from vllm_dvlm.options import PLACED_KEY, RESUME_KEY
from vllm_dvlm.placement import ResolvedParams
from vllm_dvlm.settings import ServerSettings
from vllm_dvlm.steps import Position, Resume, VisualSpan
from vllm_dvlm.worker.attention_rows import AttentionRows, MetadataBuilder
from vllm_dvlm.worker.embeddings import StepEmbeddings
from vllm_dvlm.worker.image_layouts import describe_images
from vllm_dvlm.worker.logprobs import LogprobTable
from vllm_dvlm.worker.pruning import StepPruner
from vllm_dvlm.worker.sampler import DiffusionSampler
from vllm_dvlm.worker.stash import Stash
from vllm_dvlm.worker.states import COLUMN, CanvasStates, RequestSlot
from vllm_dvlm.worker.step_batch import Standing, StepBatch
from vllm_dvlm.worker.trace import TraceRecorder, check_folder
from vllm_dvlm.worker.transfer import to_device

if TYPE_CHECKING:
    from torch import nn
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
    from vllm.v1.worker.gpu.states import RequestState
    from vllm.v1.worker.utils import AttentionGroup

logger = init_logger(__name__)

# vLLM's GPU warm-up sends scheduler-like steps for requests of this name; their lengths follow no plan of ours.
WARMUP_PREFIX = "_warmup_"


class DiffusionModelState(ModelState):
    """State of one worker; see the module's docstring for the life of a step."""

    num_new_sampled_tokens_per_step = 0

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        if device.type == "cpu":
            from vllm_dvlm.patches.vllm import p001_cpu_torch_kernels, p004_waits_that_sleep

            p001_cpu_torch_kernels.install()
            p004_waits_that_sleep.install()
        self.settings = ServerSettings.from_additional_config(vllm_config.additional_config)
        self.family = model.family
        self.token_ids = model.token_ids
        self.canvases = CanvasStates(self.max_num_reqs, self.settings.max_canvas_length, device)
        self.slots: dict[int, RequestSlot] = {}
        self.req_idx_of: dict[str, int] = {}
        self.step: StepBatch | None = None
        self.runs_eagerly = False
        self.block_tables: BlockTables | None = None
        self.group_of: dict[str, int] = {}
        self.num_layers = self.model_config.hf_config.num_hidden_layers
        self.num_heads = self.model_config.hf_config.num_attention_heads
        self.pruner = StepPruner(self)
        self.forward_plan = ForwardPlan()
        model.model.set_forward_plan(self.forward_plan)
        self.writes_traces = get_tensor_model_parallel_rank() == 0
        if self.writes_traces and self.settings.trace_dir is not None:
            check_folder(self.settings.trace_dir)
        self.stash = Stash(self.max_num_reqs)
        self.embeddings = StepEmbeddings(self)

    # -- life of a request -------------------------------------------------------------------------------------

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Keep the block tables: traces say how many KV blocks a request holds."""
        self.block_tables = block_tables
        groups = kv_cache_config.kv_cache_groups
        self.group_of = {name: i for i, group in enumerate(groups) for name in group.layer_names}

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Take a request into slot ``req_index``; one that was preempted goes on where it stood."""
        req_id = new_req_data.req_id
        if req_id.startswith(WARMUP_PREFIX):
            return
        resume = (new_req_data.sampling_params.extra_args or {}).get(RESUME_KEY)
        resume = None if resume is None else Resume.from_list(resume)
        goes_on = resume is not None and not resume.restarts
        stashed = self.stash.take(req_id, resume.position) if goes_on else self.stash.drop(req_id)
        if stashed is not None:
            row, slot = stashed
            slot.prompt_token_ids = new_req_data.prompt_token_ids
            if slot.logprobs is not None:
                slot.logprobs.to(self.device)
            self.canvases.restore(req_index, row, slot.params.options.diffusion_threshold)
        else:
            slot = self._new_slot(new_req_data, is_lost=goes_on)
            self.canvases.add(
                req_index,
                slot.plan,
                self.token_ids.mask_token_id,
                slot.params.texts,
                slot.params.suffix_len if slot.params.emits_suffix else 0,
                slot.params.options.diffusion_threshold,
                *self._restart(slot, new_req_data, resume),
            )
        self.slots[req_index] = slot
        self.req_idx_of[req_id] = req_index

    @staticmethod
    def _restart(
        slot: RequestSlot, new_req_data: NewRequestData, resume: Resume | None
    ) -> tuple[Position, Sequence[int]]:
        """Where a new slot begins, and what is known of its canvas."""
        if resume is None or slot.is_lost:
            return slot.plan.start, ()
        if slot.trace is not None:
            slot.trace.restart(resume.position)
        prompt_len, position = new_req_data.prompt_len, resume.position
        return position, new_req_data.prefill_token_ids[prompt_len : prompt_len + position.num_emitted]

    def _new_slot(self, new_req_data: NewRequestData, is_lost: bool) -> RequestSlot:
        sampling_params = new_req_data.sampling_params
        params = ResolvedParams.from_mapping(sampling_params.extra_args[PLACED_KEY])
        plan = params.plan(new_req_data.prompt_len)
        spans = [
            VisualSpan(f.mm_position.offset, f.mm_position.offset + f.mm_position.length)
            for f in new_req_data.mm_features
        ]
        seed = sampling_params.seed
        num_visual = sum(len(span) for span in spans)
        slot = RequestSlot(
            new_req_data.req_id,
            params,
            sampling_params,
            plan,
            new_req_data.prompt_token_ids,
            spans,
            self._stop_ids(sampling_params),
            # Every rank must draw the same noise, so an unseeded request is seeded by its (random) id.
            seed if seed is not None else hash_seed(new_req_data.req_id),
            is_lost=is_lost,
        )
        if is_lost:
            return slot
        slot.pruned_plan = params.pruned_plan(plan, num_visual)
        if (num := sampling_params.num_logprobs) is not None:
            slot.logprobs = LogprobTable(plan.canvas_len, num, self.device)
        traced = params.options.diffusion_trace and self.writes_traces
        if traced or slot.pruned_plan is not None:
            slot.images = describe_images(new_req_data.mm_features, self.model.vision.layout)
        if traced:
            slot.trace = TraceRecorder(self.settings.trace_dir, slot, self.model_config.hf_config)
        return slot

    def _stop_ids(self, sampling_params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end the canvas, ascending; where none does, only the scheduler looks for the reply's end."""
        if not self.family.stops_bound_canvas:
            return ()
        stop_ids = set(sampling_params.stop_token_ids or ())
        if not sampling_params.ignore_eos and self.token_ids.end_of_turn_token_id is not None:
            stop_ids.add(self.token_ids.end_of_turn_token_id)
        return tuple(sorted(stop_ids))

    def remove_request(self, req_id: str) -> None:
        """Forget a request that finished, was aborted or was preempted."""
        req_idx = self.req_idx_of.pop(req_id, None)
        if req_idx is None:
            return
        slot = self.slots.pop(req_idx)
        if slot.is_lost:
            return
        row = self.canvases.snapshot(req_idx)
        if slot.trace is not None:
            slot.trace.write(self.canvases.tokens_np(req_idx), int(row[COLUMN["stop"]]))
        # A request that reached its end cannot come back.
        emitted, stop = int(row[COLUMN["num_emitted"]]), int(row[COLUMN["stop"]])
        end = min(stop if stop >= 0 else slot.plan.canvas_len, slot.params.max_new_tokens)
        if emitted < end:
            self.stash.put(req_id, row, slot)

    # -- one step ----------------------------------------------------------------------------------------------

    def prepare_inputs_embeds(
        self, scheduled_encoder_inputs: dict[str, list[int]], input_batch: InputBatch, req_states: RequestState
    ) -> torch.Tensor:
        """Embeddings of the step's tokens. [N, hidden]. Not called in text-only mode: see ``prepare_inputs``."""
        self.execute_mm_encoder(scheduled_encoder_inputs)
        return self.embeddings.write(input_batch)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Choose the rows that need vocabulary logits: masked positions that this step may unmask.

        Returns what replaces the runner's inputs: rotary positions where they differ, embeddings in text-only mode.
        """
        self.step = None
        slots: list[RequestSlot] = []
        req_idx: list[int] = []
        row_request: list[np.ndarray] = []
        row_position: list[np.ndarray] = []
        token_rows: list[np.ndarray] = []
        planned: list[int] = []
        for b, index in enumerate(input_batch.idx_mapping_np.tolist()):
            slot = self.slots.get(index)
            if slot is None or slot.req_id != input_batch.req_ids[b]:  # a dummy batch of vLLM's warm-up
                self.forward_plan.reset()
                return self._text_only_inputs(self.dummy_inputs_embeds(input_batch.num_tokens_after_padding))
            start = int(input_batch.num_computed_tokens_np[b])
            stands = Standing(self.canvases, index, slot, self.token_ids.mask_token_id)
            stands.check_schedule(start, int(input_batch.num_scheduled_tokens[b]))
            positions = stands.rows_to_score()
            slots.append(slot)
            req_idx.append(index)
            row_request.append(np.full(len(positions), b))
            row_position.append(positions)
            planned.append(stands.planned_count())
            # A first position whose row is not computed takes the next one, as the reference repeats its first row.
            rows = np.maximum(slot.plan.prompt_len + positions - slot.plan.row_offset, start)
            token_rows.append(input_batch.query_start_loc_np[b] - start + rows)
        input_batch.logits_indices = to_device(np.concatenate(token_rows), self.device)
        # Rows move inside a step with segments, and a captured graph has fixed shapes.
        if self.runs_eagerly and len(input_batch.logits_indices) and not self.pruner.segments:
            self.forward_plan.final_rows = input_batch.logits_indices
        self.forward_plan.keeps_kv = any(slot.plan.keeps_kv for slot in slots)
        query_len = input_batch.num_scheduled_tokens
        self.step = StepBatch(
            slots,
            req_idx,
            input_batch.idx_mapping,
            max(s.plan.canvas_len + s.plan.suffix_len for s in slots),
            np.concatenate(row_request),
            np.concatenate(row_position),
            query_len,
            input_batch.num_computed_tokens_np + query_len,
            np.array(planned, dtype=np.int64),
        )
        inputs = {} if self.supports_mm_inputs else self._text_only_inputs(self.embeddings.write(input_batch))
        if any(slot.rope_positions is not None for slot in slots):
            inputs["positions"] = self._rotary_positions(slots, input_batch)
        return inputs

    def _text_only_inputs(self, embeds: torch.Tensor) -> dict[str, Any]:
        """The embeddings as the runner's inputs where it would take its own token ids instead; else nothing."""
        return {} if self.supports_mm_inputs else {"inputs_embeds": embeds, "input_ids": None}

    def _rotary_positions(self, slots: list[RequestSlot], input_batch: InputBatch) -> torch.Tensor:
        """Rotary positions of a batch in which a pruned request keeps its angles. [N] int64.

        KV slots are fixed by now, from the cache positions.
        """
        positions = input_batch.positions.clone()
        for b, slot in enumerate(slots):
            if slot.rope_positions is not None:
                first, end = input_batch.query_start_loc_np[b : b + 2].tolist()
                start = int(input_batch.num_computed_tokens_np[b])
                positions[first:end] = slot.rope_positions[start : start + end - first]
        return positions

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Inputs of a dummy forward pass."""
        return {"inputs_embeds": self.dummy_inputs_embeds(num_tokens)}

    def dummy_inputs_embeds(self, num_tokens: int) -> torch.Tensor:
        """The embedding buffer, contents unused. [num_tokens, hidden]."""
        return self.embeddings.buffer[:num_tokens]

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Attention metadata of the step, of its own for layers that run on shortened requests; what the layers must
        know is decided here and in ``prepare_inputs``."""
        builder = MetadataBuilder(
            input_batch,
            block_tables,
            attn_groups,
            kv_cache_config,
            self.device,
            self.max_model_len,
            for_capture,
            ubatch_idx,
        )
        rows = self.attention_rows(builder)
        metadata = builder.build(rows, slot_mappings)
        self.pruner.begin(input_batch)
        plan = self.forward_plan
        plan.reset()
        plan.whole_spans = rows.whole_spans()
        plan.observer = self.pruner if self.pruner.active else None
        self.runs_eagerly = cudagraph_mode.name == "NONE" and not for_capture
        for layer in self.pruner.layers():
            removed = self.pruner.removed_behind(layer, input_batch.num_reqs)
            names = {x.self_attn.attn.layer_name for x in self.model.model.layers[layer + 1 :]}
            segment = builder.segment(rows, removed, slot_mappings, self.group_of, names)
            metadata.update(segment.metadata)
            self.pruner.segments[layer] = segment
        return metadata

    def attention_rows(self, builder: MetadataBuilder) -> AttentionRows:
        """Which tokens of the step attend to which.

        A prompt that attends to itself only is a row of its own in the forward pass that computes it.
        """
        batch, rows = builder.input_batch, builder.scheduled
        apart = np.zeros(len(rows.request), dtype=np.int32)
        for b, req_idx in enumerate(batch.idx_mapping_np.tolist()):
            slot = self.slots.get(req_idx)
            if slot is not None and slot.req_id == batch.req_ids[b] and slot.plan.caches_prompt:
                apart[b] = 0 if batch.num_computed_tokens_np[b] else slot.plan.prompt_len
        return rows.with_prompts_apart(apart) if apart.any() else rows

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """Our sampler instead of vLLM's; vLLM's buffers stay reachable through it."""
        return DiffusionSampler(self, sampler), None

    def num_kv_blocks(self, req_idx: int) -> int:
        """KV blocks that the request holds, over all KV cache groups."""
        return int(self.block_tables.num_blocks.np[:, req_idx].sum())


def hash_seed(text: str) -> int:
    """A seed from a string that is the same in every process."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
