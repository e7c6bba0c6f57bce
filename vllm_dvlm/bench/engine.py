"""`vllm-dvlm bench engine`: the engine's figures N1, N2, N3, N4, N9 and N10 in one run on one machine.

Three child processes, one per model, each with one engine and its baselines; see `engine_measure`.
"""

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from vllm_dvlm.bench import child, engine_env
from vllm_dvlm.bench.common import Row, add_output_arguments, format_table, report
from vllm_dvlm.bench.engine_job import Job, check_goldens, default_goldens
from vllm_dvlm.synthetic.checkpoint_files import SIZES_8B, Sizes

MID = Sizes(hidden=512, layers=8, heads=8, intermediate=1536)
MID_QUICK = Sizes(hidden=256, layers=4, heads=4, intermediate=768)
SIZES_8B_QUICK = dataclasses.replace(SIZES_8B, hidden=256, layers=4, heads=4, intermediate=768)
MODELS = ("8b", "tiny", "mid")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_output_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer repeats, N1 on text cases only")
    parser.add_argument(
        "--goldens", metavar="FOLDER", type=Path, help="recordings for N1 (default: tests/golden/llada_v)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of engine and baselines")
    parser.add_argument("--repeats", type=int, help="of every timing (default 3, with --quick 2)")
    parser.add_argument("--canvas-length", type=int, default=32, help="of N9")
    parser.add_argument("--threshold", type=float, default=1.0, help="factor of N9")
    parser.add_argument("--logit-std", type=float, default=6.0, help="spread of the random models' logits in N9")
    parser.add_argument("--only", choices=MODELS, help="one model; 8b: a small one in the proportions of LLaDA 8B")
    parser.add_argument("--seed", type=int, default=0)


def draw_growth(growth: list[Row]) -> Any:
    """A function that plots time per step against what grows, for `common.write_png`."""

    def draw(axes: Any) -> None:
        for what, unit in (("canvas", "positions"), ("prompt", "tokens of the question"), ("batch", "requests")):
            points = [row for row in growth if row["grows"] == what]
            axes.plot([p[what] for p in points], [p["step_ms"] for p in points], marker="o", label=f"{what} ({unit})")
        axes.set(xscale="log", yscale="log", xlabel="size", ylabel="ms per engine step", title="Time of an engine step")
        axes.set_xscale("log", base=2)
        axes.legend()

    return draw


def run(arguments: argparse.Namespace) -> None:
    """Measure and report. ValueError for arguments that cannot be met."""
    if arguments.threads < 1 or (arguments.repeats is not None and arguments.repeats < 1):
        raise ValueError("--threads and --repeats must be at least 1.")
    engine_env.prepare(arguments.threads)
    goldens = arguments.goldens.resolve() if arguments.goldens else default_goldens()
    if goldens is not None:
        check_goldens(goldens)
    quick = arguments.quick
    rows, growth, figures, description = [], [], {}, {}
    with tempfile.TemporaryDirectory(prefix="vllm-dvlm-bench-") as workdir:
        job = Job(
            workdir=workdir,
            threads=arguments.threads,
            seed=arguments.seed,
            repeats=arguments.repeats or (2 if quick else 3),
            num_requests=200 if quick else 1000,
            official_steps=1 if quick else 2,
            canvas_length=arguments.canvas_length,
            mid_sizes=MID_QUICK if quick else MID,
            sizes_8b=SIZES_8B_QUICK if quick else SIZES_8B,
            logit_std=arguments.logit_std,
            threshold=arguments.threshold,
            goldens=None if goldens is None else str(goldens),
            quick=quick,
        )
        load_before = os.getloadavg()[0]
        for name in (arguments.only,) if arguments.only else MODELS:
            result = child.run("vllm_dvlm.bench.engine_measure", f"measure_{name}", job)
            rows += result.rows
            growth += result.growth
            figures |= result.figures
            peak = max(description.get("peak_rss_gib", 0), result.peak_rss_bytes / 2**30)
            description |= result.description | {"peak_rss_gib": peak}
    if growth:
        print("Time of an engine step, tiny model (canvas 32, question of 64 tokens, batch 1 unless it grows)")
        print(format_table(growth), end="\n\n")
    rows.sort(key=lambda row: int(row["figure"][1:]))
    if goldens is None:
        figures["N1_token_equality"] = "not run: no tests/golden/llada_v here, name it with --goldens"
    description |= {
        "repeats": job.repeats,
        "load_average_before": round(load_before, 2),
        "mode": "quick" if quick else "full",
    }
    more = [{"figure": "growth"} | row for row in growth]
    report(arguments, rows, figures, description, draw_growth(growth) if growth else None, more)
