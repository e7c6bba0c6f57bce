"""What `vllm-dvlm bench engine` measures; each function runs in a process of its own with one engine.

Engine and baselines share process, threads, weights and dtype, and take turns. Times of generations are decode only:
images are encoded and prompts merged before, on both sides.
"""

import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vllm_dvlm.bench import baselines
from vllm_dvlm.bench.baselines import LoopTiming, cached_options, exact_options, time_lean_loop, time_official_loop
from vllm_dvlm.bench.common import describe_run, peak_rss_bytes, progress
from vllm_dvlm.bench.engine_host import EngineHost, Run, StepTime, model_shape, request
from vllm_dvlm.bench.engine_job import Job, Result
from vllm_dvlm.bench.random_checkpoint import write_random_checkpoint
from vllm_dvlm.bench.reference.model import Prompt, ReferenceModel, conversation

QUESTION = "<image>\nPlease describe this image in detail."
OFFICIAL_CHUNK_ROWS = 128  # 320 MB of logits and float64 softmax at a time; the original holds all rows at once
BATCH = 8


def make_image(width: int, height: int, seed: int) -> Image.Image:
    """Random pixels; the size alone decides how many visual tokens there are."""
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def words(count: int) -> str:
    """A question of about this many tokens."""
    return "What is this" + " and that" * ((count - 3) // 2) + "?"


@dataclasses.dataclass
class Side:
    """One checkpoint in the engine and in the reference model, with an image prompt of both."""

    host: EngineHost
    model: ReferenceModel
    folder: Path
    engine_prompt: dict[str, Any]
    prompt: Prompt
    reference_encode_s: float

    @classmethod
    def start(cls, folder: Path, image: Image.Image, max_num_seqs: int) -> "Side":
        host = EngineHost(folder, max_model_len=4096, max_num_seqs=max_num_seqs, max_canvas_length=128)
        model = ReferenceModel.load(folder)
        begin = time.perf_counter()
        model.image_features([image])
        encode_s = time.perf_counter() - begin
        prompt = baselines.make_prompt(model, QUESTION, [image])
        engine_prompt = {"prompt": conversation(QUESTION), "multi_modal_data": {"image": image}}
        host.run([request(engine_prompt, 4, max_steps=2)])  # warm up, and fill the encoder cache
        return cls(host, model, folder, engine_prompt, prompt, encode_s)

    def setting(self, name: str, more: str) -> str:
        return f"{name} ({model_shape(self.folder)}), prompt {len(self.prompt.embeddings)}, {more}"


def official_generation_s(timing: LoopTiming, num_steps: int) -> list[float]:
    """Seconds of a whole generation: every step of that loop computes every row, so they all cost the same."""
    return [seconds * num_steps / timing.num_forwards for seconds in timing.seconds]


def overhead_ms(steps: Sequence[StepTime]) -> float:
    """N2: median over steps of the wall time of an engine step less the time inside the model.

    The model is its forward, the vocabulary logits and their reduction to token and confidence, timed in the same
    steps. What is left is the engine: vLLM's scheduler and runner, metadata, prompt embeddings, canvas update, output.
    """
    return 1000 * statistics.median(step.overhead_s for step in steps)


def measure_exact(side: Side, name: str, job: Job, canvas: int, num_steps: int, result: Result) -> list[StepTime]:
    """N3: exact mode at batch 1 against both loops. Returns the engine's steps."""
    work = [request(side.engine_prompt, canvas, max_steps=num_steps)]
    ours, lean, official, steps, equal = [], [], [], [], True
    side.host.decode(work)
    for _ in progress(range(job.repeats), f"N3 {name}"):
        run = side.host.decode(work)
        ours.append(run.wall_s)
        steps += run.steps
        loop = time_lean_loop(side.model, side.prompt, exact_options(canvas, num_steps), num_repeats=1)
        lean += loop.seconds
        equal &= run.token_ids == [loop.result.final_ids]
        loop = time_official_loop(
            side.model,
            side.prompt,
            exact_options(canvas, job.official_steps),
            num_repeats=1,
            chunk_rows=OFFICIAL_CHUNK_ROWS,
        )
        official += official_generation_s(loop, num_steps)
    setting = side.setting(name, f"canvas {canvas}, {num_steps} steps")
    suffix = "" if name == "tiny" else f"_{name}"
    result.ratio(f"N3_exact_batch1_vs_official_loop{suffix}", setting, ours, official, "official loop", 1.1)
    result.ratio(f"N3_exact_batch1_vs_lean_loop{suffix}", setting, ours, lean, "lean loop", 0.95)
    result.figures[f"N3_tokens_equal_lean_loop{suffix}"] = equal
    result.figures[f"N3_image_encoding_engine_s{suffix}"] = side.host.encode_s
    result.figures[f"N3_image_encoding_reference_s{suffix}"] = side.reference_encode_s
    return steps


def measure_batch(
    host: EngineHost, key: str, setting: str, work: list, repeats: int, target: float | None, result: Result
) -> list[StepTime]:
    """N4: the requests together against one after another. Returns the steps of the runs together."""
    together, alone, steps = [], [], []
    host.decode(work)
    for _ in progress(range(repeats), key):
        run = host.decode(work)
        together.append(run.wall_s)
        steps += run.steps
        alone.append(sum(host.decode([one]).wall_s for one in work))
    result.ratio(key, setting, together, alone, "one after another", target)
    return steps


def text_prompt(count: int) -> dict[str, Any]:
    """Engine prompt with a question of about `count` tokens (the conversation adds about 55)."""
    return {"prompt": conversation(words(count))}


def measure_growth(host: EngineHost, job: Job, result: Result) -> None:
    """Wall time per step against canvas length, prompt length and batch, one at a time; the rest stays at the base."""
    base = {"canvas": 32, "prompt": 64, "batch": 1}
    grid = {"canvas": (8, 16, 32, 64, 128), "prompt": (16, 64, 256, 1024, 2048), "batch": (1, 2, 4, 8, 16)}
    for what, values in grid.items():
        for value in progress(values[:3] if job.quick else values, f"growth with {what}"):
            point = base | {what: value}
            work = [request(text_prompt(point["prompt"]), point["canvas"], max_steps=8)] * point["batch"]
            host.decode(work)
            steps = [s for _ in range(job.repeats) for s in host.decode(work).steps]
            step_ms = 1000 * statistics.median(s.wall_s for s in steps)
            result.growth.append(
                {
                    "grows": what,
                    **point,
                    "step_ms": step_ms,
                    "ms_per_request": step_ms / point["batch"],
                    "overhead_ms": overhead_ms(steps),
                }
            )


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(side: Side, job: Job, result: Result) -> None:
    """N10: bound on vocabulary logits, and growth of resident memory over many short requests."""
    host = side.host
    row_bytes = 4 * side.model.config["vocab_size"]
    bound = host.logits_rows_bound
    setting = f"tiny, {job.num_requests} text requests of 4 tokens, {BATCH} at a time"
    result.value(
        "N10_logits_bytes_max",
        f"largest chunk seen, rows of the current block; bound {bound} rows",
        host.max_logits_rows * row_bytes,
        f"<= {bound * row_bytes}",
        host.max_logits_rows <= bound,
    )
    work = [request(text_prompt(8), 4, max_steps=2)] * BATCH
    free = host.num_free_kv_blocks
    for _ in range(25):
        host.run(work)
    gc.collect()
    before = rss_bytes()
    for _ in progress(range(job.num_requests // BATCH), "N10"):
        host.run(work)
    gc.collect()
    growth = rss_bytes() - before
    result.value(
        f"N10_rss_growth_bytes_{job.num_requests}_requests", setting, growth, "<= 16 MiB", growth <= 16 * 2**20
    )
    result.figures["N10_kv_blocks_lost"] = free - host.num_free_kv_blocks


def measure_tiny(job: Job) -> Result:
    """N1 to N4 and N10 on the smallest model, where fixed costs show, and how a step's time grows."""
    result = Result()
    folder = write_random_checkpoint(Path(job.workdir) / "tiny", seed=job.seed)
    side = Side.start(folder, make_image(360, 70, job.seed), max_num_seqs=16)
    result.description = describe_run("float32", job.seed)
    steps = measure_exact(side, "tiny", job, 16, 16, result)
    run: Run | None = None
    work = [request(side.engine_prompt, 16, max_steps=16)] * BATCH
    steps_of_batch: list[StepTime] = []
    for _ in range(job.repeats):
        run = side.host.decode(work)
        steps_of_batch += run.steps
    for batch, measured, target in ((1, steps, 5), (BATCH, steps_of_batch, 12)):
        value = overhead_ms(measured)
        setting = side.setting("tiny", f"batch {batch}")
        result.value(
            f"N2_overhead_ms_batch{batch}",
            setting,
            value,
            f"<= {target} ms",
            value <= target,
            engine_ms=1000 * statistics.median(s.wall_s for s in measured),
        )
    text = text_prompt(8)
    shared = [request(text, 32, block_length=4, max_steps=32, refresh_interval=32)] * BATCH
    plain = [request(text, 32)] * BATCH
    side.host.run(plain[:1])
    shape = f"tiny ({model_shape(folder)}), text prompt, canvas 32"
    measure_batch(
        side.host, "N4_batch8_vs_sequential_tiny", f"{shape}, blocks of 4, refresh 32", shared, job.repeats, 3, result
    )
    measure_batch(
        side.host,
        "N4_batch8_vs_sequential_tiny_default",
        f"{shape}, one block, exact",
        plain,
        job.repeats,
        None,
        result,
    )
    measure_growth(side.host, job, result)
    measure_memory(side, job, result)
    if job.goldens is not None:
        from vllm_dvlm.bench.golden_equality import measure_equality

        measure_equality(side.host, Path(job.goldens), Path(job.workdir), job.quick, result)
    result.value("N10_peak_rss_bytes", "tiny: engine, reference model and benchmark in one process", peak_rss_bytes())
    return result


def measure_mid(job: Job) -> Result:
    """N3, N4 and N9 on a model whose forward dominates."""
    result = Result()
    folder = write_random_checkpoint(Path(job.workdir) / "mid", job.mid_sizes, seed=job.seed, logit_std=job.logit_std)
    side = Side.start(folder, make_image(97, 61, job.seed), max_num_seqs=BATCH)
    result.description = describe_run("float32", job.seed)
    measure_exact(side, "mid", job, 16, 4, result)
    measure_cached(side, job, result)
    text = text_prompt(8)
    shape = f"mid ({model_shape(folder)}), text prompt, canvas 32, one block, exact"
    measure_batch(
        side.host,
        "N4_batch8_vs_sequential_saturated",
        shape,
        [request(text, 32, max_steps=4)] * BATCH,
        job.repeats,
        1.2,
        result,
    )
    result.value(
        "N10_peak_rss_bytes_mid", "mid: engine, reference model and benchmark in one process", peak_rss_bytes()
    )
    return result


def measure_cached(side: Side, job: Job, result: Result) -> None:
    """N9: prefix cache and threshold against the exact loops, which need one step per token."""
    canvas, exact = job.canvas_length, exact_options(job.canvas_length, job.canvas_length)
    cached = request(side.engine_prompt, canvas, refresh_interval=32, threshold=job.threshold)
    cache_only = request(side.engine_prompt, canvas, refresh_interval=32)
    ours, without_threshold, lean, official, same_mode, equal = [], [], [], [], [], True
    side.host.decode([cached])
    for _ in progress(range(max(1, job.repeats - 1)), "N9"):
        run = side.host.decode([cached])
        ours.append(run.wall_s)
        without_threshold.append(side.host.decode([cache_only]).wall_s)
        mine = time_lean_loop(side.model, side.prompt, cached_options(canvas, threshold=job.threshold), num_repeats=1)
        same_mode += mine.seconds
        equal &= run.token_ids == [mine.result.final_ids]
        lean += time_lean_loop(side.model, side.prompt, exact, num_repeats=1).seconds
        loop = time_official_loop(
            side.model,
            side.prompt,
            exact_options(canvas, job.official_steps),
            num_repeats=1,
            chunk_rows=OFFICIAL_CHUNK_ROWS,
        )
        official += official_generation_s(loop, canvas)
    more = (
        f"canvas {canvas}, refresh 32, threshold {job.threshold:g}, {len(run.steps)} steps, logit_std {job.logit_std:g}"
    )
    setting = side.setting("mid", more)
    result.ratio("N9_cached_threshold_vs_official_loop", setting, ours, official, "official loop, exact", 10)
    result.ratio("N9_cached_threshold_vs_lean_loop", setting, ours, lean, "lean loop, exact", 6)
    result.ratio("N9_cached_threshold_vs_lean_loop_same_mode", setting, ours, same_mode, "lean loop, same mode", None)
    cached_setting = side.setting("mid", f"canvas {canvas}, refresh 32, no threshold, {canvas} steps")
    result.ratio("N9_cached_vs_lean_loop", cached_setting, without_threshold, lean, "lean loop, exact", None)
    result.figures["N9_tokens_equal_lean_loop_same_mode"] = equal
    result.figures["N9_num_denoise_steps"] = len(run.steps)
