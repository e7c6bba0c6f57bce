"""Prometheus counters of masked-diffusion decoding on ``/metrics``, beside vLLM's own.

An engine's scheduler counts and sends with every step what was added since the last one (``SchedulerStats`` goes to
exactly one API server, so increments add up over several of them, where totals would not).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, Counter
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_dvlm import ARCHITECTURES
from vllm_dvlm.counters import CLIENT_METRICS, METRICS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

# Not "vllm:", whose metrics vLLM unregisters when it makes its own logger.
PREFIX = "vllm_dvlm:"
_LABELS = ("model_name", "engine")


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
