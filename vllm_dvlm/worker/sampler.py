"""vLLM's sampler call: hidden states of masked rows in, updated canvases and emitted tokens out.

The model's ``compute_logits`` hands the hidden states through, so that vocabulary logits are made here, chunk by
chunk, and never exist for a whole batch.

R = requests, W = widest canvas of the batch (suffix included), V = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm import envs
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_dvlm.denoise.confidence import (
    CONFIDENCE,
    choose_kept,
    choose_tokens,
    forbid,
    greedy_low_confidence,
    greedy_parts,
    join_parts,
    random_confidence,
)
from vllm_dvlm.denoise.noise import row_keys
from vllm_dvlm.denoise.step import StepOutput, candidates, take_step
from vllm_dvlm.steps import LOST
from vllm_dvlm.worker.canvas_views import views_of
from vllm_dvlm.worker.logprobs import RowLogprobs, collect, row_logprobs, rows_of
from vllm_dvlm.worker.transfer import to_device

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_dvlm.worker.shared import WorkerState
    from vllm_dvlm.worker.states import RequestSlot
    from vllm_dvlm.worker.step_batch import StepBatch


@dataclass
class _NoPenalties:
    """The one field that the runner reads of vLLM's penalties state: None means 'do not count tokens'."""

    output_bin_counts: None = None


@dataclass
class _Proposals:
    """What the logits say about the scored positions: tokens and confidences, both [R, W]."""

    tokens: torch.Tensor
    confidence: torch.Tensor
    logprobs: list[RowLogprobs] = field(default_factory=list)


