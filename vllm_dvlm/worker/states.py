"""Per-request worker state: pre-allocated tensors, add and remove only.

The integers of all requests live in one tensor, and one copy of the batch's rows mirrors them to the host. Where the
engine has waited for the step's output, the copy is complete before the next step begins and reading the mirror costs
nothing. Ranks whose output nobody reads (tensor parallelism) wait for the copy itself.

S = request slots, C = widest canvas (suffix included).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_dvlm.denoise.step import Canvases
from vllm_dvlm.placement import MASKED, ResolvedParams, Texts
from vllm_dvlm.steps import Plan, Position, VisualSpan
from vllm_dvlm.worker.transfer import to_device

if TYPE_CHECKING:
    from vllm import SamplingParams

    from vllm_dvlm.worker.logprobs import LogprobTable
    from vllm_dvlm.worker.trace import TraceRecorder

# Columns before the canvas tokens, in the order of the fields of ``Canvases`` after ``tokens``.
FIELDS = (
    "canvas_len",
    "suffix_len",
    "prompt_len",
    "block_len",
    "steps_per_block",
    "refresh_interval",
    "block_start",
    "step_in_block",
    "num_emitted",
    "stop",
    "num_masked_at_start",
    "caches_prompt",
)
COLUMN = {name: i for i, name in enumerate(FIELDS)}
NUM_FIELDS = len(FIELDS)


@dataclass
class RequestSlot:
    """What the worker knows of one request beside its row of integers.

    prompt_embeds: [prompt, hidden] merged prompt embeddings, filled in the first step (set by model_state).
    pruned_plan: the course after pruning, until that has happened.
    kept_rows: [prompt after pruning] int64 rows of the original prompt that survived, once it is pruned.
    rope_positions: [prompt + canvas + suffix] int64 rotary positions, where they differ from the cache positions.
    noise_seed: seeds the request's noise together with the step number; None at temperature 0 without need of noise.
    images: what ``image_maps.describe_images`` says, for requests that prune or are traced; else empty.
    logprobs: log-probabilities of the canvas, for requests that want them.
    is_lost: the request came back and what was kept of it is gone. Such a slot lives for one step, in which it only
        says so.
    """

    req_id: str
    params: ResolvedParams
    sampling_params: SamplingParams
    plan: Plan
    prompt_token_ids: list[int]
    visual_spans: list[VisualSpan]
    stop_token_ids: tuple[int, ...]
    noise_seed: int
    pruned_plan: Plan | None = None
    num_steps: int = 0
    kept_rows: torch.Tensor | None = None
    rope_positions: torch.Tensor | None = None
    prompt_embeds: torch.Tensor | None = None
    images: list[dict[str, Any] | None] = field(default_factory=list)
    logprobs: LogprobTable | None = None
    is_lost: bool = False
    trace: TraceRecorder | None = None


class CanvasStates:
    """Integers of all request slots, on the device and mirrored on the host."""

    def __init__(
        self, max_num_reqs: int, max_canvas_len: int, device: torch.device, is_apart: bool | None = None
    ) -> None:
        """is_apart: the mirror is memory of its own. None: unless the device is the host."""
        self.device = device
        self.max_canvas_len = max_canvas_len
        shape = (max_num_reqs, NUM_FIELDS + max_canvas_len)
        self.rows = torch.zeros(shape, dtype=torch.int64, device=device)
        self.threshold = torch.full((max_num_reqs,), float("nan"), dtype=torch.float64, device=device)
        # Of written positions, for requests whose stream shows their canvas; nan where no step has written.
        self.confidence = torch.full((max_num_reqs, max_canvas_len), float("nan"), device=device)
        self.is_apart = device.type != "cpu" if is_apart is None else is_apart
        self._mirror = np.zeros(shape, dtype=np.int64) if self.is_apart else self.rows.numpy()
        # Rows of the last step on their way to the host, and whose they are.
        self._arriving: tuple[list[int], torch.Tensor] | None = None
        self._staging, self._copied = torch.empty(0), None
        if self.is_apart:
            on_gpu = device.type == "cuda"
            self._staging = torch.empty(self.rows.numel(), dtype=torch.int64, pin_memory=on_gpu)
            self._copied = torch.cuda.Event() if on_gpu else None

    @property
    def mirror_np(self) -> np.ndarray:
        """[S, NUM_FIELDS + C] int64 on the host, as of the last step."""
        if self._arriving is not None:
            if self._copied is not None:
                self._copied.synchronize()
            req_idx, rows = self._arriving
            self._mirror[req_idx, : rows.shape[1]] = rows.numpy()
            self._arriving = None
        return self._mirror

    def add(
        self,
        req_idx: int,
        plan: Plan,
        mask_token_id: int,
        texts: Texts,
        num_emitted_suffix: int,
        threshold: float | None,
        start: Position | None = None,
        emitted: Sequence[int] = (),
    ) -> None:
        """Reset a slot to a canvas of which nothing but the draft and the emitted tokens is known.

        num_emitted_suffix: tokens of the suffix handed out at the end. start, emitted: where a request that restarts
        goes on, and the first ``start.num_emitted`` tokens of its canvas.
        """
        start = start or plan.start
        row = np.zeros(NUM_FIELDS + self.max_canvas_len, dtype=np.int64)
        for name, value in (
            ("canvas_len", plan.canvas_len),
            ("suffix_len", num_emitted_suffix),
            ("prompt_len", plan.prompt_len),
            ("block_len", plan.block_len),
            ("steps_per_block", plan.steps_per_block or 0),
            ("refresh_interval", plan.refresh_interval),
            ("block_start", start.block_start),
            ("step_in_block", start.step_in_block),
            ("num_emitted", start.num_emitted),
            ("stop", -1),
            ("caches_prompt", int(plan.caches_prompt)),
        ):
            row[COLUMN[name]] = value
        row[NUM_FIELDS : NUM_FIELDS + plan.canvas_len] = mask_token_id
        draft = np.array(texts.draft, dtype=np.int64)
        row[NUM_FIELDS : NUM_FIELDS + len(draft)] = np.where(draft == MASKED, mask_token_id, draft)
        row[NUM_FIELDS : NUM_FIELDS + len(emitted)] = emitted
        row[NUM_FIELDS + plan.canvas_len : NUM_FIELDS + plan.canvas_len + plan.suffix_len] = texts.suffix_ids
        self.restore(req_idx, row, threshold)

    def restore(self, req_idx: int, row: np.ndarray, threshold: float | None) -> None:
        """Write a whole row, for example one that ``snapshot`` returned before a preemption."""
        self.mirror_np[req_idx] = row
        if self.is_apart:
            self.rows[req_idx] = to_device(row, self.device)
        self.threshold[req_idx] = float("nan") if threshold is None else threshold
        self.confidence[req_idx] = float("nan")

    def snapshot(self, req_idx: int) -> np.ndarray:
        """Copy of a slot's row as of the last step. [NUM_FIELDS + C] int64."""
        return self.mirror_np[req_idx].copy()

    def position(self, req_idx: int) -> Position:
        """Where the slot stands, from the host mirror."""
        row = self.mirror_np[req_idx]
        return Position(
            int(row[COLUMN["block_start"]]), int(row[COLUMN["step_in_block"]]), int(row[COLUMN["num_emitted"]])
        )

    def tokens_np(self, req_idx: int) -> np.ndarray:
        """Canvas and suffix tokens of a slot, from the host mirror. [C] int64, a view."""
        return self.mirror_np[req_idx, NUM_FIELDS:]

    def is_masked(self, req_idx: int, canvas_len: int, mask_token_id: int) -> torch.Tensor:
        """Masked positions of a slot's canvas, on the device. [canvas_len] bool."""
        return self.rows[req_idx, NUM_FIELDS : NUM_FIELDS + canvas_len] == mask_token_id

    def gather(self, idx: torch.Tensor, width: int) -> Canvases:
        """The batch's canvases. idx: [R] int64 slots; width: columns of tokens to take."""
        rows = self.rows[idx]
        columns = rows[:, :NUM_FIELDS].unbind(1)
        return Canvases(rows[:, NUM_FIELDS : NUM_FIELDS + width], *columns)

    def scatter(self, idx: torch.Tensor, req_idx: Sequence[int], canvases: Canvases) -> None:
        """Store the batch's canvases and start the copy to the host. idx: [R] int64, on the host as ``req_idx``."""
        columns = torch.stack([getattr(canvases, name) for name in FIELDS], dim=1)
        new = torch.cat([columns, canvases.tokens], dim=1)
        self.rows[idx, : new.shape[1]] = new
        if self.is_apart:
            self.mirror_np  # noqa: B018  what the last step sent must have been taken before its place is used again
            rows = self._staging[: new.numel()].view(new.shape)
            rows.copy_(new, non_blocking=True)
            if self._copied is not None:
                self._copied.record()
            self._arriving = list(req_idx), rows
