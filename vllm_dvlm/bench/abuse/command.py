"""`vllm-dvlm bench abuse`: the reliability figures R1 to R6 in one run, on a made-up checkpoint.

Server parts (R1, R2 by disconnect, R5, R6) share two `vllm serve`; engine parts (R2 by the API, R3, R4) run in a child
process with the engine inside it. Exit code 1 if a figure is missed.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_dvlm.bench.abuse.job import PARTS, QUICK, Counts, Job
from vllm_dvlm.bench.common import Row, add_output_arguments, describe_run, report
from vllm_dvlm.bench.result import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_output_arguments(parser)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="R", help="figures, e.g. R1 R5")
    parser.add_argument("--quick", action="store_true", help="small counts: a look, not a figure")
    for field in dataclasses.fields(Counts):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=int, metavar="N", help=f"default {field.default}, with --quick {_quick(field)}")
    parser.add_argument("--cases", nargs="+", type=int, metavar="I", help="R1: only requests of these numbers")
    parser.add_argument("--threads", type=int, default=1, help="of server and engine (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", metavar="FOLDER", type=Path, help="keep the servers' logs there")


def _quick(field: dataclasses.Field) -> int:
    return getattr(QUICK, field.name)


def counts_of(arguments: argparse.Namespace) -> Counts:
    """Counts of the command line; ValueError for one below 1."""
    counts = QUICK if arguments.quick else Counts()
    given = {f.name: value for f in dataclasses.fields(Counts) if (value := getattr(arguments, f.name)) is not None}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
    counts = dataclasses.replace(counts, **given)
    if counts.requests < 2 * counts.window:
        raise ValueError(f"--requests {counts.requests} must be at least twice --window {counts.window}.")
    return counts


def run(arguments: argparse.Namespace) -> None:
    """Measure and report. ValueError for arguments that cannot be met."""
    counts = counts_of(arguments)
    if arguments.threads < 1:
        raise ValueError("--threads must be at least 1.")
    for option, part in (("png", "R6"), ("cases", "R1")):
        if getattr(arguments, option) and part not in arguments.only:
            raise ValueError(f"--{option} needs {part}: add it to --only.")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    result = Result()
    with tempfile.TemporaryDirectory(prefix="vllm-dvlm-abuse-") as scratch:
        workdir = arguments.logs or Path(scratch)
        workdir.mkdir(parents=True, exist_ok=True)
        job = Job(
            folder=write_checkpoint(Path(scratch) / "checkpoint", arguments.seed),
            workdir=workdir.resolve(),
            seed=arguments.seed,
            threads=arguments.threads,
            counts=counts,
            parts=tuple(part for part in PARTS if part in arguments.only),
        )
        measure(job, result, arguments.cases)
    result.rows.sort(key=lambda row: row["figure"])
    missed = sum(row["met"] == "NO" for row in result.rows)
    description = describe_run("float32", arguments.seed) | result.description
    description["mode"] = "quick" if arguments.quick else "full"
    report(arguments, result.rows, result.figures | {"R_missed": missed}, description, result_plot(result))
    if missed:
        raise SystemExit(1)


def write_checkpoint(folder: Path, seed: int) -> Path:
    """A small random model with the real vocabulary."""
    from vllm_dvlm.bench.abuse.job import SIZES
    from vllm_dvlm.synthetic.random_checkpoint import write_random_checkpoint

    return write_random_checkpoint(folder, SIZES, seed)


def measure(job: Job, result: Result, cases: list[int] | None = None) -> None:
    """Run the parts of the job."""
    from vllm_dvlm.bench.abuse import aborts, engine_parts, fuzz, kills, served, soak

    timed = Timed(result)
    wants = set(job.parts).__contains__
    if wants("R2") or wants("R3") or wants("R4"):
        timed("engine", engine_parts.measure, job, result)
    if wants("R1") or wants("R2") or wants("R5"):
        with served.start(job, "server") as server:
            if wants("R1"):
                timed("R1", fuzz.measure, job, server, result, cases)
            if wants("R2"):
                timed("R2_http", aborts.measure, job, server, result)
            if wants("R5"):
                timed("R5_core", kills.measure_core, job, server, result)
    if wants("R5") or wants("R6"):
        with served.start(job, "restarted") as server:
            if wants("R5"):
                kills.check_restart(server, "core", result)
            if wants("R6"):
                timed("R6", soak.measure, job, server, result)
        if wants("R5"):
            kills.check_stop(server, result)
    if wants("R5"):
        timed("R5_worker", kills.measure_worker, job, result)


class Timed:
    """Calls parts and notes their seconds."""

    def __init__(self, result: Result) -> None:
        self.result = result

    def __call__(self, name: str, part: Callable[..., None], *args: Any) -> None:
        begin = time.monotonic()
        part(*args)
        self.result.description[f"seconds_{name}"] = round(time.monotonic() - begin, 1)


def result_plot(result: Result) -> Callable[[Any], None] | None:
    """Memory and open files over the requests of R6, for `common.write_png`; None if R6 was not measured."""
    points: list[Row] = result.growth

    def draw(axes: Any) -> None:
        axes.plot([p["requests"] for p in points], [p["memory_mb"] for p in points], label="resident memory, MB")
        axes.set(xlabel="requests", ylabel="MB", title="A server's processes over many requests", ylim=(0, None))
        files = axes.twinx()
        files.plot([p["requests"] for p in points], [p["open_files"] for p in points], "C1", label="open files")
        files.set(ylabel="open files", ylim=(0, None))
        axes.legend(loc="lower left")
        files.legend(loc="lower right")

    return draw if points else None
