"""What an engine counts, and under which names ``/metrics`` shows it: one list for both. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One exported counter; ``kind`` tells apart the rows that share a name, ``scale`` is units per count."""

    name: str
    documentation: str
    kind: str | None = None
    scale: float = 1


_FORWARD = "Tokens computed by denoising steps: full = whole sequences, cached = from the current block on."

# What the scheduler counts -> what is exported; a new counter is a new row here. Those of vLLM's own clients stand in
# CLIENT_METRICS.
METRICS = {
    "denoise_steps": Metric("denoise_steps_total", "Denoising steps, summed over requests."),
    "forward_tokens_full": Metric("forward_tokens_total", _FORWARD, kind="full"),
    "forward_tokens_cached": Metric("forward_tokens_total", _FORWARD, kind="cached"),
    "committed_tokens": Metric("committed_tokens_total", "Tokens handed out to users."),
    "canvas_positions": Metric("canvas_positions_total", "Canvas positions of admitted requests."),
    "visual_tokens": Metric("visual_tokens_total", "Visual tokens of admitted requests, before any pruning."),
    "requests_pruned": Metric("requests_pruned_total", "Requests that gave visual tokens away."),
    "visual_tokens_pruned": Metric("visual_tokens_pruned_total", "Visual tokens dropped while their request lived."),
    "kv_blocks_before": Metric("kv_blocks_before_total", "KV blocks that pruned requests held before they pruned."),
    "kv_blocks_freed": Metric("kv_blocks_freed_total", "KV blocks given back while their request lived."),
    "prune_us": Metric("prune_seconds_total", "Host time of scoring, choosing and moving tokens.", scale=1e-6),
    "flops": Metric("flops_total", "Floating point operations of the text layers (a multiply-add counts once)."),
}


# The names by which vLLM's own clients (`vllm bench serve`) know a diffusion server. They take it that one more step
# than denoises a canvas commits it, and that every step evaluates the whole canvas.
CLIENT_METRICS = {
    "client_steps": Metric("vllm:diffusion_num_denoising_steps", "Denoising steps, and one per finished canvas."),
    "client_positions": Metric("vllm:diffusion_num_canvas_positions", "Canvas positions evaluated by those steps."),
    "committed_tokens": Metric("vllm:diffusion_num_committed_tokens", "Tokens handed out to users."),
}

COUNTERS = tuple(dict.fromkeys([*METRICS, *CLIENT_METRICS]))
"""Names that the scheduler counts under; ``metrics.DvlmStatLogger`` exports them."""
