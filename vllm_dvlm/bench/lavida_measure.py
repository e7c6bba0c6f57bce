"""L2 and L6 of `vllm-dvlm bench lavida`; each function runs in a process of its own with one engine.

Engine and plain loops share process, threads, weights and dtype, and take turns. Times are decode only: images are
encoded and prompts merged before, on both sides.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_dvlm.bench.common import describe_run, peak_rss_bytes, progress
from vllm_dvlm.bench.counted import LLADA_8B, Generation, Shape, prefix_speedup, work_shares
from vllm_dvlm.bench.engine_host import model_shape, request
from vllm_dvlm.bench.engine_measure import BATCH, Side, make_image, measure_batch, overhead_ms, text_prompt
from vllm_dvlm.bench.lavida_job import STEP_RATIO, Job
from vllm_dvlm.bench.result import Result, Time
from vllm_dvlm.reference.lavida_loops import LavidaOptions, LavidaResult, lean_loop, official_loop
from vllm_dvlm.reference.lavida_model import LavidaModel
from vllm_dvlm.synthetic.random_lavida import write_random_lavida

# The gain of the prefix cache that the LaViDa paper reports, and the engine against the lean loop.
CACHE_TARGET, LEAN_TARGET = 3.9, 1.1


def measure_model(job: Job) -> Result:
    """In the child: the figures that are asked for, on one model."""
    folder = write_random_lavida(Path(job.workdir) / job.name, job.sizes, seed=job.seed)
    side = Side.start(job.name, folder, make_image(*job.image, job.seed), BATCH, LavidaModel, num_first=1)
    result = Result(description=describe_run("float32", job.seed))
    result.description[f"model_{job.name}"] = model_shape(side.model.config)
    if "L2" in job.figures:
        measure_prefix(side, job, result)
        _count(side, job, result)
    if "L6" in job.figures:
        measure_together(side, job, result)
    result.description |= {"prompt": len(side.prompt.embeddings), "visual_tokens": _num_visual(side)}
    result.peak_rss_bytes = peak_rss_bytes()
    return result


def _num_visual(side: Side) -> int:
    return sum(end - first for first, end in side.prompt.visual_spans)


def _generation(side: Side, job: Job) -> Generation:
    return Generation(len(side.prompt.embeddings), _num_visual(side), job.canvas, int(job.canvas * STEP_RATIO))


def _count(side: Side, job: Job, result: Result) -> None:
    """What the prefix cache saves by count, and shares of the work, here and at LLaDA 8B's sizes."""
    work = _generation(side, job)
    here = Shape(*(side.model.config[field.name] for field in dataclasses.fields(Shape)))
    for name, shape in ((job.name, here), ("counted_8b", LLADA_8B)):
        result.figures[f"L2_ideal_{name}"] = prefix_speedup(shape, work)
        for part, share in work_shares(shape, work, every_position=True).items():
            result.figures[f"work_share_official_{part}_{name}"] = share


def _timed(run: Callable[[], LavidaResult]) -> tuple[Time, LavidaResult]:
    begin, cpu_begin = time.perf_counter(), time.process_time()
    found = run()
    return (time.perf_counter() - begin, time.process_time() - cpu_begin), found


def measure_prefix(side: Side, job: Job, result: Result) -> None:
    """L2: the engine's prefix mode against its full attention and against both loops in prefix mode, batch 1."""
    canvas, options = job.canvas, LavidaOptions(job.canvas, job.canvas, step_ratio=STEP_RATIO)
    asked: dict[str, Any] = {"block_length": canvas, "step_ratio": STEP_RATIO}
    prefix = request(side.engine_prompt, canvas, attention="prefix", **asked)
    full = request(side.engine_prompt, canvas, attention="full", **asked)
    # Buffers of every size are touched once.
    side.host.decode([prefix])
    side.host.decode([request(side.engine_prompt, canvas, attention="full", max_steps=2)])
    few = dataclasses.replace(options, step_ratio=2 / canvas)
    for loop in (lean_loop, official_loop):
        loop(side.model, side.prompt, few)
    ours, uncached, lean, official, steps, equal = [], [], [], [], [], True
    for _ in progress(range(job.repeats), f"L2 {side.name}"):
        run = side.host.decode([prefix])
        ours.append(run.time)
        steps += run.steps[1:]  # the first one computes the prompt
        spent, found = _timed(lambda: lean_loop(side.model, side.prompt, options))
        lean.append(spent)
        equal &= run.token_ids == [found.final_ids]
        uncached.append(side.host.decode([full]).time)
        spent, found = _timed(lambda: official_loop(side.model, side.prompt, options))
        official.append(spent)
        equal &= run.token_ids == [found.final_ids]
    distinct = len({*run.token_ids[0]})
    setting = side.setting(f"canvas {canvas}, {len(run.steps)} steps, prefix")
    tokens = {"tokens_equal": equal, "distinct": f"{distinct} of {canvas}"}
    name = side.name
    result.ratio(f"L2_prefix_vs_full_{name}", setting, ours, uncached, "engine, full attention", CACHE_TARGET)
    result.ratio(f"L2_prefix_vs_lean_loop_{name}", setting, ours, lean, "lean loop, prefix", LEAN_TARGET, **tokens)
    result.ratio(f"L2_prefix_vs_official_loop_{name}", setting, ours, official, "official loop, prefix", None, **tokens)
    result.figures[f"L2_tokens_equal_{name}"] = equal
    result.figures[f"L2_distinct_tokens_{name}"] = distinct
    result.figures[f"L2_overhead_ms_{name}"] = overhead_ms(steps)


def measure_together(side: Side, job: Job, result: Result) -> None:
    """L6: eight requests at once against one after another, prefix mode.

    As in N4 the target stands at blocks of 4: there few rows of vocabulary logits are made per step. In one block they
    are most of this model's work, and nobody shares them.
    """
    blocks: dict[str, Any] = {"block_length": 4}
    whole: dict[str, Any] = {"block_length": job.canvas, "step_ratio": STEP_RATIO}
    text, picture, canvas = text_prompt(8), side.engine_prompt, job.canvas // 2
    settings = (
        ("", "text prompt in blocks of 4", text, canvas, blocks, 3),
        ("_pictures", f"image prompt of {len(side.prompt.embeddings)} in blocks of 4", picture, canvas, blocks, None),
        ("_default", "text prompt in one block", text, job.canvas, whole, None),
    )
    for suffix, what, prompt, length, options, target in settings:
        steps = int(length * options.get("step_ratio", 1))
        work = [request(prompt, length, attention="prefix", **options)] * BATCH
        key = f"L6_batch{BATCH}_vs_sequential_{side.name}{suffix}"
        setting = f"{side.name}, {what}, canvas {length}, {steps} steps, prefix"
        measure_batch(side.host, key, setting, work, job.repeats, target, result)
