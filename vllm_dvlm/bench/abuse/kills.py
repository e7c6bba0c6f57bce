"""R5: a process of the server is killed. Every waiting client hears of it, the server ends, and a new one serves."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from typing import Any

from vllm_dvlm.bench.abuse.aborts import CHAT, victim_body
from vllm_dvlm.bench.abuse.fuzz import CONTROL, stream_fault
from vllm_dvlm.bench.abuse.job import Job
from vllm_dvlm.bench.abuse.served import Server, session, start
from vllm_dvlm.bench.result import Result

HEARD_S = 10.0
EXIT_S = 60.0
BEFORE_S = 1.5  # from sending to killing; who is answered before asks again
ORPHANS_S = 30.0  # that the other processes have to end in
CORE, WORKER = "EngineCore", "Worker"


async def _client(http: Any, url: str, body: dict[str, Any]) -> tuple[float, str]:
    """(time of the end, what the client saw): "answered" only if the whole answer came."""
    try:
        async with http.post(url + CHAT, json=body) as reply:
            text = (await reply.read()).decode()
        if reply.status != 200:
            return time.monotonic(), f"status {reply.status}"
        whole = not (body["stream"] and stream_fault(CHAT, text))
        return time.monotonic(), "answered" if whole else "error in the stream"
    except Exception as error:  # noqa: BLE001 - whatever a client may see
        return time.monotonic(), type(error).__name__


def _kill(server: Server, name: str) -> None:
    process = server.processes(name)[-1]
    os.kill(process.pid, signal.SIGKILL)


def _left(processes: list[Any], seconds: float) -> list[Any]:
    """Those that still run when the time is up, or [] as soon as none does."""
    deadline = time.monotonic() + seconds
    while True:
        left = []
        for process in processes:
            with contextlib.suppress(Exception):  # psutil's own of a process that is gone
                if process.is_running() and process.status() != "zombie":
                    left.append(process)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def strike(job: Job, server: Server, name: str, key: str, result: Result) -> None:
    """Let clients wait, kill the process of this name, note what they and we see."""
    bodies = [victim_body(job.rng("R5", key, i)) for i in range(job.counts.clients)]
    every = server.processes()
    killed_at = 0.0

    async def run() -> list[tuple[float, str]]:
        nonlocal killed_at
        async with session() as http:

            async def client(body: dict[str, Any]) -> tuple[float, str]:
                while True:
                    ended, what = await _client(http, server.url, body)
                    if what != "answered" or killed_at:
                        return ended, what

            clients = [asyncio.create_task(client(body)) for body in bodies]
            await asyncio.sleep(BEFORE_S)
            _kill(server, name)
            killed_at = time.monotonic()
            return await asyncio.gather(*clients)

    seen = asyncio.run(run())
    # An answer may have been on its way already.
    waiting = [(ended - killed_at, what) for ended, what in seen if ended > killed_at and what != "answered"]
    heard = [after for after, _ in waiting if after <= HEARD_S]
    code = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = server.process.wait(EXIT_S)
    exited = time.monotonic() - killed_at
    orphans = _left(every, ORPHANS_S)
    setting = f"kill -9 of {name}, {len(waiting)} of {len(seen)} clients waiting: share that got an error within 10 s"
    share = len(heard) / len(waiting) if waiting else 0.0
    result.value(f"R5_{key}_heard_within_10s", setting, share, "= 1", share == 1)
    result.value(
        f"R5_{key}_exit_code",
        f"exit code of `vllm serve` after kill -9 of {name}",
        code,
        "not 0",
        code not in (0, None),
    )
    result.value(
        f"R5_{key}_processes_left",
        f"its processes that still run {ORPHANS_S:g} s later",
        len(orphans),
        "= 0",
        not orphans,
    )
    result.figures |= {
        f"R5_{key}_slowest_error_s": max((after for after, _ in waiting), default=0.0),
        f"R5_{key}_exit_s": exited,
        f"R5_{key}_seen": ", ".join(sorted({what for _, what in waiting})),
    }
    server.end_group()


def check_restart(server: Server, key: str, result: Result) -> None:
    """A server started after a kill answers as before."""
    found = server.post("/v1/completions", CONTROL)["choices"][0]["token_ids"]
    result.value(
        f"R5_{key}_restart_serves", f"the same command again ({key}): answers", len(found) == 8, "True", len(found) == 8
    )


def check_stop(server: Server, result: Result) -> None:
    """A server that was told to stop, for comparison."""
    code = server.process.returncode
    result.value(
        "R5_stopped_exit_code", "exit code of `vllm serve` after SIGTERM, for comparison", code, "0", code == 0
    )


def measure_core(job: Job, server: Server, result: Result) -> None:
    """Kill the engine core; ends the server."""
    strike(job, server, CORE, "core", result)


def measure_worker(job: Job, result: Result) -> None:
    """Kill one of two tensor-parallel workers, and start again."""
    with start(job, "two_ranks", "--tensor-parallel-size", "2") as server:
        strike(job, server, WORKER, "worker", result)
    with start(job, "two_ranks_again", "--tensor-parallel-size", "2", port=server.port) as again:
        check_restart(again, "worker", result)
