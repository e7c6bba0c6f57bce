"""Time of the two reference loops: the other side of the speed ratios in `bench engine`."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from vllm_dvlm.bench.common import fixed_threads, progress
from vllm_dvlm.reference.loops import LoopOptions, LoopResult, lean_loop, official_loop
from vllm_dvlm.reference.model import (
    Prompt,
    ReferenceModel,
    conversation,
    prompt_token_ids,
)
from vllm_dvlm.synthetic.checkpoint_files import Ids


@dataclasses.dataclass(frozen=True)
class LoopTiming:
    """Repeated timings of one generation; the vision tower and tokenising are not part of it."""

    name: str
    seconds: tuple[float, ...]  # one per repeat
    num_threads: int
    prompt_len: int
    result: LoopResult = dataclasses.field(repr=False)
    cpu_seconds: tuple[float, ...] = ()  # one per repeat: processor time of all threads

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def num_forwards(self) -> int:
        return len(self.result.forward_shapes)

    @property
    def step_ms(self) -> float:
        return 1000 * self.median_s / max(1, self.num_forwards)

    @property
    def tokens_per_s(self) -> float:
        return len(self.result.final_ids) / self.median_s

    def row(self) -> dict[str, str | int | float]:
        """Line of a bench table."""
        return {
            "loop": self.name,
            "prompt_len": self.prompt_len,
            "num_forwards": self.num_forwards,
            "threads": self.num_threads,
            "median_s": self.median_s,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "step_ms": self.step_ms,
            "tokens_per_s": self.tokens_per_s,
        }


def make_prompt(
    model: ReferenceModel,
    question: str,
    images: Sequence[Image.Image] = (),
    image_aspect_ratio: str | None = None,
) -> Prompt:
    """Merged prompt of a user turn; `question` holds one `<image>` per image."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model.folder)
    prompt_ids = prompt_token_ids(tokenizer, conversation(question))
    return model.merge(prompt_ids, model.image_features(images, image_aspect_ratio))


def _special(ids: Ids) -> dict[str, Any]:
    return {"stop_ids": (ids.end_of_turn,), "forbidden_ids": ids.forbidden, "mask_id": ids.mask}


def exact_options(
    canvas_length: int,
    max_steps: int,
    block_length: int | None = None,
    ids: Ids = Ids(),  # noqa: B008 - frozen
) -> LoopOptions:
    """Everything recomputed in every step."""
    return LoopOptions(canvas_length, max_steps, block_length or canvas_length, **_special(ids))


def cached_options(
    canvas_length: int,
    block_length: int | None = None,
    refresh_interval: int = 32,
    threshold: float = 1.0,
    ids: Ids = Ids(),  # noqa: B008 - frozen
) -> LoopOptions:
    """Prefix cache and threshold decoding."""
    block_length = block_length or canvas_length
    return LoopOptions(
        canvas_length,
        canvas_length,
        block_length,
        refresh_interval=refresh_interval,
        threshold=threshold,
        **_special(ids),
    )


def _warm_up_options(options: LoopOptions) -> LoopOptions:
    """One full forward per block at most: touches every buffer size, at a fraction of a run."""
    return dataclasses.replace(
        options, block_length=options.canvas_length, max_steps=1, refresh_interval=1, threshold=None
    )


def _time(
    name: str,
    loop: Callable[[ReferenceModel, Prompt, LoopOptions], LoopResult],
    model: ReferenceModel,
    prompt: Prompt,
    options: LoopOptions,
    num_threads: int | None,
    num_repeats: int,
    warm_up: bool,
) -> LoopTiming:
    if num_repeats < 1:
        raise ValueError("num_repeats must be at least 1.")
    with fixed_threads(num_threads):
        import torch

        used_threads = torch.get_num_threads()
        if warm_up:
            loop(model, prompt, _warm_up_options(options))
        seconds, cpu_seconds = [], []
        for _ in progress(range(num_repeats), name):
            begin, cpu_begin = time.perf_counter(), time.process_time()
            result = loop(model, prompt, options)
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(time.process_time() - cpu_begin)
    return LoopTiming(name, tuple(seconds), used_threads, len(prompt.embeddings), result, tuple(cpu_seconds))


def time_official_loop(
    model: ReferenceModel,
    prompt: Prompt,
    options: LoopOptions,
    *,
    num_threads: int | None = None,
    num_repeats: int = 3,
    warm_up: bool = True,
    chunk_rows: int | None = None,
) -> LoopTiming:
    """Time `official_loop`, after a warm-up unless the caller has done one.

    `chunk_rows` bounds its memory, see there; None is as the original.
    """

    def loop(model: ReferenceModel, prompt: Prompt, options: LoopOptions) -> LoopResult:
        return official_loop(model, prompt, options, chunk_rows)

    return _time("official loop", loop, model, prompt, options, num_threads, num_repeats, warm_up)


def time_lean_loop(
    model: ReferenceModel,
    prompt: Prompt,
    options: LoopOptions,
    *,
    num_threads: int | None = None,
    num_repeats: int = 3,
    warm_up: bool = True,
) -> LoopTiming:
    """Time `lean_loop`, after a warm-up unless the caller has done one."""
    return _time("lean loop", lean_loop, model, prompt, options, num_threads, num_repeats, warm_up)
