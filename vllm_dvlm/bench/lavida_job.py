"""Settings of `vllm-dvlm bench lavida`: figures, models and shapes. Light to import."""

import dataclasses
from typing import Any

from vllm_dvlm.bench import child, pruning_job
from vllm_dvlm.bench.result import Result
from vllm_dvlm.synthetic.checkpoint_files import Sizes

FIGURES = {
    "L2": "prefix cache against full attention, engine against plain loops",
    "L3": "RedVTP with full attention",
    "L4": "RedVTP with the prefix cache, in a fixed KV pool",
    "L6": "eight requests at once",
}

# A picture of 1,008 visual tokens in four tiles, a quick one of 406 in two.
IMAGE, QUICK_IMAGE = (768, 768), (384, 384)
# With that prompt 12 % of the work is attention and 6 % are logits, if logits are made of every position as in the
# original. LLaDA 8B has 12 % and 6 % on a prompt of 3,700 tokens, 4 % and 7 % on this one.
SIZES_8B = Sizes(hidden=1152, layers=4, heads=9, intermediate=3456, vocab_rows=4096)
SIZES = {"8b": SIZES_8B, "mid": Sizes(hidden=512, layers=8, heads=8, intermediate=1536), "tiny": Sizes()}
QUICK_SIZES = {
    "8b": dataclasses.replace(SIZES_8B, hidden=256, layers=2, heads=2, intermediate=768),
    "mid": Sizes(hidden=256, layers=4, heads=4, intermediate=768),
    "tiny": Sizes(vocab_rows=4096),
}
QUICK_PRUNED_SIZES = Sizes(hidden=64, layers=4, heads=2, intermediate=128, vocab_rows=4096)

# The official predict script's settings: 64 tokens, one block of 64, half as many steps.
CANVAS, STEP_RATIO = 64, 0.5
QUICK_CANVAS = 16
# RedVTP's.
PRUNED_CANVAS, PRUNED_STEPS, METHOD = 32, 16, "redvtp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(child.Job):
    """One engine beside plain loops.

    name: of the model. figures: those of L2 and L6 that are asked for. canvas: positions of L2 and L6.
    """

    workdir: str
    repeats: int
    name: str
    sizes: Sizes
    image: tuple[int, int]
    canvas: int
    figures: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrunedJob(pruning_job.Job):
    """One engine and pruned requests. figures: those of L3 and L4 that are asked for."""

    figures: tuple[str, ...] = ()


def pruned_job(quick: bool, keep_ratios: tuple[float, ...], figures: tuple[str, ...], **common: Any) -> PrunedJob:
    """Settings of L3 and L4. common: workdir, threads, seed and repeats."""
    return PrunedJob(
        **common,
        quick=quick,
        shape="quick" if quick else "8b",
        method=METHOD,
        # Unpruned comes first: everything is compared with it.
        keep_ratios=tuple(sorted({1.0, *keep_ratios}, reverse=True)),
        canvas=PRUNED_CANVAS,
        num_steps=PRUNED_STEPS,
        sizes=QUICK_PRUNED_SIZES if quick else SIZES_8B,
        image=QUICK_IMAGE if quick else IMAGE,
        pool_prompts=6 if quick else 24,
        throughput_prompts=4,
        concurrency=(1, 4) if quick else (1, 4, 16),
        family="lavida",
        real_image=IMAGE,
        figures=figures,
    )


def value_line(result: Result, key: str, setting: str, value: float, at_least: float | None, **more: Any) -> None:
    """Add a figure that must reach a number; None: no target. more: further columns."""
    target = "" if at_least is None else f">= {at_least}"
    result.value(key, setting, value, target, None if at_least is None else value >= at_least, **more)
