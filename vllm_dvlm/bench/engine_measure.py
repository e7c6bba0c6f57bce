"""What `vllm-dvlm bench engine` measures; each function runs in a process of its own with one engine.

Engine and baselines share process, threads, weights and dtype, and take turns. Times of generations are decode only:
images are encoded and prompts merged before, on both sides.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vllm_dvlm.bench import baselines
from vllm_dvlm.bench.baselines import LoopTiming, cached_options, exact_options, time_lean_loop, time_official_loop
from vllm_dvlm.bench.common import describe_run, peak_rss_bytes, progress, rss_bytes
from vllm_dvlm.bench.counted import Generation, Shape, work_shares
from vllm_dvlm.bench.engine_host import EngineHost, Step, model_shape, request
from vllm_dvlm.bench.engine_job import Job
from vllm_dvlm.bench.result import Result, Time
from vllm_dvlm.reference.model import Prompt, ReferenceModel, conversation
from vllm_dvlm.synthetic.checkpoint_files import Ids, Sizes
from vllm_dvlm.synthetic.random_checkpoint import write_random_checkpoint

QUESTION = "<image>\nPlease describe this image in detail."
OFFICIAL_CHUNK_ROWS = 128  # 320 MB of logits and float64 softmax at a time; the original holds all rows at once
BATCH = 8
MAX_MODEL_LEN = 4096


def make_image(width: int, height: int, seed: int) -> Image.Image:
    """Random pixels; the size alone decides how many visual tokens there are."""
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def words(count: int) -> str:
    """A question of about this many tokens."""
    return "What is this" + " and that" * ((count - 3) // 2) + "?"


@dataclasses.dataclass
class Side:
    """One checkpoint in the engine and in the reference model, with an image prompt of both.

    engine_peak_bytes: peak resident memory after a batch of image requests, before the reference model is loaded.
    """

    name: str
    host: EngineHost
    engine_peak_bytes: int
    model: ReferenceModel
    ids: Ids
    engine_prompt: dict[str, Any]
    prompt: Prompt
    reference_encode_s: float

    @classmethod
    def start(
        cls,
        name: str,
        folder: Path,
        image: Image.Image,
        max_num_seqs: int,
        reference: type[ReferenceModel] = ReferenceModel,
        num_first: int = BATCH,
    ) -> "Side":
        """`num_first`: requests of the first batch."""
        host = EngineHost(
            folder,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=MAX_MODEL_LEN * 8,
            max_num_seqs=max_num_seqs,
            limit_mm_per_prompt={"image": 2},
            additional_config={"dvlm": {"max_canvas_length": 128}},
        )
        engine_prompt = {"prompt": conversation(QUESTION), "multi_modal_data": {"image": image}}
        # Warms up, fills the encoder cache, and reaches the engine's peak memory.
        host.run([request(engine_prompt, 4, max_steps=2)] * num_first)
        engine_peak = peak_rss_bytes()
        model = reference.load(folder)
        ids = Ids(model.config["vocab_size"])
        begin = time.perf_counter()
        model.image_features([image])
        encode_s = time.perf_counter() - begin
        prompt = baselines.make_prompt(model, QUESTION, [image])
        return cls(name, host, engine_peak, model, ids, engine_prompt, prompt, encode_s)

    @property
    def suffix(self) -> str:
        """Of the names of figures."""
        return "" if self.name == "tiny" else f"_{self.name}"

    def setting(self, more: str) -> str:
        return f"{self.name}, image prompt of {len(self.prompt.embeddings)}, {more}"

    def finish(self, result: Result, job: Job) -> Result:
        """Add what describes the whole process."""
        suffix = self.suffix
        setting = f"{self.name}, engine after {BATCH} image requests together, before baselines are loaded"
        result.value(f"N10_peak_rss_bytes{suffix}", setting, self.engine_peak_bytes)
        result.description = describe_run("float32", job.seed) | {f"model_{self.name}": model_shape(self.model.config)}
        shape = Shape(*(self.model.config[field.name] for field in dataclasses.fields(Shape)))
        work = Generation(len(self.prompt.embeddings), 0, 32, 32)
        for part, share in work_shares(shape, work, every_position=True).items():
            result.figures[f"work_share_official_{part}_{self.name}"] = share
        result.peak_rss_bytes = peak_rss_bytes()
        return result


def loop_times(timing: LoopTiming) -> list[Time]:
    """Wall and processor seconds of each repeat."""
    return list(zip(timing.seconds, timing.cpu_seconds, strict=True))


def time_official(side: "Side", job: Job, canvas: int, num_steps: int, warm_up: bool) -> list[Time]:
    """Seconds of a whole generation by the official loop, from `job.official_steps` steps of it.

    Every step of that loop computes every row of the sequence over the whole vocabulary, so all cost the same.
    """
    options = exact_options(canvas, job.official_steps, ids=side.ids)
    timing = time_official_loop(
        side.model, side.prompt, options, num_repeats=1, chunk_rows=OFFICIAL_CHUNK_ROWS, warm_up=warm_up
    )
    share = num_steps / timing.num_forwards
    return [(wall * share, cpu * share) for wall, cpu in loop_times(timing)]


def overhead_ms(steps: Sequence[Step]) -> float:
    """N2: median over steps of the wall time of an engine step less the time inside the model.

    The model is its forward, the vocabulary logits and their reduction to token and confidence, timed in the same
    steps. What is left is the engine: vLLM's scheduler and runner, metadata, prompt embeddings, canvas update, output.
    """
    return 1000 * statistics.median(step.overhead_s for step in steps)


def measure_exact(side: Side, job: Job, canvas: int, num_steps: int, result: Result) -> list[Step]:
    """N3: exact mode at batch 1 against both loops. Returns the engine's steps."""
    work = [request(side.engine_prompt, canvas, max_steps=num_steps)]
    ours, lean, official, steps, equal = [], [], [], [], True
    side.host.decode(work)
    for repeat in progress(range(job.repeats), f"N3 {side.name}"):
        run = side.host.decode(work)
        ours.append(run.time)
        steps += run.steps
        loop = time_lean_loop(
            side.model, side.prompt, exact_options(canvas, num_steps, ids=side.ids), num_repeats=1, warm_up=repeat == 0
        )
        lean += loop_times(loop)
        equal &= run.token_ids == [loop.result.final_ids]
        distinct = len({*run.token_ids[0]})
        official += time_official(side, job, canvas, num_steps, repeat == 0)
    setting = side.setting(f"canvas {canvas}, {num_steps} steps")
    suffix, tokens = side.suffix, {"tokens_equal": equal, "distinct": f"{distinct} of {canvas}"}
    result.ratio(f"N3_exact_batch1_vs_official_loop{suffix}", setting, ours, official, "official loop", 1.1)
    result.ratio(f"N3_exact_batch1_vs_lean_loop{suffix}", setting, ours, lean, "lean loop", 0.95, **tokens)
    result.figures[f"N3_tokens_equal_lean_loop{suffix}"] = equal
    result.figures[f"N3_distinct_tokens{suffix}"] = distinct
    result.figures[f"N3_image_encoding_engine_s{suffix}"] = side.host.encode_s
    result.figures[f"N3_image_encoding_reference_s{suffix}"] = side.reference_encode_s
    return steps


