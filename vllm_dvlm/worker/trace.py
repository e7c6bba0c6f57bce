"""Trace of one request: what every denoising step did. Golden tests, pictures and debugging read it.

Format: one JSON object per request, ``<request id>.json``; the steps' ``pos``, ``ids`` and ``conf`` are as in the
golden cases.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm import envs
from vllm.logger import init_logger

from vllm_dvlm.steps import Plan, Position, step_flops

if TYPE_CHECKING:
    from vllm_dvlm.worker.states import RequestSlot
    from vllm_dvlm.worker.step_batch import PruneJob

logger = init_logger(__name__)

# File systems take 255 bytes, some of which a temporary file's name needs.
_LONGEST_NAME = 200
_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}$")


def client_request_id(req_id: str) -> str:
    """The id the client sees: the engine's id without the random suffix that vLLM adds to it."""
    if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION:
        return req_id
    return _RANDOM_SUFFIX.sub("", req_id)


def file_name(request_id: str) -> str:
    """A name for the request's files: nothing of it names a folder, and it is short enough for any file system."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", request_id).lstrip(".") or "request"
    if len(name) > _LONGEST_NAME:
        digest = hashlib.sha256(request_id.encode()).hexdigest()[:16]
        name = f"{name[: _LONGEST_NAME - 17]}-{digest}"
    return name


def check_folder(trace_dir: str) -> None:
    """Make the folder; ValueError with the remedy if traces cannot be written there."""
    try:
        Path(trace_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=trace_dir):
            pass
    except OSError as error:
        raise ValueError(f"trace_dir {trace_dir!r} cannot be written to ({error}); name another folder") from error


class TraceRecorder:
    """Collects the steps of one request and writes the file when it ends."""

    def __init__(self, trace_dir: str, slot: RequestSlot, hf_config: Any) -> None:
        # Clients choose part of the id (X-Request-Id): nothing of it may name a folder.
        self.path = Path(trace_dir) / f"{file_name(client_request_id(slot.req_id))}.json"
        self.plan = slot.plan
        self.hf_config = hf_config
        self.position = slot.plan.start
        self.header = {
            "request_id": client_request_id(slot.req_id),
            "options": {
                **asdict(slot.params.options),
                "diffusion_canvas_length": slot.params.canvas_len,
                "diffusion_block_length": slot.params.block_len,
                "diffusion_max_steps": slot.params.max_steps,
                "temperature": slot.sampling_params.temperature,
                "max_tokens": slot.params.max_tokens,
            },
            "prompt_len": slot.plan.prompt_len,
            "visual_spans": [[s.start, s.end] for s in slot.visual_spans],
            "images": slot.images,
        }
        self.steps: list[dict[str, Any]] = []
        self.pruning: dict[str, Any] | None = None
        self.pruning_skipped: str | None = None
        self.importance: np.ndarray | None = None
        self._pruned_now: tuple[Plan, Plan] | None = None
        self.flops = 0

    def restart(self, position: Position) -> None:
        """Begin in the middle: the steps before are not known any more, ``restarted_at`` tokens of the canvas are."""
        self.header["restarted_at"] = position.num_emitted
        self.position = position

    def record_step(
        self,
        positions: list[int],
        token_ids: list[int],
        confidence: list[float],
        query_len: int,
        kv_len: int,
        kv_blocks: int,
        after: Position,
    ) -> None:
        """Add a denoising step.

        Args:
            positions, token_ids, confidence: committed canvas positions, ascending, with what was written.
            query_len, kv_len: tokens computed and attended to.
            kv_blocks: KV blocks the request holds after the step.
            after: where the request stands after the step.
        """
        self.steps.append(
            {
                "block": self.position.block_start // self.plan.block_len,
                "step": self.position.step_in_block,
                "pos": positions,
                "ids": token_ids,
                "conf": confidence,
                "query_len": query_len,
                "seq_len": kv_len,
                "refresh": query_len == kv_len,
                "kv_blocks": kv_blocks,
            }
        )
        before, shortened = self._pruned_now or (self.plan, None)
        layers = self.pruning["layer"] if shortened is not None else None
        self.flops += step_flops(self.hf_config, before, query_len, shortened, layers)
        self._pruned_now = None
        self.position = after

    def record_pruning(self, job: PruneJob, kv_blocks_before: int, kv_blocks_after: int) -> None:
        """Add what was pruned after the step that is recorded next."""
        options = job.slot.params.options
        self.pruning = {
            "method": options.prune_method,
            "layer": None if job.layer is None else job.layer + 1,
            "num_visual": len(job.visual),
            "keep_count": len(job.kept),
            "kept_local_indices": job.kept.tolist(),
            "positions": options.prune_positions,
            "kv_blocks_before": kv_blocks_before,
            "kv_blocks_after": kv_blocks_after,
        }
        self.importance = job.importance.float().cpu().numpy()
        self._pruned_now = (self.plan, job.slot.plan)
        self.plan = job.slot.plan

    def write(self, tokens: np.ndarray, stop: int) -> None:
        """Write the file in one piece. tokens: [canvas | suffix | unused] int64; stop: canvas position or -1.

        A full disk costs the trace, not the engine: it is logged.
        """
        try:
            self._write(tokens, stop)
        except OSError as error:
            logger.warning("Cannot write the trace %s: %s", self.path, error)

    def _write(self, tokens: np.ndarray, stop: int) -> None:
        canvas_len, suffix_len = self.plan.canvas_len, self.plan.suffix_len
        final = tokens[: stop if stop >= 0 else canvas_len].tolist() + tokens[canvas_len:][:suffix_len].tolist()
        data = {
            **self.header,
            "steps": self.steps,
            "pruning": self.pruning,
            **({"pruning_skipped": self.pruning_skipped} if self.pruning_skipped else {}),
            "final_ids": final,
            "stopped_at": stop if stop >= 0 else None,
            "num_forward_passes": len(self.steps),
            "flops": self.flops,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(data))
        temporary.replace(self.path)
        if self.importance is not None:
            np.savez(self.path.with_suffix(".npz"), importance=self.importance)
