"""What is asked of a Ray cluster before vLLM waits for it."""

import subprocess
import sys
import time
from pathlib import Path

from tests.ray.conftest import free_port, ray_head
from vllm_dvlm.cluster import head


def test_a_cluster_that_will_do_and_one_that_is_too_small(cluster):
    assert head.problem(2, "GPU", starts_itself=0) is None
    assert "has 2 GPUs and the engine needs 3" in head.problem(3, "GPU", starts_itself=8)


def test_a_head_that_is_not_there_is_told_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    begin = time.monotonic()
    found = head.problem(2, "GPU", starts_itself=8)
    assert time.monotonic() - begin < 2 * head.CONNECT_S
    assert "does not answer" in found and "ray start --head --port=6379 --num-gpus=2" in found


def test_a_node_with_other_packages_is_named(tmp_path_factory, monkeypatch):
    """The node finds another version of the package before the right one."""
    # Ray's workers look into the caller's folder first.
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    info = tmp_path_factory.mktemp("other") / "vllm_dvlm-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-dvlm\nVersion: 9.9\n")
    with ray_head(tmp_path_factory.mktemp("n"), PYTHONPATH=str(info.parent)) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        found = head.problem(2, "GPU", starts_itself=0)
    assert "has vllm_dvlm 9.9, this host" in found and "on every node" in found


def test_vllm_says_so(checkpoint, monkeypatch):
    """`LLM(...)` without its cluster ends with the reason, not with a wait of minutes."""
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    code = f"from vllm import LLM; LLM({str(checkpoint(seed=0))!r}, **{engine})"
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path.home())
    assert done.returncode and "--distributed-executor-backend ray: Ray's head at" in done.stderr + done.stdout
