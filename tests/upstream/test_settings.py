"""Every setting and sampling parameter that vLLM knows is one that somebody has read.

A failure says that vLLM has a new field: read what it does, then put it into one of the lists of
``vllm_dvlm/upstream_settings.py`` or ``vllm_dvlm/sampling_parameters.py``.
"""

import dataclasses

import pytest
import vllm.config
from vllm import SamplingParams, envs

from vllm_dvlm.sampling_parameters import SAMPLING_PARAMETERS
from vllm_dvlm.upstream_settings import ENVIRONMENT, HARMLESS, REFUSED, SET, problem

CLASSES = ["ModelConfig", "MultiModalConfig", "SchedulerConfig", "CacheConfig", "ParallelConfig", "VllmConfig"]


def refused(name):
    return list(dict.fromkeys(path.split(".")[0] for path in REFUSED[name]))


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_is_in_one_list(name):
    fields = [field.name for field in dataclasses.fields(getattr(vllm.config, name))]
    assert sorted([*refused(name), *SET[name].split(), *HARMLESS[name].split()]) == sorted(fields)


def test_no_other_class_is_listed():
    assert set(REFUSED) == set(SET) == set(HARMLESS) == set(CLASSES)


@pytest.mark.parametrize("path", [path for path in REFUSED["VllmConfig"] if "." in path])
def test_fields_of_parts(path):
    part, field = path.split(".")
    classes = {
        "compilation_config": vllm.config.CompilationConfig,
        "kv_events_config": vllm.config.KVEventsConfig,
        "ec_manager_config": vllm.config.EncoderCacheManagerConfig,
        "aux_output_config": vllm.config.AuxOutputConfig,
    }
    assert field in {f.name for f in dataclasses.fields(classes[part])}


def test_attention_backends_are_named_in_two_places():
    assert {"backend", "backend_per_kind"} <= {f.name for f in dataclasses.fields(vllm.config.AttentionConfig)}


def test_every_sampling_parameter_is_listed():
    assert sorted(SAMPLING_PARAMETERS) == sorted(SamplingParams.__struct_fields__)


def test_switches_of_the_environment_exist():
    assert set(ENVIRONMENT) <= set(envs.environment_variables)


@pytest.mark.parametrize("name", ["MultiModalConfig", "CacheConfig", "ParallelConfig"])
def test_vllms_defaults_pass(name):
    """What a user does not say is not refused; prefix caching is on by default until a model says otherwise."""
    config = getattr(vllm.config, name)()
    if name == "CacheConfig":
        config.enable_prefix_caching = False
    assert problem(config, name) is None
