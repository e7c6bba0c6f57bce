"""Servers and the client of `bench scale`: processes as a user would start them. Imports no Ray and no vLLM."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dvlm.bench.scale_numbers import Counts, Load, read_page, read_result
from vllm_dvlm.bench.serving_load import MODEL_NAME, VLLM, serving

START_UP_S = 600.0
RUN_S = 3600.0
# A machine on which others take so much of a core while nothing is asked is busy.
BUSY_CORES = 0.25
LOOK_S = 1.0
# Without these Ray's processes run at a lower priority, listen on every interface, and may be ended for others' memory.
RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_worker_niceness": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Replicas of a server that could have more, and has not.
NEVER = "1000000000"


@dataclass(frozen=True)
class Client:
    """Options of `vllm bench serve` that are the same for every run.

    bounds: of goodput, as "e2el:2000". image: (height, width) of random pictures, `images` of them a request.
    dataset: further options, which replace random pictures.
    """

    model: str
    input_len: int
    output_len: int
    images: int
    image: tuple[int, int]
    bounds: tuple[str, ...]
    seed: int
    dataset: tuple[str, ...] = ()

    def command(self, port: int, num: int, at_once: int, options: dict[str, Any], result: Path) -> list[str]:
        """Send `num` requests with these request options, `at_once` at a time, to a server on this host."""
        words: dict[str, Any] = {
            "--base-url": f"http://127.0.0.1:{port}",
            "--backend": "openai-chat",
            "--endpoint": "/v1/chat/completions",
            "--model": MODEL_NAME,
            "--tokenizer": self.model,
            "--num-prompts": num,
            "--max-concurrency": at_once,
            "--num-warmups": at_once,
            "--seed": self.seed,
            "--extra-body": json.dumps({"temperature": 0, "vllm_xargs": options}),
            "--result-dir": result.parent,
            "--result-filename": result.name,
        }
        goodput = ["--goodput", *self.bounds] if self.bounds else []
        flags = [*goodput, "--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm"]
        return [str(VLLM), "bench", "serve", *_words(words), *(self.dataset or self._random()), *flags]

    def _random(self) -> list[str]:
        height, width = self.image
        return _words(
            {
                "--dataset-name": "random-mm",
                "--random-input-len": self.input_len,
                "--random-output-len": self.output_len,
                "--random-mm-base-items-per-request": self.images,
                "--random-mm-bucket-config": f"{{({height}, {width}, 1): 1.0}}",
                "--random-mm-limit-mm-per-prompt": json.dumps({"image": self.images, "video": 0}),
            }
        )

    def run(self, port: int, num: int, at_once: int, options: dict[str, Any]) -> Load:
        """The same, and what it saw. RuntimeError if a request failed."""
        with tempfile.TemporaryDirectory(prefix="vllm-dvlm-bench-") as folder:
            result = Path(folder) / "result.json"
            command = self.command(port, num, at_once, options, result)
            environment = dict(os.environ, OMP_NUM_THREADS="1")
            ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=RUN_S)
            if ran.returncode or not result.exists():
                raise RuntimeError(f"vllm bench serve ended with {ran.returncode}:\n{ran.stderr[-4000:]}")
            return read_result(json.loads(result.read_text(encoding="utf-8")), num)


def _words(options: dict[str, Any]) -> list[str]:
    return [str(word) for pair in options.items() for word in pair]


@dataclass(frozen=True)
class Engine:
    """What every engine is started with. share: replicas of the largest configuration, which share a CPU host's cores,
    so that one replica has no more of them than each of several."""

    model: str
    slots: int
    share: int
    has_gpus: bool
    options: tuple[str, ...] = ()

    def _options(self, port: int, ranks: int) -> list[str]:
        words = {"--host": "127.0.0.1", "--port": port, "--served-model-name": MODEL_NAME, "--max-num-seqs": self.slots}
        return [*_words(words), "--tensor-parallel-size", str(ranks), *self.options]

    def plain(self, port: int, ranks: int) -> list[str]:
        """One engine without a router."""
        module = ["-m", "vllm_dvlm.bench.plain_server", str(self.share)]
        return [sys.executable, *module, "--model", self.model, *self._options(port, ranks)]

    def alone(self, port: int, ranks: int) -> list[str]:
        """`vllm serve`, as it is without us."""
        return [str(VLLM), "serve", self.model, *self._options(port, ranks)]

    def served(self, port: int, ranks: int, replicas: int, limit: int) -> list[str]:
        """Replicas behind Ray Serve."""
        command = [sys.executable, "-m", "vllm_dvlm.cli", "serve", self.model, "--replicas", str(replicas)]
        command += ["--max-ongoing-requests", str(limit)]
        if not self.has_gpus and replicas < self.share:
            command += ["--max-replicas", str(self.share), "--target-ongoing-requests", NEVER]
        return [*command, *self._options(port, ranks)]


@dataclass(frozen=True)
class Server:
    """A running one. start_up: seconds from its command until all of its replicas answer."""

    port: int
    pid: int
    start_up: float = 0.0

    def cpu_s(self) -> float | None:
        """Processor time of its processes so far; None where they are not this host's, or it is no Linux."""
        return None if "RAY_ADDRESS" in os.environ else tree_cpu_s(self.pid)

    def counts(self, num_replicas: int | None = None) -> dict[str, Counts]:
        """Counts by replica; of so many, once all show their page. RuntimeError if they do not within a minute."""
        deadline = time.monotonic() + 60
        while True:
            counts = self._page()
            if num_replicas is None or len(counts) >= num_replicas:
                return counts
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(counts)} of {num_replicas} replicas show their counts")
            time.sleep(0.2)

    def _page(self) -> dict[str, Counts]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as reply:
            return read_page(reply.read().decode())


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def running(command: Sequence[str], port: int, log: Path, replicas: int | None = None, **more: str) -> Iterator[Server]:
    """A server while the body runs; RuntimeError with the end of its log if it does not come up.

    replicas: that must show their counts first. more: environment.
    """
    environment = {**({} if "RAY_ADDRESS" in os.environ else RAY), **more}
    begin = time.monotonic()
    with serving(command, port, 1, log, environment) as process:
        server = Server(port, process.pid)
        if replicas is not None:
            server.counts(replicas)
        yield Server(port, process.pid, time.monotonic() - begin)


def tree_cpu_s(root: int) -> float | None:
    """Processor time of a process and all below it that live, in seconds; None without /proc."""
    parents, times = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()  # from the state on
            parents[int(path.parent.name)] = int(fields[1])
            times[int(path.parent.name)] = int(fields[11]) + int(fields[12])
    if root not in times:
        return None
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    below, total = [root], 0
    while below:
        pid = below.pop()
        total += times[pid]
        below += children.get(pid, [])
    return total / os.sysconf("SC_CLK_TCK")


def is_busy(tries: int = 10) -> bool:
    """Whether others work here: it never gets quiet. A server that just came up, or answered, has a moment to rest."""
    return not any(cores_busy() <= BUSY_CORES for _ in range(tries))


def cores_busy(seconds: float = LOOK_S) -> float:
    """Cores of this host that work, averaged over this time; Linux only, else 0."""

    def times() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields) - fields[3] - fields[4], sum(fields)

    try:
        busy, total = times()
        time.sleep(seconds)
        busy_now, total_now = times()
    except OSError:
        return 0.0
    return (os.cpu_count() or 1) * (busy_now - busy) / max(1, total_now - total)
