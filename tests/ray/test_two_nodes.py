"""The recipe for two nodes, here on one host: a token for Ray, one pretend GPU each, an engine and replicas on both."""

import json
from pathlib import Path

import pytest

from tests.ray.conftest import LOOPBACK, ray_head, ray_node
from tests.ray.served import processes, serving, wait_until
from vllm_dvlm.cluster import head

TEXT = {"model": "demo", "prompt": "the 7", "max_tokens": 16, "temperature": 0}
TINY = ["--served-model-name", "demo", "--dtype", "float32", "--kv-cache-memory-bytes", str(2**27)]
TOKEN = "not a secret, but long enough to be a token"


@pytest.fixture
def two_nodes(tmp_path_factory, monkeypatch):
    """Sets the environment of processes on either of them."""
    home = tmp_path_factory.mktemp("h")
    (home / "token").write_text(TOKEN)
    # Ray listens on 127.0.0.1 alone only where it allows no second node; here its ports ask for the token.
    several = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "RAY_AUTH_MODE": "token"}
    for name, value in (LOOPBACK | several | {"RAY_AUTH_TOKEN_PATH": str(home / "token")}).items():
        monkeypatch.setenv(name, value)
    with ray_head(home, num_gpus=1, **several) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with ray_node(home, f"--address={address}", "--num-gpus=1", **several):
            wait_until(lambda: head.problem(2, "GPU", starts_itself=0) is None)
            yield


def answer(served):
    status, _, text = served.ask("/v1/completions", TEXT)
    assert status == 200, text
    return json.loads(text)["choices"][0]["text"]


def node_of(pid):
    """The process of Ray's that manages the node: it started all others there."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_an_engine_and_replicas_on_both(two_nodes, checkpoint, tmp_path):
    found = []
    for options in (["--replicas", "2"], ["-tp", "2", "--distributed-executor-backend", "ray"]):
        with serving(tmp_path, *options, model=checkpoint(seed=0), engine=TINY) as served:
            found.append(answer(served))
            if "-tp" in options:
                assert len({node_of(pid) for pid in processes("ray::RayWorkerProc")}) == 2
    assert found[0] == found[1] and len(set(found[0].split())) > 1
