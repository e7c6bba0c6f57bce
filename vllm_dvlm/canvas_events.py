"""What a stream shows of a request's canvas, from the scheduler to the front end.

``EngineCoreOutput.kv_transfer_params`` is the one free-form object of every output; the request's report travels in it
at the end, the canvas of a step meanwhile.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

if TYPE_CHECKING:
    from vllm_dvlm.request import DiffusionRequest

KEY = "dvlm_canvas"


def canvas_events(request: DiffusionRequest, view: dict[str, Any] | None, mask_token_id: int) -> dict[str, Any]:
    """What the stream of a request shows after a step that did not end it; empty if nothing.

    view: what the worker sent of it (``CanvasViews.tolists``). Numbers and ids; text is made in the front end. What was
    pruned stands in every event from then on and in the last output, since a slow reader sees the newest one only.
    """
    view = view or {}
    found: dict[str, Any] = {}
    plan, position = request.plan, request.position
    if "pruned" in view:
        report = request.report
        request.pruned_event = {
            "visual_tokens": [report["visual_tokens_before"], report["visual_tokens_after"]],
            "kv_blocks_freed": report["kv_blocks_freed"],
            **view["pruned"],
        }
    if request.pruned_event is not None:
        found["pruned"] = request.pruned_event
    if "tokens" in view:
        steps, first = plan.steps_per_block, position.num_emitted
        tokens = view["tokens"][: plan.canvas_len]
        found["snapshot"] = {
            "step": request.report["denoise_steps"],
            "total_steps": None if steps is None else steps * (plan.canvas_len // plan.block_len),
            "block": min(position.block_start // plan.block_len, plan.canvas_len // plan.block_len - 1),
            "token_offset": first,
            "masked": tokens.count(mask_token_id),
            "token_ids": tokens[first:],
            "confidence": view["confidence"][first : plan.canvas_len],
            "nfe": request.report["denoise_steps"],
            "time": time.time(),
        }
    return found


def attach(
    outputs: dict[int, EngineCoreOutputs], request: DiffusionRequest, carried: dict[str, Any], is_new: bool = False
) -> None:
    """Put it on the step's output of the request; on one of its own where the step emits no token, if it is new.

    outputs: of the step, by client.
    """
    own = outputs.get(request.client_index)
    for output in own.outputs if own is not None else ():
        if output.request_id == request.request_id:
            output.kv_transfer_params = (output.kv_transfer_params or {}) | carried
            return
    if is_new:
        alone = EngineCoreOutput(request.request_id, [], kv_transfer_params=carried)
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(alone)
