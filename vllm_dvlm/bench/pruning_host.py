"""An engine inside this process for the benches of pruning: timed by parts, with a look at scheduler and KV pool.

Importing this module imports vLLM; `engine_env.prepare` comes first.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams

from vllm_dvlm.bench.common import Row, describe_run, peak_rss_bytes
from vllm_dvlm.bench.engine_env import PROCESS_ENV
from vllm_dvlm.bench.pruning_job import CACHED, Job
from vllm_dvlm.checkpoint.anyres import ImageLayoutConfig, lavida_layout, num_visual_tokens
from vllm_dvlm.reference.model import conversation, prompt_token_ids
from vllm_dvlm.steps import cdiv, pruned_prompt_len
from vllm_dvlm.synthetic.checkpoint_files import Sizes
from vllm_dvlm.synthetic.random_checkpoint import write_random_checkpoint
from vllm_dvlm.synthetic.random_lavida import write_random_lavida
from vllm_dvlm.worker import sampler as sampler_module

Request = tuple[dict[str, Any], SamplingParams]
KV_BLOCK_SIZE = 32


@dataclasses.dataclass(frozen=True)
class BenchFamily:
    """What differs between model families here.

    write: writes a random checkpoint: folder, sizes, seed. layout: image layout of its config and vision config.
    exact / cached: options of a request that recomputes everything in every step, and of one that reads KV of earlier
    steps.
    """

    write: Callable[..., Path]
    layout: Callable[..., ImageLayoutConfig]
    exact: dict[str, Any]
    cached: dict[str, Any]


REFRESH = "diffusion_refresh_interval"
ATTENTION = "diffusion_attention"
FAMILIES = {
    "llada_v": BenchFamily(write_random_checkpoint, ImageLayoutConfig.from_hf_config, {REFRESH: 1}, {REFRESH: CACHED}),
    "lavida": BenchFamily(write_random_lavida, lavida_layout, {ATTENTION: "full"}, {ATTENTION: "prefix"}),
}
QUESTION = "<image>\nPlease describe this image in detail."
PARTS = ("forward", "logits", "score", "complete")


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One engine step.

    cpu_s: processor time of the engine's thread; beside other work it says more than the wall time does.
    parts_s: of that, by part. forward: the text layers; logits: vocabulary logits and their reduction to token and
    confidence; score: attention scores for pruning, inside forward; complete: selection, compaction and the rest of
    pruning after the commit.
    num_running: requests that the scheduler holds in flight (they own KV blocks); free_blocks: of the pool, both once
    the step is scheduled. free_after: free KV blocks after the step.
    """

    wall_s: float
    cpu_s: float
    parts_s: dict[str, float]
    num_running: int
    free_blocks: int
    free_after: int

    @property
    def prune_s(self) -> float:
        """Scoring inside the layers and everything after the commit."""
        return self.parts_s["score"] + self.parts_s["complete"]


@dataclasses.dataclass(frozen=True)
class Run:
    """Requests from their first engine step to the last; adding them (tokenising, image pixels) is not part of it.

    reports: what the engine says of each finished request (`kv_transfer_params["dvlm"]`).
    """

    steps: list[StepRecord]
    reports: list[dict[str, int]]

    @property
    def wall_s(self) -> float:
        return sum(step.wall_s for step in self.steps)

    @property
    def cpu_s(self) -> float:
        return sum(step.cpu_s for step in self.steps)

    def part_s(self, part: str) -> float:
        """Processor seconds in a part, over all steps."""
        return sum(step.parts_s[part] for step in self.steps)

    @property
    def max_running(self) -> int:
        """Most requests in flight at once."""
        return max(step.num_running for step in self.steps)


