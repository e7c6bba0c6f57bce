"""`vllm-dvlm bench lavida`: LaViDa's figures L2, L3, L4 and L6 in one run on one machine.

L2 the prefix cache, L3 and L4 visual-token pruning without and with it, L6 a batch; every engine has a child process of
its own. See `lavida_measure` and `lavida_pruning`.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from vllm_dvlm.bench import child
from vllm_dvlm.bench.common import Row, add_output_arguments, progress, report
from vllm_dvlm.bench.lavida_job import (
    CANVAS,
    FIGURES,
    IMAGE,
    QUICK_CANVAS,
    QUICK_IMAGE,
    QUICK_SIZES,
    SIZES,
    Job,
    PrunedJob,
    pruned_job,
)
from vllm_dvlm.bench.result import Result

PRUNING, PLAIN = "vllm_dvlm.bench.lavida_pruning", "vllm_dvlm.bench.lavida_measure"
Part = tuple[str, str, Job | PrunedJob]  # module, function, its settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_output_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="smaller models, a smaller image, fewer repeats")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of engine and loops")
    parser.add_argument("--repeats", type=int, help="of every timing (default 3, with --quick 2)")
    what = "; ".join(f"{name}: {text}" for name, text in FIGURES.items())
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help=what)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=SIZES,
        default=list(SIZES),
        help="of L2; 8b: a small one with LLaDA 8B's shares of attention and logits",
    )
    parser.add_argument(
        "--keep-ratios",
        type=float,
        nargs="+",
        default=[0.5, 0.25],
        metavar="RATIO",
        help="of L3 and L4 (default 0.5 0.25)",
    )
    parser.add_argument("--seed", type=int, default=0)


def parts_of(arguments: argparse.Namespace, workdir: str) -> Iterator[Part]:
    """What runs, one child process each. ValueError for arguments that cannot be met."""
    quick, only = arguments.quick, set(arguments.only)
    repeats = (2 if quick else 3) if arguments.repeats is None else arguments.repeats
    if arguments.threads < 1 or repeats < 1:
        raise ValueError("--threads and --repeats must be at least 1.")
    if any(not 0 < ratio < 1 for ratio in arguments.keep_ratios):
        raise ValueError("--keep-ratios must lie between 0 and 1.")
    common = {"workdir": workdir, "threads": arguments.threads, "seed": arguments.seed, "repeats": repeats}
    for name, sizes in (QUICK_SIZES if quick else SIZES).items():
        figures = ("L2",) * ("L2" in only and name in arguments.models) + ("L6",) * ("L6" in only and name == "tiny")
        if figures:
            image, canvas = (QUICK_IMAGE, QUICK_CANVAS) if quick else (IMAGE, CANVAS)
            job = Job(name=name, sizes=sizes, image=image, canvas=canvas, figures=figures, **common)
            yield PLAIN, "measure_model", job
    figures = tuple(name for name in ("L3", "L4") if name in only)
    pruned = pruned_job(quick, tuple(arguments.keep_ratios), figures, **common)
    if figures:
        yield PRUNING, "measure_pruned", pruned
    if "L4" in figures:
        yield PRUNING, "measure_pool", pruned


def merged(results: list[Result]) -> Result:
    """All parts in one, in the order of the figures; of the peak memories the highest."""
    whole = Result()
    for result in results:
        whole.rows += result.rows
        whole.figures |= result.figures
        whole.description |= result.description
        whole.peak_rss_bytes = max(whole.peak_rss_bytes, result.peak_rss_bytes)
    whole.rows.sort(key=lambda row: row["figure"])
    return whole


def draw_targets(rows: list[Row]) -> Any:
    """A function that draws every ratio as a bar with its range and its target, for `common.write_png`."""

    def draw(axes: Any) -> None:
        lines = [row for row in rows if "low" in row][::-1]
        for place, row in enumerate(lines):
            value, target = row["value"], row["target"].removeprefix(">= ")
            span = [[value - row["low"]], [row["high"] - value]]
            axes.barh(place, value, xerr=span, color="C0" if row["met"] != "NO" else "C3", ecolor="gray")
            if target:
                axes.plot([float(target)] * 2, [place - 0.45, place + 0.45], "k-")
        names = [f"{row['figure']} {', '.join(row['setting'].split(', ')[:2])} / {row['against']}" for row in lines]
        axes.set_yticks(range(len(lines)), names, fontsize=5)
        axes.set(xlim=(0, None), xlabel="times faster (line: target)", title="LaViDa")

    return draw


def run(arguments: argparse.Namespace) -> None:
    """Measure and report. ValueError for arguments that cannot be met."""
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="vllm-dvlm-bench-") as workdir:
        parts = list(parts_of(arguments, workdir))
        if not parts:
            raise ValueError("Nothing to measure: name a figure and, for L2, a model.")
        result = merged([child.run(*part) for part in progress(parts, "engines")])
    result.description |= {
        "peak_rss_gib": result.peak_rss_bytes / 2**30,
        "repeats": parts[0][2].repeats,
        "load_average_before": round(load_before, 2),
        "mode": "quick" if arguments.quick else "full",
    }
    report(arguments, result.rows, result.figures, result.description, draw_targets(result.rows))
