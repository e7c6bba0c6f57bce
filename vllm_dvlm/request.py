"""A request that is denoised as a whole.

vLLM's scheduler lets every request catch up from ``num_computed_tokens`` to ``num_tokens_with_spec``. A denoising
step computes a range of the sequence, ``steps.step_at``, and this subclass says where that range ends.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.request import Request, RequestStatus

from vllm_dvlm.steps import Plan, Position, Step, restart_position, step_at


class DiffusionRequest(Request):
    """A request with its physical length: prompt, canvas and suffix.

    vLLM builds requests in the engine core without a factory hook, so ``DiffusionScheduler.add_request`` changes the
    class of an existing object and then calls ``start``.
    """

    plan: Plan
    pruned_plan: Plan | None
    whole_plan: Plan
    first_pruned_plan: Plan | None
    prune_layers: int | None
    position: Position
    step: Step
    restarts: bool
    needs_encoder: bool
    report: dict[str, int]
    shows_canvas: bool
    pruned_event: dict[str, Any] | None
    suffix_ids: list[int]
    stop_ids: set[int | None]

    def start(self, plan: Plan, pruned_plan: Plan | None = None, prune_layers: int | None = None) -> None:
        """Attach the course of the request, before and after pruning; called once, before the request is queued.

        ``report`` is what the reply tells about the request. prune_layers: see ``steps.step_flops``. ``step`` is what
        the next denoising step computes.
        """
        self.plan = self.whole_plan = plan
        self.pruned_plan = self.first_pruned_plan = pruned_plan
        self.prune_layers = prune_layers
        self.report = dict.fromkeys(("denoise_steps", "forward_tokens_full", "forward_tokens_cached", "flops"), 0)
        self.move_to(plan.start)
        self.restarts = False
        self.needs_encoder = True
        self.shows_canvas = False
        self.pruned_event = None
        self.suffix_ids = []
        self.stop_ids = set()

    def move_to(self, position: Position) -> None:
        """Stand at ``position`` of the plan as it is now."""
        self.position = position
        self.step = step_at(self.plan, position)

    def restart(self) -> None:
        """Go back to what the emitted tokens say; a request that was pruned is whole again and prunes once more."""
        self.plan, self.pruned_plan = self.whole_plan, self.first_pruned_plan
        self.move_to(restart_position(self.plan, self.position.num_emitted))
        self.restarts = True
        self.report["visual_tokens_after"] = self.report["visual_tokens_before"]

    def suffix_of(self, new_token_ids: list[int]) -> tuple[int, int]:
        """Where the suffix lies in a step's tokens, [first, end); (0, 0) if the step does not end the canvas.

        The worker hands it out last, behind it only the stop token (``denoise.step``). Before the end no token is a
        stop token, and a canvas without one ends at its full length.
        """
        size, num = len(self.suffix_ids), len(new_token_ids)
        left = self.plan.canvas_len - self.position.num_emitted
        # In this order: a suffix that itself ends with a stop token also looks like the second case.
        is_whole = num == left + size and (left == 0 or new_token_ids[left - 1] not in self.stop_ids)
        if size and is_whole and new_token_ids[left:] == self.suffix_ids:
            return left, num
        if size and num > size and new_token_ids[-1] in self.stop_ids:
            first = num - 1 - size
            if new_token_ids[first:-1] == self.suffix_ids:
                return first, num - 1
        return 0, 0

    @property
    def num_tokens(self) -> int:
        """What admission budgets and allocates for (whole sequence), what stop checks count while running."""
        if self.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            return self.plan.total_len
        return len(self._all_token_ids)

    @property
    def num_tokens_with_spec(self) -> int:
        """End of the next denoising step's query."""
        return self.step.query_end

    @property
    def has_encoder_inputs(self) -> bool:
        """True until the worker has merged the images into the prompt embeddings; it keeps those."""
        return self.needs_encoder and bool(self.mm_features)
