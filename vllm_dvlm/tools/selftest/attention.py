"""Attention of a live engine against a dense reference: a backend that ignores `causal=False`, reads other keys or
loses rows is told by numbers.

N = tokens of a step, H = query heads of this rank, D = head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm_dvlm.worker.attention_rows import AttentionRows


@dataclass
class Step:
    """One forward pass. requests: of each (id, first token of the batch, tokens computed before).

    calls: per layer [q, k, v, out], each [N, heads * D]. read: rows whose final hidden state is read, which are all
    that the last layer's `out` has; None: all.
    """

    requests: list[tuple[str, int, int]]
    rows: AttentionRows | None = None
    calls: list[list[torch.Tensor]] = field(default_factory=list)
    read: torch.Tensor | None = None


@contextlib.contextmanager
def recorded(model: Any, model_state: Any) -> Iterator[list[Step]]:
    """Forward passes of an engine in this process, as they happen."""
    steps: list[Step] = []
    prepare, choose_rows = model_state.prepare_attn, model_state.attention_rows
    layers = [layer.self_attn for layer in model.model.layers]
    projections = [attention._project for attention in layers]

    def prepare_attn(batch: Any, *args: Any, **kwargs: Any) -> Any:
        starts, before = batch.query_start_loc_np.tolist(), batch.num_computed_tokens_np.tolist()
        steps.append(Step(list(zip(batch.req_ids, starts, before, strict=False))))
        return prepare(batch, *args, **kwargs)

    def attention_rows(builder: Any) -> Any:
        steps[-1].rows = choose_rows(builder)
        return steps[-1].rows

    def recording(project: Any) -> Any:
        def projected(*inputs: Any) -> Any:
            out = project(*inputs)
            steps[-1].calls.append([x.double() for x in out])
            return out

        return projected

    def before_output(module: Any, inputs: Any) -> None:
        steps[-1].calls[-1].append(inputs[0].double())
        read = model_state.forward_plan.final_rows
        steps[-1].read = None if read is None else read.clone()

    model_state.prepare_attn, model_state.attention_rows = prepare_attn, attention_rows
    handles = []
    for attention, project in zip(layers, projections, strict=True):
        attention._project = recording(project)
        handles.append(attention.o_proj.register_forward_pre_hook(before_output))
    try:
        yield steps
    finally:
        del model_state.prepare_attn, model_state.attention_rows
        for attention in layers:
            del attention._project
        for handle in handles:
            handle.remove()


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    """Every query attends to every key. q [rows, H * D], k and v [keys, KV heads * D]; returns [rows, H * D]."""
    size = q.shape[1] // num_heads
    group = num_heads * size // k.shape[1]
    q, k, v = (x.unflatten(1, (-1, size)).transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    return ((q @ k.transpose(1, 2) * scale).softmax(-1) @ v).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Compared:
    """worst: largest difference as a share of the largest number. rows, cached, apart: rows of attention compared,
    those whose first keys came from the KV cache, and those of prompts that attend to themselves only."""

    worst: float
    rows: int
    cached: int
    apart: int


def compare(steps: list[Step], layers: list[Any]) -> Compared:
    """Recorded rows of attention against dense ones; cached keys are those that the request last computed."""
    cache: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
    worst, num, num_cached, num_apart = 0.0, 0, 0, 0
    for step in steps:
        if not step.calls or step.rows is None:
            continue
        rows = step.rows
        starts, request_of, kv_len = rows.query_start.tolist(), rows.request.tolist(), rows.kv_len.tolist()
        for index, request in enumerate(request_of):
            req_id, first, before = step.requests[request]
            end = step.requests[request + 1][1] if request + 1 < len(step.requests) else starts[-1]
            top, bottom = starts[index : index + 2]
            num += 1
            num_cached += before > 0
            num_apart += request_of.count(request) > 1 and index == request_of.index(request)
            for layer, (q, k, v, out) in enumerate(step.calls):
                keys, values = k[first:end], v[first:end]
                if before:
                    keys, values = (
                        torch.cat([old[:before], new])
                        for old, new in zip(cache[req_id, layer], (keys, values), strict=True)
                    )
                cache[req_id, layer] = keys, values
                wanted = torch.arange(top, bottom, device=q.device)
                seen = out
                if out.shape[0] != q.shape[0]:  # the last layer, of which some rows are read
                    inside = (step.read >= top) & (step.read < bottom)
                    wanted, seen = step.read[inside], out[inside]
                else:
                    seen = out[top:bottom]
                if not len(wanted):
                    continue
                attention = layers[layer]
                own = kv_len[index]
                expected = dense(q[wanted], keys[:own], values[:own], attention.num_heads, attention.head_dim**-0.5)
                scale = max(1e-6, float(expected.abs().max()))
                worst = max(worst, float((seen - expected).abs().max()) / scale)
    return Compared(worst, num, num_cached, num_apart)
