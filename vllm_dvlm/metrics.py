"""Prometheus counters of masked-diffusion decoding on ``/metrics``, beside vLLM's own.

An engine's scheduler counts and sends with every step what was added since the last one (``SchedulerStats`` goes to
exactly one API server, so increments add up over several of them, where totals would not).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, Counter
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_dvlm import ARCHITECTURES

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

# Not "vllm:", whose metrics vLLM unregisters when it makes its own logger.
PREFIX = "vllm_dvlm:"
_LABELS = ("model_name", "engine")


@dataclass(frozen=True)
class Metric:
    """One exported counter; ``kind`` tells apart the rows that share a name, ``scale`` is units per count."""

    name: str
    documentation: str
    kind: str | None = None
    scale: float = 1


_FORWARD = "Tokens computed by denoising steps: full = whole sequences, cached = from the current block on."

# What the scheduler counts (``scheduler.COUNTERS``) -> what is exported. A new counter is a new row in both; those of
# vLLM's own clients stand in CLIENT_METRICS.
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


class _Nameless:
    """A collector for vLLM's registry that vLLM's clean-up, which goes by the attribute ``_name``, leaves alone."""

    def __init__(self, counter: Counter) -> None:
        self.collect = counter.collect


@cache
def _client_counter(name: str, documentation: str) -> Counter:
    counter = Counter(name, documentation, _LABELS, registry=None)
    REGISTRY.register(_Nameless(counter))
    return counter


@cache
def _counter(name: str, documentation: str, has_kind: bool) -> Counter:
    # Once per process: prometheus_client refuses a second one of the same name.
    return Counter(PREFIX + name, documentation, (*_LABELS, "kind") if has_kind else _LABELS)


class DvlmStatLogger(StatLoggerBase):
    """Entry point of the group ``vllm.stat_logger_plugins``; vLLM makes one per engine and API server.

    It counts nothing for models that are not ours.
    """

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.counters: dict[str, Counter] = {}
        self.client_counters: dict[str, Counter] = {}
        model_config = vllm_config.model_config
        if model_config is None or not ARCHITECTURES.intersection(model_config.architectures):
            return
        labels = {"model_name": model_config.served_model_name, "engine": str(engine_index)}
        for key, metric in METRICS.items():
            kind = {} if metric.kind is None else {"kind": metric.kind}
            family = _counter(metric.name, metric.documentation, bool(kind))
            self.counters[key] = family.labels(**labels, **kind)
        for key, metric in CLIENT_METRICS.items():
            self.client_counters[key] = _client_counter(metric.name, metric.documentation).labels(**labels)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Add an engine step's increments."""
        if scheduler_stats is None or not self.counters:
            return
        increments = scheduler_stats.running_lora_adapters
        for key, counter in self.counters.items():
            counter.inc(increments.get(key, 0) * METRICS[key].scale)
        for key, counter in self.client_counters.items():
            counter.inc(increments.get(key, 0))

    def log_engine_initialized(self) -> None:
        """Nothing to say at start-up."""
