"""One engine inside this process, stepped and timed by hand: the engine side of `vllm-dvlm bench engine`.

Importing this module imports vLLM; set the environment of `PROCESS_ENV` first.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

from vllm_dvlm.bench.engine_env import PROCESS_ENV
from vllm_dvlm.bench.engine_job import Time
from vllm_dvlm.worker import sampler as sampler_module

Request = tuple[dict[str, Any], SamplingParams]


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Wall time of one engine step and what of it the model took.

    model_s: inside the model's forward, its vocabulary logits and the reduction of logits to token and confidence.
    """

    wall_s: float
    model_s: float

    @property
    def overhead_s(self) -> float:
        """Everything else: scheduling, batch preparation, canvas updates, output, detokenisation."""
        return self.wall_s - self.model_s


@dataclasses.dataclass(frozen=True)
class Run:
    """Requests from their first engine step to the last; adding them (tokenising, image pixels) is not part of it."""

    token_ids: list[list[int]]  # per request, as the user sees them
    steps: list[StepTime]
    cpu_s: float  # processor time of all threads

    @property
    def time(self) -> Time:
        """Wall and processor seconds of all steps."""
        return sum(step.wall_s for step in self.steps), self.cpu_s


class EngineHost:
    """An `LLM` whose engine core lives in this process.

    Raises RuntimeError if the environment does not keep it there, or if starting it changed the number of threads.
    """

    def __init__(self, folder: Path, max_model_len: int, max_num_seqs: int, max_canvas_length: int) -> None:
        if wrong := {name for name, value in PROCESS_ENV.items() if os.environ.get(name) != value}:
            raise RuntimeError(f"Set {', '.join(sorted(wrong))} as in PROCESS_ENV before vLLM is imported.")
        threads = torch.get_num_threads()
        self.llm = LLM(
            str(folder),
            max_model_len=max_model_len,
            max_num_batched_tokens=max_model_len * 8,
            max_num_seqs=max_num_seqs,
            limit_mm_per_prompt={"image": 2},
            additional_config={"dvlm": {"max_canvas_length": max_canvas_length}},
        )
        if torch.get_num_threads() != threads:
            raise RuntimeError(f"The engine changed the number of threads, {threads} to {torch.get_num_threads()}.")
        self.engine = self.llm.llm_engine
        self.runner = self.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self.model = self.runner.model
        self.encode_s = 0.0
        self.max_logits_rows = 0
        self._model_s = 0.0
        self._count = 0
        self.model.forward = self._timed(self.model.forward)
        self.model.vocab_logits = self._timed(self.model.vocab_logits, self._note_rows)
        sampler_module.greedy_low_confidence = self._timed(sampler_module.greedy_low_confidence)
        self.model.embed_multimodal = self._timed_encoder(self.model.embed_multimodal)

    @property
    def logits_rows_bound(self) -> int:
        """Rows of vocabulary logits that the engine makes at once, at most."""
        return self.runner.sampler.rows_per_chunk

    @property
    def num_free_kv_blocks(self) -> int:
        return self.engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def _timed(self, function: Callable, look: Callable[..., None] | None = None) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self._model_s += time.perf_counter() - begin
            if look is not None:
                look(result)
            return result

        return timed

    def _note_rows(self, logits: torch.Tensor) -> None:
        self.max_logits_rows = max(self.max_logits_rows, len(logits))

    def _timed_encoder(self, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.encode_s += time.perf_counter() - begin
            return result

        return timed

    def use_weights(self, folder: Path) -> None:
        """Load another checkpoint of the same shape into the live model; nothing computed before is reused."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.engine.reset_encoder_cache()
        self.engine.reset_mm_cache()

    def run(self, requests: Sequence[Request]) -> Run:
        """Add all requests, then step until the last has finished."""
        names = []
        for prompt, params in requests:
            names.append(f"bench-{self._count}")
            self._count += 1
            self.engine.add_request(names[-1], prompt, params)
        done: dict[str, list[int]] = {}
        steps = []
        cpu_begin = time.process_time()
        while self.engine.has_unfinished_requests():
            self._model_s = 0.0
            begin = time.perf_counter()
            outputs = self.engine.step()
            wall = time.perf_counter() - begin
            steps.append(StepTime(wall, self._model_s))
            done |= {o.request_id: list(o.outputs[0].token_ids) for o in outputs if o.finished}
        return Run([done[name] for name in names], steps, time.process_time() - cpu_begin)

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