class DiffusionSampler:
    """One denoising step for every request of the batch."""

    compute_nans = False

    def __init__(self, model_state: WorkerState, sampler: Any) -> None:
        self.state = model_state
        self.model = model_state.model
        # Read by the runner for features of vLLM's own sampler that we leave alone.
        self.sampling_states = sampler.sampling_states
        self.logprob_token_ids_state = sampler.logprob_token_ids_state
        self.penalties_state = _NoPenalties()
        self.req_states = sampler.req_states
        ids = model_state.token_ids
        device = model_state.device
        self.mask_token_id = ids.mask_token_id
        self.forbidden = torch.tensor(sorted(ids.forbidden_token_ids), dtype=torch.int64, device=device)
        self.rows_per_chunk = self._rows_per_chunk()
        self.is_sharded = get_tensor_model_parallel_world_size() > 1
        # Logits of plain rows to (token, confidence). An attribute, so that a bench can time it.
        self.reduce = greedy_low_confidence
        self._stop_ids_key: list[tuple[int, ...]] = []
        self._stop_ids = torch.empty(0)

    def _rows_per_chunk(self) -> int:
        """Rows of vocabulary logits made at once.

        On a CPU a chunk should stay in the cache between its passes (8 MiB: 0.3 ms a row, 24 MiB: 0.5 ms), unless
        reading the output layer's weights once more per chunk costs more than that; and glibc hands blocks above
        32 MiB back to the system at once, so that each chunk would touch fresh pages. A GPU wants large matrices.
        """
        config = self.state.model_config
        row_bytes = 4 * config.get_vocab_size()
        bound = self.state.settings.logits_chunk_bytes
        if bound is None and self.state.device.type == "cpu":
            bound = min(32 * 2**20, max(8 * 2**20, row_bytes * config.get_hidden_size() // 4))
        return max(1, (bound or 256 * 2**20) // row_bytes)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Requests are kept by the model state."""

    def apply_staged_writes(self) -> None:
        """Nothing is staged here."""

    def __call__(self, hidden_states: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        """hidden_states: [rows, hidden] of the step's ``logits_indices``."""
        step = self.state.step
        if step is None:
            return self._dummy(hidden_states, input_batch.num_reqs)
        self.state.step = None
        canvases = self.state.canvases.gather(step.idx, step.width)
        if self.state.pruner.active:
            # The next step of a request that prunes now starts in the shorter sequence.
            lengths = [(s.pruned_plan if prunes else s.plan).prompt_len for s, prunes in step.pruning()]
            canvases.prompt_len = to_device(lengths, canvases.prompt_len.device)
        proposals = self._propose(step, canvases.tokens, hidden_states)
        out = take_step(
            canvases,
            proposals.tokens,
            proposals.confidence,
            self.state.canvases.threshold[step.idx],
            self._stop_token_ids(step),
            self.mask_token_id,
            self._planned(step),
        )
        lost = [i for i, slot in enumerate(step.slots) if slot.is_lost]
        if lost:  # they computed nothing, so they say nothing
            index = to_device(lost, out.num_emitted.device)
            out.num_emitted[index] = out.next_start[index] = 0
        self.state.canvases.scatter(step.idx, step.req_idx, out.canvases)
        logprobs = collect(step.slots, proposals.logprobs, out)
        report, jobs = None, list(self.state.pruner.jobs)
        if self.state.pruner.active:
            still_masked, _ = candidates(out.canvases, self.mask_token_id)
            report = self.state.pruner.complete(still_masked, out)
        if lost:
            report = torch.zeros(len(step.slots), dtype=torch.int32) if report is None else report
            report[lost] = LOST
        self._record_traces(step, proposals, out)
        views = views_of(step, self.state.canvases, proposals.confidence, out, jobs)
        for slot in step.slots:
            slot.num_steps += 1
            if slot.plan.caches_prompt:  # its KV is there for the rest of the request
                slot.prompt_embeds = None
        return SamplerOutput(
            sampled_token_ids=out.emitted,
            logprobs_tensors=logprobs,
            sampling_mask_tensors=views,
            # The one free number per request on the way to the scheduler, which takes it out; NaNs are not counted.
            num_nans=report if lost or not envs.VLLM_RAISE_ON_LOGIT_NANS else None,
            num_sampled=out.num_emitted.to(torch.int32),
            # The runner adds query_len - num_rejected to the computed tokens; that lands on next_start.
            num_rejected=(input_batch.seq_lens[: len(step.slots)] - out.next_start).to(torch.int32),
        )

    def _dummy(self, hidden_states: torch.Tensor, num_reqs: int) -> SamplerOutput:
        """Answer of a dummy batch: one chunk of every kind, so that memory profiling sees their size; no tokens."""
        if hidden_states.shape[0]:
            for is_special in (False, True):
                # The memory of a CPU host is not measured this way, so one row is enough there.
                on_host = hidden_states.device.type == "cpu"
                most = self.state.max_num_reqs * self.state.settings.max_canvas_length
                num_rows = 1 if on_host else min(self._chunk_rows(is_special), most)
                logits = self._logits(hidden_states[:1].repeat(num_rows, 1)).contiguous()
                if is_special:
                    tokens = logits.argmax(dim=1)
                    num = self.state.model_config.max_logprobs
                    row_logprobs(logits, tokens, num if num >= 0 else logits.shape[1])
                    for measure in CONFIDENCE.values():
                        measure(logits, tokens)
                    choose_tokens(logits, 1.0, row_keys(0, 0, tokens))
                else:
                    self.reduce(logits)
                del logits
        zeros = torch.zeros(num_reqs, dtype=torch.int32, device=hidden_states.device)
        tokens = torch.zeros(num_reqs, 1, dtype=torch.int64, device=hidden_states.device)
        return SamplerOutput(tokens, None, None, zeros, zeros.clone())

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, V] float32; ids unknown to the tokenizer are -inf, the reference cuts them."""
        logits = self.model.vocab_logits(hidden_states)
        # Rows behind the tokenizer's last id are set aside rather than sliced off: the row stays contiguous.
        if not self.state.family.scores_unknown_rows:
            logits[:, self.state.token_ids.num_tokens :] = float("-inf")
        return logits.float()

    def _propose(self, step: StepBatch, tokens: torch.Tensor, hidden_states: torch.Tensor) -> _Proposals:
        proposed = tokens.clone()
        confidence = torch.full(tokens.shape, float("-inf"), dtype=torch.float64, device=tokens.device)
        out = _Proposals(proposed, confidence)
        for first, end in self._runs(step):
            request = int(step.row_request[first])
            slot = step.slots[request]
            index = np.stack([step.row_request[first:end], step.row_position[first:end]])
            request_idx, position = to_device(index, tokens.device)
            hidden = hidden_states[first:end]
            if self._is_plain(slot) and slot.logprobs is None and self.is_sharded:
                chosen, conf = self._choose_plain_over_ranks(step, hidden, first, end)
            elif self._is_plain(slot):
                logits = forbid(self._logits(hidden), self.forbidden)
                self._unstall(step, logits, first, end)
                if slot.logprobs is not None:  # before the logits are used up
                    out.logprobs.append(rows_of(request, slot, position, logits, logits.argmax(dim=1)))
                chosen, conf = self.reduce(logits)
            else:
                logits = forbid(self._logits(hidden), self.forbidden)
                own = logits if slot.logprobs is None else logits.clone()
                chosen, conf = self._choose_special(step, request, own, position)
                if slot.logprobs is not None:
                    out.logprobs.append(rows_of(request, slot, position, logits, chosen))
            proposed[request_idx, position] = chosen
            confidence[request_idx, position] = conf.double()
        return out

    def _choose_plain_over_ranks(
        self, step: StepBatch, hidden: torch.Tensor, first: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Plain rows, each rank over its own words: three numbers a row travel between ranks, not the vocabulary."""
        words = self.model.own_words
        logits = self.model.own_logits(hidden)
        known = len(words)
        if not self.state.family.scores_unknown_rows:
            known = min(known, max(0, self.state.token_ids.num_tokens - words.start))
        logits[:, known:] = float("-inf")
        logits = forbid(logits.float(), self.forbidden_here)
        if self.mask_token_id in words:
            self._unstall(step, logits, first, end, self.mask_token_id - words.start)
        tokens, best, rest = greedy_parts(logits)
        # float32 holds ids up to 2**24 exactly; the CPU's gather through shared memory knows no float64.
        own = torch.stack([(tokens + words.start).float(), best, rest])
        tokens, best, rest = tensor_model_parallel_all_gather(own[None], 0).double().unbind(1)
        return join_parts(tokens, best, rest)

    @cached_property
    def forbidden_here(self) -> torch.Tensor:
        """Forbidden ids among this rank's words, counted from its first one."""
        words = self.model.own_words
        return self.forbidden[(self.forbidden >= words.start) & (self.forbidden < words.stop)] - words.start

    def _is_plain(self, slot: RequestSlot) -> bool:
        """True for greedy requests with the standard confidence over the whole vocabulary."""
        options = slot.params.options
        is_greedy = slot.sampling_params.temperature == 0 and options.diffusion_remasking == "low_confidence"
        return is_greedy and not self.state.family.has_top_k_top_p

    def _runs(self, step: StepBatch) -> list[tuple[int, int]]:
        """Cut the rows into chunks that fit the memory bound; requests with settings of their own stand alone."""
        runs: list[tuple[int, int]] = []
        start, requests = 0, step.row_request
        plain = np.array([self._is_plain(s) and s.logprobs is None for s in step.slots])
        # A cut wherever a special request begins or ends.
        kind = np.where(plain[requests], -1, requests) if len(requests) else requests
        cuts = [*(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(requests)]
        for cut in cuts:
            size = self._chunk_rows(is_special=start < cut and bool(kind[start] >= 0))
            runs += [(i, min(i + size, cut)) for i in range(start, cut, size)]
            start = cut
        return runs

    def _chunk_rows(self, is_special: bool) -> int:
        """Rows of a chunk. Noise, other confidences and logprobs take copies of it; where it is large, less."""
        size = self.rows_per_chunk
        return size // 4 if is_special and size > 128 else size

    def _choose_special(
        self, step: StepBatch, request: int, logits: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and confidences of one request with noise, another confidence or a forbidden mask token."""
        slot = step.slots[request]
        if self._must_not_stall(step, request):
            logits[:, self.mask_token_id] = float("-inf")
        keys = row_keys(slot.noise_seed, slot.num_steps, position)
        remasking, asked = slot.params.options.diffusion_remasking, slot.sampling_params
        is_random = remasking == "random"
        if self.state.family.has_top_k_top_p:
            top_k = asked.top_k if asked.top_k > 0 else slot.params.top_k
            name = "low_confidence" if is_random else remasking
            chosen, conf = choose_kept(logits, name, asked.temperature, top_k, asked.top_p, keys)
        else:
            chosen = choose_tokens(logits, asked.temperature, keys)
            conf = None if is_random else CONFIDENCE[remasking](logits, chosen)
        if is_random:
            conf = random_confidence(keys)
        return chosen, conf

    def _unstall(
        self, step: StepBatch, logits: torch.Tensor, first: int, end: int, mask_column: int | None = None
    ) -> None:
        """mask_column: of the mask token in ``logits``, its id unless given."""
        requests = step.row_request[first:end]
        column = self.mask_token_id if mask_column is None else mask_column
        for request in np.unique(requests).tolist():
            if self._must_not_stall(step, request):
                # Numbers and not flags: where flags are set, the device would have to be asked.
                logits[to_device(np.flatnonzero(requests == request), logits.device), column] = float("-inf")

    def _must_not_stall(self, step: StepBatch, request: int) -> bool:
        """True if a block in threshold mode took as many steps as it has positions.

        Every step fills a position unless it predicts the mask token; the reference would then go on for ever
        (golden README point 45). From here on the mask token is forbidden, so the block ends.
        """
        slot = step.slots[request]
        if slot.params.options.diffusion_threshold is None:
            return False
        position = self.state.canvases.position(step.req_idx[request])
        return position.step_in_block >= slot.plan.block_len

    def _planned(self, step: StepBatch) -> torch.Tensor | None:
        """Counts of schedules that are not uniform, on the device; None if no request has one."""
        if (step.planned < 0).all():
            return None
        return to_device(step.planned, self.state.device)

    def _stop_token_ids(self, step: StepBatch) -> torch.Tensor:
        """[R, K] int64, ascending, padded with -1 in front; made anew only when the batch's requests change."""
        key = [s.stop_token_ids for s in step.slots]
        if key != self._stop_ids_key:
            width = max(1, *(len(ids) for ids in key))
            rows = [[*[-1] * (width - len(ids)), *ids] for ids in key]
            self._stop_ids = to_device(np.array(rows, dtype=np.int64), self.state.device)
            self._stop_ids_key = key
        return self._stop_ids

    def _record_traces(self, step: StepBatch, proposals: _Proposals, out: StepOutput) -> None:
        """Waits for the device; only for requests that are traced."""
        for request, slot in enumerate(step.slots):
            if slot.trace is None:
                continue
            positions = out.committed[request].nonzero()[:, 0]
            canvases, req_idx = self.state.canvases, step.req_idx[request]
            slot.trace.record_step(
                positions=positions.tolist(),
                token_ids=proposals.tokens[request, positions].tolist(),
                confidence=proposals.confidence[request, positions].tolist(),
                query_len=int(step.query_len[request]),
                kv_len=int(step.kv_len[request]),
                kv_blocks=self.state.num_kv_blocks(req_idx),
                after=canvases.position(req_idx),
            )
            # An engine without further work does not tell its worker that a request is over, so what the worker can
            # see for itself is written at once; aborts and stop strings follow with the next step.
            emitted = canvases.position(req_idx).num_emitted
            if out.finished[request] or emitted >= slot.params.max_new_tokens:
                slot.trace.write(canvases.tokens_np(req_idx), int(out.canvases.stop[request]))
