"""What the benches of pruning share: settings, their arguments, how their parts run. Light to import."""

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from vllm_dvlm.bench import child
from vllm_dvlm.bench.common import Row, add_output_arguments
from vllm_dvlm.bench.result import Result
from vllm_dvlm.pruning.names import METHODS
from vllm_dvlm.synthetic.checkpoint_files import IMAGE_8B, SIZES_8B, Sizes

# Heads of 64 channels: a size that the CPU attention kernels have, so that nothing is padded.
SIZES = Sizes(hidden=384, layers=6, heads=6, intermediate=1152)
QUICK_SIZES = Sizes(hidden=64, layers=4, heads=2, intermediate=128, vocab_rows=4096)
# In flight counts do not depend on width and vocabulary, and hundreds of prompts of 3,700 tokens have to be computed.
CAPACITY_SIZES = Sizes(hidden=64, layers=2, heads=2, intermediate=128, vocab_rows=4096)

IMAGE, QUICK_IMAGE = (800, 1000), (360, 70)  # 3,669 and about 900 visual tokens
SHAPES = {"8b": (SIZES_8B, IMAGE_8B), "long": (SIZES, IMAGE)}
KEEP_RATIOS = (1.0, 0.75, 0.5, 0.25, 0.1)
CACHED = 32  # refresh interval of the cached setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(child.Job):
    """Settings of a measurement of pruning.

    pool_prompts: the KV pool of `capacity`, in unpruned requests; throughput_prompts: that of `throughput`.
    """

    workdir: str
    quick: bool
    shape: str  # of `SHAPES`; the quick sizes have none
    repeats: int
    method: str
    keep_ratios: tuple[float, ...]
    canvas: int
    num_steps: int
    sizes: Sizes
    image: tuple[int, int]
    pool_prompts: int
    throughput_prompts: int
    concurrency: tuple[int, ...]
    family: str = "llada_v"  # of `pruning_host.FAMILIES`
    real_image: tuple[int, int] = IMAGE  # of `capacity`, whatever is timed; not in quick runs

    @property
    def pruned_ratios(self) -> tuple[float, ...]:
        """Keep ratios below 1."""
        return tuple(ratio for ratio in self.keep_ratios if ratio < 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that `bench latency`, `throughput`, `capacity` and `pruning` have in common."""
    add_output_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="tiny model, small image, two repeats")
    parser.add_argument(
        "--shape",
        choices=sorted(SHAPES),
        default="8b",
        help="8b: a small model and prompt in the proportions of LLaDA 8B's work; long: a narrow model with a prompt "
        "of real length, most of whose work is attention",
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, help="of every timing (default 3, with --quick 2)")
    parser.add_argument("--method", choices=sorted(METHODS), default="redvtp", help="pruning method")
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=list(KEEP_RATIOS), metavar="RATIO")
    parser.add_argument("--canvas-length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=16, help="denoising steps of the canvas")
    parser.add_argument("--hidden", type=int, help="width of the model")
    parser.add_argument("--layers", type=int, help="of the model")
    parser.add_argument("--pool-prompts", type=int, help="KV pool of `capacity` in unpruned requests (default 24)")
    parser.add_argument("--seed", type=int, default=0)


def job_of(arguments: argparse.Namespace, workdir: str) -> Job:
    """Settings from parsed arguments. ValueError for arguments that cannot be met."""
    numbers = (arguments.threads, arguments.repeats or 1, arguments.canvas_length, arguments.steps)
    if min(numbers) < 1 or min(arguments.pool_prompts or 2, arguments.steps) < 2:
        raise ValueError("--threads, --repeats, --canvas-length must be at least 1, --steps and --pool-prompts 2.")
    if any(not 0 < ratio <= 1 for ratio in arguments.keep_ratios):
        raise ValueError("--keep-ratios must lie in (0, 1].")
    quick = arguments.quick
    sizes, image = (QUICK_SIZES, QUICK_IMAGE) if quick else SHAPES[arguments.shape]
    if arguments.hidden is not None:
        if arguments.hidden < 64 or arguments.hidden % 64:
            raise ValueError("--hidden must be a multiple of 64.")
        heads = arguments.hidden // 64
        sizes = dataclasses.replace(sizes, hidden=arguments.hidden, heads=heads, intermediate=3 * arguments.hidden)
    if arguments.layers is not None:
        if arguments.layers < 2:
            raise ValueError("--layers must be at least 2.")
        sizes = dataclasses.replace(sizes, layers=arguments.layers)
    return Job(
        workdir=workdir,
        quick=quick,
        shape="quick" if quick else arguments.shape,
        threads=arguments.threads,
        seed=arguments.seed,
        repeats=arguments.repeats or (2 if quick else 3),
        method=arguments.method,
        # Unpruned comes first: everything is compared with it.
        keep_ratios=tuple(sorted({1.0, *arguments.keep_ratios}, reverse=True)),
        canvas=arguments.canvas_length,
        num_steps=arguments.steps,
        sizes=sizes,
        image=image,
        pool_prompts=arguments.pool_prompts or (6 if quick else 24),
        throughput_prompts=4,
        concurrency=(1, 4) if quick else (1, 4, 16),
    )


def measure(arguments: argparse.Namespace, parts: Sequence[tuple[str, str]]) -> tuple[Job, list[Result]]:
    """Run parts, (module, function) each, one after another in processes of their own."""
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="vllm-dvlm-bench-") as workdir:
        job = job_of(arguments, workdir)
        results = [child.run(module, function, job) for module, function in parts]
    for result in results:
        result.description |= {
            "load_average_before": round(load_before, 2),
            "repeats": job.repeats,
            "method": job.method,
            "mode": "quick" if job.quick else "full",
            "shape": job.shape,
        }
    return job, results


def key_of(ratio: float) -> str:
    """Part of a figure's name: 0.25 -> keep25."""
    return f"keep{ratio * 100:g}"


def merged(results: Sequence[Result]) -> tuple[list[Row], Row, Row]:
    """Rows, figures and description of several parts; of the peak memories the highest."""
    rows: list[Row] = [row for result in results for row in result.rows]
    figures: Row = {}
    description: Row = {}
    peak: list[Any] = []
    for result in results:
        figures |= result.figures
        description |= result.description
        peak.append(result.description.get("engine_peak_rss_gib", 0.0))
    return rows, figures, description | {"engine_peak_rss_gib": max(peak)}
