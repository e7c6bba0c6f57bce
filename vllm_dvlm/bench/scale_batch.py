"""Rows per second of `vllm-dvlm batch` on one engine and on several, in turns. Imports no Ray and no vLLM."""

import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dvlm.bench.scale_plan import Plan
from vllm_dvlm.bench.scale_run import RAY, RUN_S, is_busy
from vllm_dvlm.bench.settings_grid import Setting

PICTURES = 32  # different ones; rows share them
_RATE = re.compile(r"^rows/s\s+([\d.]+)$", re.M)
_ERRORS = re.compile(r"^error lines\s+(\d+)$", re.M)


@dataclass(frozen=True)
class Batch:
    """A file answered by so many engines. per_s: rows per second of every run. busy: others worked here."""

    replicas: int
    ranks: int
    setting: Setting
    per_s: tuple[float, ...]
    load_average: float
    busy: bool

    @property
    def rate(self) -> float:
        return statistics.median(self.per_s)


def write_rows(folder: Path, plan: Plan, setting: Setting, num: int) -> Path:
    """An input file of that many plain rows with random pictures, and the pictures beside it."""
    from PIL import Image

    client, chance = plan.client, random.Random(plan.client.seed)
    height, width = client.image
    for picture in range(PICTURES):
        image = Image.frombytes("RGB", (width, height), chance.randbytes(3 * width * height))
        image.save(folder / f"{picture}.png")
    options = {"max_tokens": client.output_len, "temperature": 0, "ignore_eos": True} | plan.request_options(setting)
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(num):
            words = " ".join(str(chance.randrange(10)) for _ in range(client.input_len // 2))
            images = [f"{(number + each) % PICTURES}.png" for each in range(client.images)]
            file.write(json.dumps({"id": number, "images": images, "question": words} | options) + "\n")
    return path


def command(plan: Plan, replicas: int, ranks: int, rows: Path, output: Path) -> list[str]:
    """As a user would answer the file."""
    words = ["--input", rows, "--output", output, "--model", plan.client.model, "--replicas", replicas]
    words += ["--tensor-parallel-size", ranks, "--in-flight", plan.per_replica, "--max-num-seqs", plan.engine.slots]
    return [sys.executable, "-m", "vllm_dvlm.cli", "batch", *map(str, words), *plan.engine.options]


def cores_of(plan: Plan, replicas: int) -> set[int]:
    """Cores of a batch on that many engines: on a host without GPUs each engine brings its share, and no more."""
    every = sorted(os.sched_getaffinity(0))
    if plan.gpus or "RAY_ADDRESS" in os.environ:
        return set(every)
    return set(every[: max(1, len(every) * replicas // plan.engine.share)])


def run(plan: Plan, replicas: int, ranks: int, rows: Path, output: Path) -> float:
    """Rows per second, from the first line written on. RuntimeError if a row was not answered."""
    cores = cores_of(plan, replicas)
    environment = os.environ | ({} if "RAY_ADDRESS" in os.environ else RAY)
    ran = subprocess.run(
        command(plan, replicas, ranks, rows, output),
        capture_output=True,
        text=True,
        env=environment,
        timeout=RUN_S,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    rate, errors = _RATE.search(ran.stdout), _ERRORS.search(ran.stdout)
    if ran.returncode or rate is None or errors is None:
        raise RuntimeError(f"vllm-dvlm batch ended with {ran.returncode}:\n{ran.stderr[-4000:]}")
    if int(errors[1]):
        raise RuntimeError(f"{errors[1]} rows were not answered, among them:\n{_first_error(output)}")
    return float(rate[1])


def _first_error(output: Path) -> Any:
    with output.open(encoding="utf-8") as file:
        return next(found["error"] for found in map(json.loads, file) if found.get("error"))


def measure(plan: Plan, num: int, moved: Callable[[], Any]) -> list[Batch]:
    """Every number of replicas with every setting, in turns; `num` rows for each replica of a run."""
    found = []
    with tempfile.TemporaryDirectory(prefix="vllm-dvlm-bench-") as name:
        folder = Path(name)
        for ranks in plan.ranks:
            for setting in plan.settings:
                rates: dict[int, list[float]] = {replicas: [] for replicas in plan.replicas}
                average, busy = os.getloadavg()[0], False
                for _ in range(plan.pairs):
                    for replicas in plan.replicas:
                        rows = write_rows(folder, plan, setting, replicas * num)
                        output = folder / "answers.jsonl"
                        output.unlink(missing_ok=True)
                        busy |= is_busy()
                        rates[replicas].append(run(plan, replicas, ranks, rows, output))
                        moved()
                found += [Batch(each, ranks, setting, tuple(rates[each]), average, busy) for each in plan.replicas]
    return found


def times_one(batches: Sequence[Batch], batch: Batch) -> float:
    """Rows per second, times those of one engine with the same setting: median of the turns."""
    one = next(b for b in batches if (b.replicas, b.ranks, b.setting) == (1, batch.ranks, batch.setting))
    return statistics.median(a / b for a, b in zip(batch.per_s, one.per_s, strict=True))
