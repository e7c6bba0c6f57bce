"""Our counters, from the scheduler's increments to Prometheus; over HTTP: test_server.py."""

import copy

import pytest
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.loggers import StatLoggerManager, load_stat_logger_plugin_factories
from vllm.v1.metrics.stats import SchedulerStats

from vllm_dvlm.counters import CLIENT_METRICS, COUNTERS, METRICS
from vllm_dvlm.serving.metrics import DvlmStatLogger


@pytest.fixture(scope="module")
def config(checkpoint):
    return EngineArgs(model=str(checkpoint(seed=0)), served_model_name="counted").create_engine_config()


def value(key, engine="0"):
    labels = {"model_name": "counted", "engine": engine}
    labels |= {"kind": METRICS[key].kind} if METRICS[key].kind else {}
    return REGISTRY.get_sample_value(f"vllm_dvlm:{METRICS[key].name}", labels)


def test_every_counter_of_the_scheduler_is_exported_under_its_own_name():
    exported = [(metric.name, metric.kind) for metric in METRICS.values()]
    assert len(set(exported)) == len(exported) and all(name.endswith("_total") for name, _ in exported)


def test_increments_add_up_beside_vllms_own_logger(config):
    """As vLLM does it: the entry point's class, one logger per engine, made again when an engine is."""
    assert DvlmStatLogger in load_stat_logger_plugin_factories()
    for made_before in range(2):
        manager = StatLoggerManager(config, engine_idxs=[0, 1], custom_stat_loggers=[DvlmStatLogger])
        before = {(key, engine): value(key, engine) for key in METRICS for engine in "01"}
        sent = {key: 3 + i for i, key in enumerate(COUNTERS)}
        manager.record(SchedulerStats(running_lora_adapters=dict(sent)), None, engine_idx=1)
        manager.record(SchedulerStats(running_lora_adapters=dict(sent)), None, engine_idx=1)
        # Statistics of other origin, and none at all.
        manager.record(SchedulerStats(), None, engine_idx=1)
        manager.record(None, None, engine_idx=1)
        for key, metric in CLIENT_METRICS.items():
            labels = {"model_name": "counted", "engine": "1"}
            counted = REGISTRY.get_sample_value(f"{metric.name}_total", labels)
            assert counted == 2 * sent[key] * (1 + made_before), "vLLM's clean-up of its own metrics took ours along"
        for key in METRICS:
            grown = value(key, "1") - before[key, "1"]
            assert grown == pytest.approx(2 * sent[key] * METRICS[key].scale)
            assert value(key, "0") == before[key, "0"]


def test_other_models_have_no_such_counters(config):
    other = copy.copy(config)
    other.model_config = copy.copy(config.model_config)
    other.model_config.model_arch_config = copy.copy(config.model_config.model_arch_config)
    other.model_config.model_arch_config.architectures = ["LlamaForCausalLM"]
    logger = DvlmStatLogger(other)
    before = {key: value(key) for key in METRICS}
    logger.record(SchedulerStats(running_lora_adapters={"denoise_steps": 5, "an adapter": 1}), None)
    assert not logger.counters and {key: value(key) for key in METRICS} == before
