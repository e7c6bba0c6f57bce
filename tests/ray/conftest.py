"""A real Ray head with pretend GPUs for the tests here; `make test-ray` runs them, one after another.

`make test` runs test_smoke.py alone."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

START_S = 90
# Every listener on 127.0.0.1: whoever reaches Ray's ports may run code.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_memory_monitor_refresh_ms": "0", "RAY_AUTH_MODE": "disabled"}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "ray" and item.path.name != "test_smoke.py":
            item.add_marker(pytest.mark.ray)


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def ray_node(folder: Path, *options: str, **environment: str):
    """A process of `ray start --block`; it ends with its children."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--block", "--num-cpus=2", "--disable-usage-stats", *options]
    with (folder / "ray.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | LOOPBACK | environment, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def ray_head(folder: Path, num_gpus: int = 2, **environment: str):
    """The address of a head that answers; its folder must have a short name, for Ray's sockets lie there."""
    port = free_port()
    options = ["--head", f"--port={port}", f"--num-gpus={num_gpus}", "--include-dashboard=false"]
    options += ["--object-store-memory=200000000", f"--temp-dir={folder}"]
    with ray_node(folder, *options, **environment) as process:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert process.poll() is None, (folder / "ray.log").read_text()
            with closing(socket.socket()) as client:
                client.settimeout(1)
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Address of a head with two pretend GPUs, set in the environment for the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch, ray_head(Path(tmp_path_factory.mktemp("r"))) as address:
        for name, value in LOOPBACK.items():
            patch.setenv(name, value)
        patch.setenv("RAY_ADDRESS", address)
        yield address
