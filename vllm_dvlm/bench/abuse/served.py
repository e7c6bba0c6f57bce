"""The server that is abused, `vllm serve` in processes of its own: metrics, memory; requests over aiohttp."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_dvlm.bench.abuse import job as jobs
from vllm_dvlm.bench.abuse.fuzz_bodies import MODEL
from vllm_dvlm.bench.serving_load import VLLM, serving

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)$")
IDLE = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
IDLE_S = 30
# glibc keeps what was freed, in an arena for every thread; with this it goes back, so that what grows is in use.
HAND_BACK = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "1048576"}


class Server:
    """A running server; made by `start`. `process`: the one that `vllm serve` started as."""

    def __init__(self, port: int, process: subprocess.Popen, log: Path) -> None:
        self.port, self.process, self.log = port, process, log
        self.url = f"http://127.0.0.1:{port}"

    # -- requests ----------------------------------------------------------------------------------------------------

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a sound request; OSError for anything but 200."""
        data = json.dumps({"model": MODEL} | body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics summed over their labels."""
        totals: dict[str, float] = {}
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as reply:
            for line in reply.read().decode().splitlines():
                if match := _SAMPLE.match(line):
                    totals[match[1]] = totals.get(match[1], 0) + float(match[2])
        return totals

    def left_over(self) -> dict[str, float]:
        """What /metrics counts as running, waiting or in use once the server has had time to settle; {} is idle."""
        deadline = time.monotonic() + IDLE_S
        while True:
            found = self.metrics()
            left = {name: found[name] for name in IDLE if found.get(name)}
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.2)

    def is_alive(self) -> bool:
        """The process runs and answers /health, which asks the engine."""
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=20):
                return self.process.poll() is None
        except OSError:
            return False

    # -- processes ---------------------------------------------------------------------------------------------------

    def processes(self, name: str = "") -> list[Any]:
        """psutil processes of the server whose command line holds this text, the oldest first."""
        import psutil

        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            for one in [top, *top.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if name in " ".join(one.cmdline()):
                        found.append(one)
        return found

    def memory_bytes(self) -> int:
        """Resident memory of all processes; pages that they share count once (PSS)."""
        total = 0
        for process in self.processes():
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def open_files(self) -> int:
        """File descriptors of all processes, sockets included."""
        return sum(process.num_fds() for process in self.processes())

    def end_group(self) -> None:
        """End what is left of the server's process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def server_command(job: jobs.Job, port: int, *flags: str) -> list[str]:
    """`vllm serve` of the checkpoint with a small KV pool."""
    options = {
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": MODEL,
        "--max-model-len": jobs.MAX_MODEL_LEN,
        "--max-num-seqs": jobs.MAX_SEQS,
        "--num-gpu-blocks-override": jobs.NUM_KV_BLOCKS,
        "--kv-cache-memory-bytes": 2**26,
        "--limit-mm-per-prompt": json.dumps({"image": jobs.MAX_IMAGES}),
        "--additional-config": json.dumps({"dvlm": {"max_canvas_length": jobs.MAX_CANVAS}}),
        # Small, so that it is full after a few hundred pictures and memory has its final size early.
        "--mm-processor-cache-gb": 0.05,
        "--uvicorn-log-level": "warning",
    }
    return [str(VLLM), "serve", str(job.folder), *(str(word) for pair in options.items() for word in pair), *flags]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def start(job: jobs.Job, name: str, *flags: str, port: int | None = None) -> Iterator[Server]:
    """A server while the body runs. name: of its log in the work folder; flags: more arguments of `vllm serve`."""
    port = port or free_port()
    log = job.workdir / f"{name}.log"
    with serving(server_command(job, port, *flags), port, job.threads, log, HAND_BACK) as process:
        server = Server(port, process, log)
        yield server
    server.end_group()


# -- many requests at once -------------------------------------------------------------------------------------------


def session(keep_alive: bool = False) -> Any:
    """An aiohttp session of any number of connections.

    keep_alive: use them again. A server closes those that rest, and a request sent into that moment fails by no fault
    of anyone; with a connection for each request every failure means something.
    """
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=not keep_alive),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=120),
    )


async def gather_limited(jobs_of: list[Any], limit: int) -> list[Any]:
    """Results of coroutines, at most `limit` at a time; as many workers, so that a list of thousands is no burden."""
    results: list[Any] = [None] * len(jobs_of)
    queue = iter(enumerate(jobs_of))

    async def work() -> None:
        for i, coroutine in queue:
            results[i] = await coroutine

    await asyncio.gather(*(work() for _ in range(limit)))
    return results
