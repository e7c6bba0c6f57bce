"""Child processes of the benches: each has one engine, its own threads and its own peak memory. Light to import."""

import dataclasses
import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from vllm_dvlm.bench import engine_env

# What every child needs, imported once, in a process that computes nothing and forks them.
PRELOADED = ["vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm_dvlm.bench.child"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Settings of a measurement in a child process; plain data, it travels there. Benches add their own fields."""

    threads: int
    seed: int


def run(module: str, function: str, job: Job) -> Any:
    """`module.function(job)` in a fresh process with this process's environment."""
    engine_env.prepare(job.threads)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_call, dict(os.environ), module, function, job).result()


def _call(environment: dict[str, str], module: str, function: str, job: Job) -> Any:
    """In the child. The process that forks it has the environment of the first call."""
    os.environ.clear()
    os.environ.update(environment)
    return getattr(importlib.import_module(module), function)(job)
