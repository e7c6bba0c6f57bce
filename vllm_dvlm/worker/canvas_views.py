"""What a step leaves of the canvases of requests whose stream shows them, on its way to the scheduler.

vLLM takes one free object per step from the worker to the engine core, ``sampling_mask_tensors``, which nobody else
uses (``--return-sampling-mask`` is refused).

n = requests shown, W = widest canvas of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vllm_dvlm.worker.transfer import to_device

if TYPE_CHECKING:
    from vllm_dvlm.denoise.step import StepOutput
    from vllm_dvlm.worker.states import CanvasStates, RequestSlot
    from vllm_dvlm.worker.step_batch import PruneJob, StepBatch


@dataclass
class CanvasViews:
    """vLLM's interface of a ``SamplingMaskTensors``.

    requests: [n] places in the batch. tokens: [n, W] int64. confidence: [n, W] float32 of each written position in the
    step that wrote it. kept: of requests that pruned in this step, the survivors among their visual tokens, and where
    these lie in the pictures.
    """

    requests: list[int]
    tokens: torch.Tensor
    confidence: torch.Tensor
    kept: dict[int, tuple[torch.Tensor, list[dict[str, Any]]]] = field(default_factory=dict)

    def to_cpu_nonblocking(self) -> CanvasViews:
        """The same on the host, once the copies that begin here are complete."""

        def host(x: torch.Tensor) -> torch.Tensor:
            return x.to("cpu", non_blocking=True)

        kept = {place: (host(index), images) for place, (index, images) in self.kept.items()}
        return CanvasViews(self.requests, host(self.tokens), host(self.confidence), kept)

    def tolists(self, num_sampled: Any) -> dict[int, dict[str, Any]]:
        """Plain numbers by place in the batch; read once the copies are complete. num_sampled: not needed."""
        found: dict[int, dict[str, Any]] = {}
        for place, tokens, confidence in zip(
            self.requests, self.tokens.tolist(), self.confidence.tolist(), strict=True
        ):
            found[place] = {"tokens": tokens, "confidence": confidence}
        for place, (index, images) in self.kept.items():
            found.setdefault(place, {})["pruned"] = {"kept": index.tolist(), "images": images}
        return found


def views_of(
    step: StepBatch, canvases: CanvasStates, confidence: torch.Tensor, out: StepOutput, jobs: list[PruneJob]
) -> CanvasViews | None:
    """What this step shows; None if no request of the batch asks for it.

    Args:
        confidence: [R, W] float64 of the proposed tokens.
        jobs: what was pruned in this step.
    """

    def shows(slot: RequestSlot) -> bool:
        return slot.params.options.diffusion_stream == "provisional" and not slot.is_lost

    shown = [i for i, slot in enumerate(step.slots) if shows(slot)]
    if not shown:
        return None
    index = to_device(shown, out.committed.device)
    slots = step.idx[index]
    width = out.committed.shape[1]
    kept_before = canvases.confidence[slots, :width]
    sure = torch.where(out.committed[index], confidence[index].float(), kept_before)
    canvases.confidence[slots, :width] = sure
    # A request may want every Nth step only; the others' rows are few numbers.
    sent = [i for i in shown if step.slots[i].num_steps % step.slots[i].params.options.diffusion_stream_every == 0]
    kept = {
        job.batch_index: (job.kept, _pictures(job)) for job in jobs if job.batch_index in shown and job.kept is not None
    }
    if not sent and not kept:
        return None
    rows = to_device([shown.index(i) for i in sent], index.device) if len(sent) < len(shown) else slice(None)
    tokens = out.canvases.tokens[index]
    return CanvasViews(sent, tokens[rows], sure[rows], kept)


def _pictures(job: PruneJob) -> list[dict[str, Any]]:
    """Number of visual tokens of each picture, and how they lie in it (``image_maps.describe_images``)."""
    found = []
    for image, span in zip(job.slot.images, job.slot.visual_spans, strict=True):
        found.append({"visual_tokens": len(span)} | (image or {}))
    return found
