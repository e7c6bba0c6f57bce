"""vLLM's scheduler for denoising: whole sequences per step, refresh turns, no truncation.

It sets ``num_computed_tokens`` of a request (see ``request``) to the start of its next step after every step.
"""

from __future__ import annotations

import copy
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus

from vllm_dvlm.canvas_events import KEY as CANVAS_KEY
from vllm_dvlm.canvas_events import attach, canvas_events
from vllm_dvlm.counters import COUNTERS
from vllm_dvlm.kv.groups import set_removed
from vllm_dvlm.kv.release import release_tail
from vllm_dvlm.options import PLACED_KEY, RESUME_KEY
from vllm_dvlm.patches.vllm import p004_waits_that_sleep
from vllm_dvlm.placement import check_lengths, place, read
from vllm_dvlm.request import DiffusionRequest
from vllm_dvlm.settings import ServerSettings
from vllm_dvlm.steps import LOST, Plan, Resume, advance, step_flops

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

logger = init_logger(__name__)


class DiffusionScheduler(Scheduler):
    """vLLM's scheduler for requests that are denoised as a whole."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.vllm_config.device_config.device_type == "cpu":
            p004_waits_that_sleep.install()
        # A step may emit no token at all.
        self.num_sampled_tokens_per_step = 0
        self.settings = ServerSettings.from_additional_config(self.vllm_config.additional_config)
        self.hf_config = self.vllm_config.model_config.hf_config
        self.counters: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()
        self._rejected: set[str] = set()
        # Ids of the latest streamed inputs.
        self._streamed: deque[str] = deque(maxlen=64)
        self._duplicates: list[Request] = []

    # -- admission ---------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Queue a request. Never raises: an exception here would end the engine for everybody."""
        known = self.requests.get(request.request_id)
        if known is None:
            try:
                self._prepare(request)
            except Exception as error:
                # The front end has answered 400 to everything it can know; what it cannot fails this request alone.
                self._reject(request, error)
            super().add_request(request)
        else:
            # vLLM would take it for the next piece of a streamed input and cut the tokens of the request that lives.
            # Ids are unique unless VLLM_DISABLE_REQUEST_ID_RANDOMIZATION is set.
            logger.warning("Request id %s is in use: the second request with it fails", request.request_id)
            if request.client_index != known.client_index:  # else its client could not tell the two apart
                self._duplicates.append(request)

    def _reject(self, request: Request, error: Exception) -> None:
        """Queue a request as one that the next step fails."""
        if isinstance(error, ValueError):
            logger.warning("Request %s cannot be served: %s", request.request_id, error)
        else:  # of our own making, or of a plugin's
            logger.error("Request %s cannot be served", request.request_id, exc_info=error)
        request.__class__ = DiffusionRequest
        request.start(Plan(request.num_prompt_tokens, 0, 0, 1, 1, 1))
        set_removed(self.kv_cache_manager, request.request_id, 0)
        self._rejected.add(request.request_id)

    def _prepare(self, request: Request) -> None:
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None:
            raise ValueError("only text generation from token or text prompts is supported")
        if request.resumable or request.request_id in self._streamed:
            # The end of a streamed input is a request of the same id that looks like any other.
            self._streamed.append(request.request_id)
            raise ValueError("a canvas sees the whole prompt: send it at once, not as a stream of inputs")
        asked = read(params.extra_args, self.settings)
        texts = asked.texts(self._encode, self.hf_config.mask_token_id)
        if max(texts.draft, default=0) >= self.hf_config.vocab_size:
            raise ValueError(f"diffusion_draft contains ids outside the vocabulary of {self.hf_config.vocab_size}")
        room = self.max_model_len - request.num_prompt_tokens
        resolved = place(asked, params.max_tokens, self.settings, room, texts)
        plan = resolved.plan(request.num_prompt_tokens)
        problem = check_lengths(plan, self.max_model_len, self.settings)
        if problem is not None:
            raise ValueError(problem)
        num_visual = sum(feature.mm_position.length for feature in request.mm_features)
        request.__class__ = DiffusionRequest
        num_layers = self.hf_config.num_hidden_layers
        request.start(plan, resolved.pruned_plan(plan, num_visual), resolved.prune_after_layers(num_layers))
        self._allocate_pruned(request)
        request.report["visual_tokens_before"] = request.report["visual_tokens_after"] = num_visual
        request.max_tokens = resolved.max_new_tokens
        request.suffix_ids = list(texts.suffix_ids) if resolved.emits_suffix else []
        if not params.ignore_eos:
            # vLLM knows one end token per tokenizer, <|endoftext|>, which diffusion decoding never produces.
            params._eos_token_id = self.hf_config.end_of_turn_token_id
        request.shows_canvas = resolved.options.diffusion_stream == "provisional"
        request.stop_ids = {params.eos_token_id, *(params.stop_token_ids or ())}
        self._tell_worker(request, PLACED_KEY, resolved.to_mapping())
        self.counters["canvas_positions"] += plan.canvas_len
        self.counters["visual_tokens"] += num_visual

    def _allocate_pruned(self, request: DiffusionRequest) -> None:
        """Late layers with a KV cache group of their own never see what a request prunes inside its first step."""
        if request.pruned_plan is not None and request.prune_layers == self.settings.late_group_start():
            removed = request.plan.total_len - request.pruned_plan.total_len
            set_removed(self.kv_cache_manager, request.request_id, removed)

    def _encode(self, text: str) -> list[int]:
        tokenizer = cached_tokenizer_from_config(self.vllm_config.model_config)
        return tokenizer.encode(text, add_special_tokens=False)

    @staticmethod
    def _tell_worker(request: Request, key: str, value: Any) -> None:
        """Send something along with the request, which has no field for plugins but this map."""
        # A copy: samples of one prompt share their parameters.
        params = copy.copy(request.sampling_params)
        params.extra_args = {**(params.extra_args or {}), key: value}
        request.sampling_params = params

    # -- one step ----------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's ``schedule``, with requests held back that would not fit whole."""
        if self._rejected:
            self._fail_rejected()
        with self._closed_to_new_requests(self._hold_back_what_does_not_fit()):
            output = super().schedule(*args, **kwargs)
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            request = self.requests[req_id]
            # num_computed_tokens has been moved to the end of the query by now.
            assert request.num_computed_tokens == request.step.query_end, "a denoising step was truncated"
            self._count_step(request, num_tokens)
        return output

    def _count_step(self, request: DiffusionRequest, num_tokens: int) -> None:
        kind = "forward_tokens_full" if num_tokens == request.plan.total_len else "forward_tokens_cached"
        flops = step_flops(self.hf_config, request.plan, num_tokens, request.pruned_plan, request.prune_layers)
        for name, amount in (("denoise_steps", 1), (kind, num_tokens), ("flops", flops)):
            self.counters[name] += amount
            request.report[name] += amount
        self._count_for_clients(request)

    def _count_for_clients(self, request: DiffusionRequest) -> None:
        """A step as vLLM's own clients count them, see ``metrics.CLIENT_METRICS``."""
        self.counters["client_steps"] += 1
        self.counters["client_positions"] += request.plan.canvas_len

    def _fail_rejected(self) -> None:
        """Take rejected requests out of the queue; ``update_from_output`` reports them as errors."""
        for req_id in self._rejected:
            request = self.requests.get(req_id)
            if request is not None:
                self.waiting.remove_requests([request])
                self.encoder_cache_mismatch_reqs.add(req_id)
        self._rejected.clear()

    def _hold_back_what_does_not_fit(self) -> bool:
        """Skip, for one step, running requests whose whole query exceeds what is left of the token budget.

        vLLM would cut the query to the budget, chunked prefill or not, and half a denoising step is wrong. In the order
        of admission, so nobody waits for a request that came later. Returns True if any is held back.
        """
        budget, is_any_held = self.max_num_scheduled_tokens, False
        for request in self.running:
            need = request.num_tokens_with_spec - request.num_computed_tokens
            if need > budget:
                # schedule() advances current_step before it compares: this skips exactly the coming call.
                request.next_decode_eligible_step = self.current_step + 2
                is_any_held = True
            else:
                budget -= need
        return is_any_held

    @contextmanager
    def _closed_to_new_requests(self, is_closed: bool) -> Iterator[None]:
        """Admit nobody inside: more requests than one step can hold would keep KV blocks and wait for each other."""
        most = self.max_num_active_reqs
        if is_closed:
            self.max_num_active_reqs = len(self.running)
        try:
            yield
        finally:
            self.max_num_active_reqs = most

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """vLLM's rule, but a request whose images do not all fit waits instead of running a part of its prompt."""
        # A preempted request that was pruned comes back shorter than its images, which lie in the original prompt.
        window = max(num_new_tokens, request.num_prompt_tokens)
        images, end, *rest = super()._try_schedule_encoder_inputs(request, num_computed_tokens, window, *args, **kwargs)
        if end < window:
            budget = args[0] if args else kwargs["encoder_compute_budget"]
            return [], 0, budget, [], []
        return images, num_new_tokens, *rest

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Canvases live on the worker; nothing to take over."""

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, then the start of every request's next step."""
        # Pruning time, see ``DiffusionSampler``; taken first, since a request may end in this very step.
        lost = []
        for req_id, spent_us in (model_runner_output.num_nans_in_logits or {}).items():
            request = self.requests.get(req_id)
            if request is not None and spent_us == LOST:
                lost.append(request)
            elif request is not None and spent_us:
                self.counters["prune_us"] += spent_us
                request.report["prune_ms"] = spent_us / 1000
        model_runner_output.num_nans_in_logits = None
        views, model_runner_output.sampling_masks = model_runner_output.sampling_masks, None
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in self._duplicates:
            own = outputs.setdefault(request.client_index, EngineCoreOutputs())
            own.outputs.append(EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR))
        self._duplicates.clear()
        for request in lost:
            if request.status == RequestStatus.RUNNING:
                self._restart(request)
        sampled = model_runner_output.sampled_token_ids
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(req_id)
            # Finished in this step, aborted, or preempted while it was computed: there is no next step to prepare.
            if request is None or request.status != RequestStatus.RUNNING:
                continue
            index = model_runner_output.req_id_to_index.get(req_id)
            num_new = len(sampled[index]) if sampled and index is not None else 0
            if request.pruned_plan is not None:
                self._shorten(request)
            request.move_to(advance(request.plan, request.position, num_new))
            request.num_computed_tokens = request.step.query_start
            request.needs_encoder = request.restarts = False
            if num_new and request.sampling_params.stop:
                attach(outputs, request, {"dvlm": dict(request.report)})  # a stop string ends it in the front end
            if request.shows_canvas:
                view = (views or {}).get(index)
                if shown := canvas_events(request, view, self.hf_config.mask_token_id):
                    attach(outputs, request, {CANVAS_KEY: shown}, is_new=view is not None)
        return outputs

    def _restart(self, request: DiffusionRequest) -> None:
        """Send a request again that the worker does not know any more, from the tokens that the user has.

        The worker keeps what a preempted request had, but not without bound. The step in which it says that this is
        gone computes nothing; the request then goes back to the queue, since it may need more KV blocks than it holds.
        """
        logger.warning("Request %s was preempted and its canvas is gone: it restarts", request.request_id)
        request.restart()
        self._allocate_pruned(request)
        self.running.remove(request)
        self._preempt_request(request, time.monotonic())

    def _shorten(self, request: DiffusionRequest) -> None:
        """After its first step a request that prunes is as long as its survivors; the rest of its KV goes back.

        The worker has moved the kept rows by now: the step's output is here.
        """
        removed = request.plan.prompt_len - request.pruned_plan.prompt_len
        request.plan, request.pruned_plan = request.pruned_plan, None
        # From here on the request is counted at its pruned length for all layers.
        set_removed(self.kv_cache_manager, request.request_id, 0)
        before = self._num_kv_blocks(request)
        freed = release_tail(self.kv_cache_manager, request.request_id, request.plan.total_len)
        if "kv_blocks_freed" not in request.report:  # one that has restarted counts once
            self.counters["requests_pruned"] += 1
            self.counters["visual_tokens_pruned"] += removed
            self.counters["kv_blocks_before"] += before
            self.counters["kv_blocks_freed"] += freed
        request.report["visual_tokens_after"] -= removed
        request.report |= {"kv_blocks_before": before, "kv_blocks_freed": freed, "kv_blocks_after": before - freed}

    def _num_kv_blocks(self, request: Request) -> int:
        managers = self.kv_cache_manager.coordinator.single_type_managers
        return sum(len(manager.req_to_blocks[request.request_id]) for manager in managers)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Free a request and hand its report to the front end.

        vLLM's replies carry one free-form object from the engine core, ``kv_transfer_params``; these models have no KV
        transfer, so it is ours.
        """
        set_removed(self.kv_cache_manager, request.request_id, 0)
        # Aborted before it was refused; its id may be used again.
        self._rejected.discard(request.request_id)
        self.encoder_cache_mismatch_reqs.discard(request.request_id)
        if request.report["denoise_steps"]:
            self._count_for_clients(request)  # the step that commits
        super()._free_request(request, *args, **kwargs)
        pruned = {} if request.pruned_event is None else {CANVAS_KEY: {"pruned": request.pruned_event}}
        return {"dvlm": request.report} | pruned, None

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        """vLLM's stop check, which the suffix passes unchecked: stop tokens count in the canvas alone (point 30).

        Counted here, since a step's statistics are made before ``update_from_output`` ends.
        """
        check = super()._update_request_with_output
        first, end = request.suffix_of(new_token_ids)
        if first == end:
            new_token_ids, stopped = check(request, new_token_ids, *args, **kwargs)
        else:
            # The canvas before the suffix holds no stop token and is within max_tokens.
            request.append_output_token_ids(new_token_ids[:end])
            stopped = True
            if end == len(new_token_ids):
                request.status = RequestStatus.FINISHED_LENGTH_CAPPED
            else:
                check(request, new_token_ids[end:], *args, **kwargs)
        self.counters["committed_tokens"] += len(new_token_ids)
        return new_token_ids, stopped

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Preempt; the worker will be told that the request comes back, and where it stands."""
        request.needs_encoder = True
        self._tell_worker(request, RESUME_KEY, Resume(request.position, request.restarts).to_list())
        super()._preempt_request(request, *args, **kwargs)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics with what our counters grew by since the last ones.

        SchedulerStats has no field for plugins and is decoded as exactly this class in the front end. Its one free
        map of names to integers is that of LoRA adapters, which these models refuse. Each SchedulerStats goes to one
        of the API servers, so these are increments: totals would add up to too much.
        """
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.running_lora_adapters = {name: self.counters[name] - self._reported[name] for name in COUNTERS}
            self._reported = self.counters.copy()
        return stats