class PruningHost:
    """An `LLM` whose engine core lives in this process; raises RuntimeError if the environment does not keep it there.

    pool_prompts: KV pool in unpruned requests of `prompt`; None for ample.
    """

    def __init__(
        self,
        job: Job,
        sizes: Sizes,
        pool_prompts: int | None = None,
        max_num_seqs: int = 2,
        batched_prompts: int = 1,
        **defaults: Any,
    ) -> None:
        if wrong := {name for name, value in PROCESS_ENV.items() if os.environ.get(name) != value}:
            raise RuntimeError(f"Set {', '.join(sorted(wrong))} as in PROCESS_ENV before vLLM is imported.")
        self.job, self.family = job, FAMILIES[job.family]
        self.folder = Path(job.workdir) / f"model-{sizes.hidden}-{sizes.layers}"
        if not self.folder.exists():
            self.family.write(self.folder, sizes, seed=job.seed)
        width, height = job.image
        pixels = np.random.RandomState(job.seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        self.prompt = {"prompt": conversation(QUESTION), "multi_modal_data": {"image": image}}
        self.prompt_len, self.num_visual = prompt_lengths(self.folder, job.image, self.family)
        self.request_blocks = self.kv_blocks(1.0)
        max_len = self.prompt_len + max(64, job.canvas)
        # One more: the null block is never handed out.
        blocks = {} if pool_prompts is None else {"num_gpu_blocks_override": pool_prompts * self.request_blocks + 1}
        self.llm = LLM(
            str(self.folder),
            max_model_len=max_len,
            max_num_batched_tokens=max_len * batched_prompts,
            max_num_seqs=max_num_seqs,
            limit_mm_per_prompt={"image": 1},
            additional_config={"dvlm": {"max_canvas_length": max(64, job.canvas), **defaults}},
            block_size=KV_BLOCK_SIZE,
            **blocks,
        )
        self.engine = self.llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.encode_s = 0.0
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._running = self._free = self._count = 0
        self._time_parts()
        self.run([self.request(1.0, cached=False)], max_steps=1)  # fills the encoder cache

    def request_len(self, keep_ratio: float) -> int:
        """Tokens of a request, canvas included, once it keeps this share of its visual tokens."""
        return pruned_prompt_len(self.prompt_len, self.num_visual, keep_ratio) + self.job.canvas

    def kv_blocks(self, keep_ratio: float) -> int:
        """KV blocks of one request, all layers in one group."""
        return cdiv(self.request_len(keep_ratio), KV_BLOCK_SIZE)

    # -- timing ------------------------------------------------------------------------------------------------

    def _timed(self, part: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._parts[part] += time.thread_time() - begin

        return timed

    def _time_parts(self) -> None:
        model, pruner = self.runner.model, self.runner.model_state.pruner
        model.forward = self._timed("forward", model.forward)
        model.vocab_logits = self._timed("logits", model.vocab_logits)
        sampler_module.greedy_low_confidence = self._timed("logits", sampler_module.greedy_low_confidence)
        pruner.observe = self._timed("score", pruner.observe)
        pruner.after_layer = self._timed("score", pruner.after_layer)
        pruner.complete = self._timed("complete", pruner.complete)
        schedule, encode = self.scheduler.schedule, model.embed_multimodal

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._running, self._free = len(self.scheduler.running), self.num_free_blocks
            return output

        def timed_encode(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = encode(*args, **kwargs)
            self.encode_s += time.perf_counter() - begin
            return result

        self.scheduler.schedule = watched
        model.embed_multimodal = timed_encode

    @property
    def num_free_blocks(self) -> int:
        return self.pool.get_num_free_blocks()

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one KV block; with two groups of layers a block belongs to one of them."""
        config = self.scheduler.kv_cache_config
        return sum(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks

    # -- requests ----------------------------------------------------------------------------------------------

    def request(self, keep_ratio: float, cached: bool, method: str | None = None, **options: Any) -> Request:
        """A greedy request; keep ratio 1 is unpruned (`none`), method None the job's."""
        extra: dict[str, Any] = {
            "diffusion_canvas_length": self.job.canvas,
            "diffusion_max_steps": self.job.num_steps,
            "prune_method": "none",
            **(self.family.cached if cached else self.family.exact),
        }
        if keep_ratio < 1:
            extra |= {"prune_method": method or self.job.method, "prune_keep_ratio": keep_ratio}
        return self.prompt, SamplingParams(temperature=0, max_tokens=self.job.canvas, extra_args=extra | options)

    def run(
        self,
        requests: Sequence[Request],
        max_steps: int | None = None,
        until: Callable[[list[StepRecord]], bool] | None = None,
    ) -> Run:
        """Add all requests, then step until the last has finished.

        What is left after `max_steps` engine steps, or once `until(steps)` says so, is aborted. RuntimeError if a KV
        block does not come back.
        """
        idle = self.num_free_blocks
        names = []
        for prompt, params in requests:
            names.append(f"bench-{self._count}")
            self._count += 1
            self.engine.add_request(names[-1], prompt, params)
        done: dict[str, dict[str, int]] = {}
        steps: list[StepRecord] = []
        while self.engine.has_unfinished_requests() and len(steps) != max_steps:
            self._parts = dict.fromkeys(PARTS, 0.0)
            begin, cpu_begin = time.perf_counter(), time.thread_time()
            outputs = self.engine.step()
            wall, cpu = time.perf_counter() - begin, time.thread_time() - cpu_begin
            steps.append(StepRecord(wall, cpu, self._parts, self._running, self._free, self.num_free_blocks))
            done |= {o.request_id: o.kv_transfer_params["dvlm"] for o in outputs if o.finished}
            if until is not None and until(steps):
                break
        if left := [name for name in names if name not in done]:
            self.engine.abort_request(left)
        while self.scheduler.has_requests():  # the worker hears of finished requests with the next step
            self.engine.step()
        if self.num_free_blocks != idle:
            raise RuntimeError(f"{idle - self.num_free_blocks} KV blocks were lost.")
        return Run(steps, [done[name] for name in names if name in done])

    def describe(self) -> Row:
        """Machine, shapes and memory, for the report."""
        config = self.runner.model_config.hf_config
        return describe_run(
            "float32",
            self.job.seed,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            image="x".join(map(str, self.job.image)),
            canvas=self.job.canvas,
            steps=self.job.num_steps,
            **{name.replace("diffusion", "cached"): value for name, value in self.family.cached.items()},
            kv_block_size=self.scheduler.block_size,
            engine_peak_rss_gib=peak_rss_bytes() / 2**30,
        )


def prompt_lengths(folder: Path, image_size: tuple[int, int], family: BenchFamily) -> tuple[int, int]:
    """(tokens of the prompt, visual tokens among them), from the checkpoint's files alone."""
    from transformers import PreTrainedTokenizerFast

    config = json.loads((folder / "config.json").read_text())
    vision = json.loads((folder / config["mm_vision_tower"] / "config.json").read_text())
    layout = family.layout(SimpleNamespace(**config), SimpleNamespace(**vision))
    num_visual = num_visual_tokens(*image_size, layout)
    ids = prompt_token_ids(PreTrainedTokenizerFast.from_pretrained(folder), conversation(QUESTION))
    return len(ids) - 1 + num_visual, num_visual


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over repeats of ratios within a repeat: a slow minute of the machine slows both sides."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