def measure_batch(
    host: EngineHost, key: str, setting: str, work: list, repeats: int, target: float | None, result: Result
) -> list[Step]:
    """N4: the requests together against one after another. Returns the steps of the runs together."""
    together, alone, steps = [], [], []
    host.decode(work)
    for _ in progress(range(repeats), key):
        run = host.decode(work)
        together.append(run.time)
        steps += run.steps
        times = [host.decode([one]).time for one in work]
        alone.append((sum(wall for wall, _ in times), sum(cpu for _, cpu in times)))
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
    free = host.num_free_blocks
    for _ in range(25):
        host.run(work)
    before = rss_bytes()
    for _ in progress(range(job.num_requests // BATCH), "N10"):
        host.run(work)
    growth = rss_bytes() - before
    result.value(
        f"N10_rss_growth_bytes_{job.num_requests}_requests", setting, growth, "<= 16 MiB", growth <= 16 * 2**20
    )
    result.figures["N10_kv_blocks_lost"] = free - host.num_free_blocks


def measure_tiny(job: Job) -> Result:
    """N1 to N4 and N10 on the smallest model, where fixed costs show, and how a step's time grows."""
    result = Result()
    folder = write_random_checkpoint(Path(job.workdir) / "tiny", seed=job.seed)
    side = Side.start("tiny", folder, make_image(360, 70, job.seed), max_num_seqs=16)
    steps = measure_exact(side, job, 16, 16, result)
    work = [request(side.engine_prompt, 16, max_steps=16)] * BATCH
    steps_of_batch = [step for _ in range(job.repeats) for step in side.host.decode(work).steps]
    for batch, measured, target in ((1, steps, 5), (BATCH, steps_of_batch, 12)):
        value = overhead_ms(measured)
        result.value(
            f"N2_overhead_ms_batch{batch}",
            side.setting(f"batch {batch}, per step"),
            value,
            f"<= {target} ms",
            value <= target,
            engine_ms=1000 * statistics.median(s.wall_s for s in measured),
        )
    text, canvas = text_prompt(8), 16 if job.quick else 32
    shared = [request(text, canvas, block_length=4, max_steps=canvas, refresh_interval=32)] * BATCH
    plain = [request(text, canvas)] * BATCH
    shape = f"tiny, text prompt, canvas {canvas}"
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
    return side.finish(result, job)


def measure_8b(job: Job) -> Result:
    """N3, N4 and N9 in the proportions of the 8B model."""
    return _measure_wide("8b", job.sizes_8b, job)


def measure_mid(job: Job) -> Result:
    """N3, N4 and N9 on a model whose forward dominates, with the real vocabulary."""
    return _measure_wide("mid", job.mid_sizes, job)


def _measure_wide(name: str, sizes: Sizes, job: Job) -> Result:
    result = Result()
    folder = write_random_checkpoint(Path(job.workdir) / name, sizes, seed=job.seed, logit_std=job.logit_std)
    side = Side.start(name, folder, make_image(97, 61, job.seed), max_num_seqs=BATCH)
    measure_exact(side, job, 16, 4, result)
    measure_cached(side, job, result)
    text = text_prompt(8)
    settings = {
        # Few rows per step: a batch shares the reading of the weights.
        "": ("blocks of 8, refresh 32, 16 steps", {"block_length": 8, "refresh_interval": 32, "max_steps": 16}, 1.2),
        "_default": ("one block, exact, 4 steps", {"max_steps": 4}, None),
    }
    for suffix, (how, options, target) in settings.items():
        work = [request(text, 32, **options)] * BATCH
        key = f"N4_batch8_vs_sequential_{'saturated' if name == 'mid' else name}{suffix}"
        measure_batch(side.host, key, f"{name}, text prompt, canvas 32, {how}", work, job.repeats, target, result)
    measure_pictures(side, job, result)
    return side.finish(result, job)


def measure_pictures(side: Side, job: Job, result: Result) -> None:
    """N4 for prompts with an image, which fill a step with thousands of rows: together they must never lose."""
    settings = {
        "exact": ("one block, exact, 4 steps", {"max_steps": 4}),
        "cached": (
            f"refresh 32, threshold {job.threshold:g}",
            {"refresh_interval": 32, "threshold": job.threshold},
        ),
    }
    own = "" if side.name == "mid" else side.suffix
    for name, (how, options) in settings.items():
        for count in (2, 4, BATCH):
            work = [request(side.engine_prompt, 32, **options)] * count
            key = f"N4_pictures_{name}_batch{count}_vs_sequential{own}"
            setting = side.setting(f"{count} at once, canvas 32, {how}")
            measure_batch(side.host, key, setting, work, max(1, job.repeats - 1), 1.0, result)


def measure_cached(side: Side, job: Job, result: Result) -> None:
    """N9: prefix cache and threshold against the exact loops, which need one step per token, and against loops of the
    same mode: the official hook's arithmetic (whole vocabulary of every processed position) and the lean one's."""
    canvas, exact = job.canvas_length, exact_options(job.canvas_length, job.canvas_length, ids=side.ids)
    same = cached_options(canvas, threshold=job.threshold, ids=side.ids)
    cached = request(side.engine_prompt, canvas, refresh_interval=32, threshold=job.threshold)
    cache_only = request(side.engine_prompt, canvas, refresh_interval=32)
    ours, without_threshold, lean, official, same_mode, hook, equal = [], [], [], [], [], [], True
    side.host.decode([cached])
    for _ in progress(range(max(1, job.repeats - 1)), "N9"):
        run = side.host.decode([cached])
        ours.append(run.time)
        without_threshold.append(side.host.decode([cache_only]).time)
        mine = time_lean_loop(side.model, side.prompt, same, num_repeats=1)
        same_mode += loop_times(mine)
        theirs = time_official_loop(side.model, side.prompt, same, num_repeats=1, chunk_rows=OFFICIAL_CHUNK_ROWS)
        hook += loop_times(theirs)
        equal &= run.token_ids == [mine.result.final_ids] == [theirs.result.final_ids]
        distinct = len({*run.token_ids[0]})
        lean += loop_times(time_lean_loop(side.model, side.prompt, exact, num_repeats=1, warm_up=False))
        official += time_official(side, job, canvas, canvas, False)
    more = (
        f"canvas {canvas}, refresh 32, threshold {job.threshold:g}, {len(run.steps)} steps, logit_std {job.logit_std:g}"
    )
    setting, suffix = side.setting(more), "" if side.name == "mid" else side.suffix
    for against, times, target in (
        ("official_loop", official, 10),
        ("lean_loop", lean, 6),
        ("official_hook_same_mode", hook, None),
        ("lean_loop_same_mode", same_mode, None),
    ):
        words = against.replace("_same", ", same") if "same" in against else against + ", exact"
        tokens = {"tokens_equal": equal, "distinct": f"{distinct} of {canvas}"} if "same" in against else {}
        key = f"N9_cached_threshold_vs_{against}{suffix}"
        target = target if side.name == "mid" else None
        result.ratio(key, setting, ours, times, words.replace("_", " "), target, **tokens)
    cached_setting = side.setting(f"canvas {canvas}, refresh 32, no threshold, {canvas} steps")
    result.ratio(f"N9_cached_vs_lean_loop{suffix}", cached_setting, without_threshold, lean, "lean loop, exact", None)
    result.figures[f"N9_tokens_equal_lean_loop_same_mode{suffix}"] = equal
    result.figures[f"N9_distinct_tokens{suffix}"] = distinct
    result.figures[f"N9_num_denoise_steps{suffix}"] = len(run.steps)
