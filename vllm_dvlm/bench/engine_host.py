"""One engine inside this process, stepped by hand and timed by parts: the engine of every bench that has one.

Importing this module imports vLLM; `engine_env.prepare` comes first.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, RequestOutput, SamplingParams

from vllm_dvlm.bench.engine_env import PROCESS_ENV
from vllm_dvlm.bench.result import Time

Request = tuple[dict[str, Any], SamplingParams]
KV_BLOCK_SIZE = 32
PARTS = ("forward", "logits", "score", "complete")


@dataclasses.dataclass(frozen=True)
class Step:
    """One engine step.

    cpu_s: processor time of the engine's thread; beside other work it says more than the wall time does.
    process_s: processor time of all threads.
    parts_wall_s, parts_s: wall and processor time of the engine's thread by part. forward: the text layers; logits:
    vocabulary logits and their reduction to token and confidence; score: attention scores for pruning, inside forward;
    complete: selection, compaction and the rest of pruning after the commit.
    num_running: requests that the scheduler holds in flight (they own KV blocks); free_blocks: of the pool, both once
    the step is scheduled. free_after: free KV blocks after the step.
    """

    wall_s: float
    cpu_s: float
    process_s: float
    parts_wall_s: dict[str, float]
    parts_s: dict[str, float]
    num_running: int
    free_blocks: int
    free_after: int

    @property
    def overhead_s(self) -> float:
        """Everything but the model: scheduling, batch preparation, canvas updates, output, detokenisation."""
        return self.wall_s - self.parts_wall_s["forward"] - self.parts_wall_s["logits"]

    @property
    def prune_s(self) -> float:
        """Scoring inside the layers and everything after the commit."""
        return self.parts_s["score"] + self.parts_s["complete"]


@dataclasses.dataclass(frozen=True)
class Run:
    """Requests from their first engine step to the last; adding them (tokenising, image pixels) is not part of it.

    outputs: of the requests that finished, in the order in which they were added.
    """

    steps: list[Step]
    outputs: list[RequestOutput]

    @property
    def token_ids(self) -> list[list[int]]:
        """Per request, as the user sees them."""
        return [list(output.outputs[0].token_ids) for output in self.outputs]

    @property
    def reports(self) -> list[dict[str, int]]:
        """What the engine says of each request (`kv_transfer_params["dvlm"]`)."""
        return [output.kv_transfer_params["dvlm"] for output in self.outputs]

    @property
    def wall_s(self) -> float:
        return sum(step.wall_s for step in self.steps)

    @property
    def cpu_s(self) -> float:
        return sum(step.cpu_s for step in self.steps)

    @property
    def time(self) -> Time:
        """Wall seconds, and processor seconds of all threads."""
        return self.wall_s, sum(step.process_s for step in self.steps)

    def part_s(self, part: str) -> float:
        """Processor seconds in a part, over all steps."""
        return sum(step.parts_s[part] for step in self.steps)

    @property
    def max_running(self) -> int:
        """Most requests in flight at once."""
        return max(step.num_running for step in self.steps)


class EngineHost:
    """An `LLM` whose engine core lives in this process.

    Raises RuntimeError if the environment does not keep it there, or if starting it changed the number of threads.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        if wrong := {name for name, value in PROCESS_ENV.items() if os.environ.get(name) != value}:
            raise RuntimeError(f"Set {', '.join(sorted(wrong))} as in PROCESS_ENV before vLLM is imported.")
        threads = torch.get_num_threads()
        self.llm = LLM(str(model), **options)
        if torch.get_num_threads() != threads:
            raise RuntimeError(f"The engine changed the number of threads, {threads} to {torch.get_num_threads()}.")
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.model = self.runner.model
        self.encode_s = 0.0
        self.max_logits_rows = 0
        self._parts = self._parts_wall = dict.fromkeys(PARTS, 0.0)
        self._running = self._free = self._count = 0
        self._time_parts()

    def _timed(self, part: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin, cpu_begin = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._parts[part] += time.thread_time() - cpu_begin
                self._parts_wall[part] += time.perf_counter() - begin

        return timed

    def _time_parts(self) -> None:
        model, sampler, pruner = self.model, self.runner.sampler, self.runner.model_state.pruner
        vocab_logits, schedule, encode = model.vocab_logits, self.scheduler.schedule, model.embed_multimodal

        def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits = vocab_logits(*args, **kwargs)
            self.max_logits_rows = max(self.max_logits_rows, len(logits))
            return logits

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._running, self._free = len(self.scheduler.running), self.num_free_blocks
            return output

        def timed_encode(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = encode(*args, **kwargs)
            self.encode_s += time.perf_counter() - begin
            return result

        model.forward = self._timed("forward", model.forward)
        model.vocab_logits = self._timed("logits", counted)
        sampler.reduce = self._timed("logits", sampler.reduce)
        pruner.observe = self._timed("score", pruner.observe)
        pruner.after_layer = self._timed("score", pruner.after_layer)
        pruner.complete = self._timed("complete", pruner.complete)
        model.embed_multimodal = timed_encode
        self.scheduler.schedule = watched

    # -- what there is -----------------------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def logits_rows_bound(self) -> int:
        """Rows of vocabulary logits that the engine makes at once, at most."""
        return self.runner.sampler.rows_per_chunk

    def use_weights(self, folder: Path) -> None:
        """Load another checkpoint of the same shape into the live model; nothing computed before is reused."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.engine.reset_encoder_cache()
        self.engine.reset_mm_cache()

    # -- requests ----------------------------------------------------------------------------------------------------

    def step(self) -> tuple[Step, list[RequestOutput]]:
        """One engine step, timed; the requests that finished in it."""
        self._parts, self._parts_wall = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
        begin, cpu_begin, process_begin = time.perf_counter(), time.thread_time(), time.process_time()
        outputs = self.engine.step()
        step = Step(
            wall_s=time.perf_counter() - begin,
            cpu_s=time.thread_time() - cpu_begin,
            process_s=time.process_time() - process_begin,
            parts_wall_s=self._parts_wall,
            parts_s=self._parts,
            num_running=self._running,
            free_blocks=self._free,
            free_after=self.num_free_blocks,
        )
        return step, [output for output in outputs if output.finished]

    def run(
        self,
        requests: Sequence[Request],
        max_steps: int | None = None,
        until: Callable[[list[Step]], bool] | None = None,
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
        done: dict[str, RequestOutput] = {}
        steps: list[Step] = []
        while self.engine.has_unfinished_requests() and len(steps) != max_steps:
            step, finished = self.step()
            steps.append(step)
            done |= {output.request_id: output for output in finished}
            if until is not None and until(steps):
                break
        if left := [name for name in names if name not in done]:
            self.engine.abort_request(left)
        while self.scheduler.has_requests():  # the worker hears of finished requests with the next step
            self.engine.step()
        if self.num_free_blocks != idle:
            raise RuntimeError(f"{idle - self.num_free_blocks} KV blocks were lost.")
        return Run(steps, [done[name] for name in names if name in done])

    def decode(self, requests: Sequence[Request]) -> Run:
        """`run`, and RuntimeError if an image was encoded meanwhile: warm the encoder cache first."""
        before = self.encode_s
        run = self.run(requests)
        if self.encode_s != before:
            raise RuntimeError("An image was encoded during a timed run.")
        return run


def request(prompt: dict[str, Any], canvas_length: int, **options: Any) -> Request:
    """A greedy request that fills its whole canvas; `options` without their prefix `diffusion_`."""
    extra_args = {"diffusion_canvas_length": canvas_length}
    extra_args |= {f"diffusion_{name}": value for name, value in options.items() if value is not None}
    return prompt, SamplingParams(temperature=0, max_tokens=canvas_length, extra_args=extra_args)


def model_shape(config: dict[str, Any]) -> str:
    """Sizes of a checkpoint in words, from its config.json."""
    names = {
        "hidden_size": "hidden",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "intermediate_size": "MLP",
        "vocab_size": "vocabulary",
    }
    return ", ".join(f"{word} {config[name]}" for name, word in names.items())
