"""One engine in this process, with weights that can be changed, for all engine tests.

Imported by fixtures only: importing it imports vLLM.
"""

import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams, envs

from tests.golden import cases

EOT_ID = 126348
MASK_ID = 126336
MAX_MODEL_LEN = 4096
# Room for eight golden prompts with an image in one step.
MAX_NUM_BATCHED_TOKENS = 9216
MAX_NUM_SEQS = 16
MAX_CANVAS_LENGTH = 64
# No test needs a tenth of it.
MAX_STEPS = 3000
# The tiny model's KV block of 32 tokens takes 128 KiB.
NUM_KV_BLOCKS = 256

Prompt = dict[str, Any]
Work = Mapping[str, tuple[Prompt, SamplingParams]]


@contextmanager
def quiet_process() -> Iterator[None]:
    """Environment for an engine that shares this process with other tests; put back afterwards.

    Without binding: vLLM would pin this thread, and with it every process that later tests start, to one core.
    """
    before = dict(os.environ)
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
    try:
        yield
    finally:
        envs.disable_envs_cache()
        os.environ.clear()
        os.environ.update(before)


def case_prompt(case: cases.Case) -> Prompt:
    """The recorded prompt as vLLM takes it."""
    prompt: Prompt = {"prompt": cases.prompt_text(case)}
    if case.image_records:
        prompt["multi_modal_data"] = {"image": cases.images(case)}
    if case.image_aspect_ratio == "pad":
        prompt["mm_processor_kwargs"] = {"image_aspect_ratio": "pad"}
    return prompt


def case_params(case: cases.Case, **changes: Any) -> SamplingParams:
    """Sampling parameters that repeat the recorded run, with a trace."""
    values = {"temperature": 0, "max_tokens": case.settings["gen_length"]} | changes
    extra_args = cases.extra_args(case) | {"diffusion_trace": 1} | values.pop("extra_args", {})
    return SamplingParams(extra_args=extra_args, **values)


def case_tokens(case: cases.Case) -> list[int]:
    """What the engine emits for a case: vLLM shows the stop token, the reference leaves it out."""
    return case.final_ids + ([EOT_ID] if case.stopped_at is not None else [])


def tokens(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


_shared: list["Engine"] = []  # one at most


def shared(checkpoint: Callable[..., Path], tmp_path_factory: Any) -> "Engine":
    """The engine that modules use one after another, until one of them needs vLLM's process groups for itself."""
    if not _shared:
        _shared.append(Engine(checkpoint, tmp_path_factory.mktemp("traces")))
    _shared[0].use({"seed": 0})
    return _shared[0]


def end_shared() -> None:
    """Close the shared engine, if there is one."""
    while _shared:
        _shared.pop().close()


class Engine:
    """An ``LLM`` in this process; ``use`` gives it the weights of another golden checkpoint.

    changes: arguments of ``LLM`` that differ from those of the other tests.
    """

    def __init__(self, checkpoint: Callable[..., Path], trace_dir: Path, **changes: Any) -> None:
        end_shared()
        self._checkpoint = checkpoint
        self.trace_dir = trace_dir
        self._build_args: dict[str, int] = {"seed": 0}
        settings = {"trace_dir": str(trace_dir), "max_canvas_length": MAX_CANVAS_LENGTH}
        arguments = {
            "max_model_len": MAX_MODEL_LEN,
            "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
            "max_num_seqs": MAX_NUM_SEQS,
            "num_gpu_blocks_override": NUM_KV_BLOCKS,
            "kv_cache_memory_bytes": 64 * 2**20,
            "limit_mm_per_prompt": {"image": 2},
            "additional_config": {"dvlm": settings},
            "disable_log_stats": False,
        }
        # vLLM collects garbage eight times while it starts: once is enough for what is here by now.
        gc.collect()
        gc.freeze()
        with quiet_process():
            self.llm = LLM(str(checkpoint(**self._build_args)), **arguments | changes)
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.model_state = self.runner.model_state
        self.sampler = self.runner.sampler
        self.model = self.runner.model
        self.num_idle_blocks = self.num_free_blocks

    def close(self) -> None:
        """End the engine and leave the process ready for another."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.core.shutdown()
        del self.llm, self.engine, self.core, self.scheduler, self.runner, self.model_state, self.sampler, self.model
        cleanup_dist_env_and_memory()

    # -- weights -----------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Checkpoint whose weights are loaded."""
        return self._checkpoint(**self._build_args)

    def use(self, build_args: Mapping[str, int]) -> None:
        """Load the weights of this golden checkpoint and forget what was computed from the old ones."""
        if build_args == self._build_args:
            return
        self._build_args = dict(build_args)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.folder)})
        self.engine.reset_encoder_cache()
        self.engine.reset_mm_cache()

    # -- runs --------------------------------------------------------------------------------------------------

    def add(self, request_id: str, prompt: Prompt, params: SamplingParams) -> None:
        self.engine.add_request(request_id, prompt, params)

    def finish(self, on_step: Callable[[], None] | None = None) -> dict[str, RequestOutput]:
        """Step until nothing is left; the finished outputs by request id. ``on_step`` runs after every step."""
        done, num_steps = {}, 0
        while self.engine.has_unfinished_requests():
            num_steps += 1
            assert num_steps < MAX_STEPS, "a request does not finish"
            for output in self.engine.step():
                if output.finished:
                    done[output.request_id] = output
            if on_step is not None:
                on_step()
        # The worker hears of a finished request with the next step.
        while self.scheduler.has_requests():
            self.engine.step()
        return done

    def run(self, work: Work, on_step: Callable[[], None] | None = None) -> dict[str, RequestOutput]:
        """All requests together; checks that the engine holds nothing afterwards."""
        for request_id, (prompt, params) in work.items():
            self.add(request_id, prompt, params)
        done = self.finish(on_step)
        self.assert_idle()
        return {request_id: done[request_id] for request_id in work}

    def run_one(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        return self.run({"alone": (prompt, params)})["alone"]

    def run_case(self, case: cases.Case, **changes: Any) -> RequestOutput:
        """A golden case alone, on its own checkpoint."""
        self.use(case.build_args)
        return self.run({case.name: (case_prompt(case), case_params(case, **changes))})[case.name]

    def preempt_all(self) -> int:
        """Preempt every running request, as vLLM's own reset does; the number of them."""
        num_running = len(self.scheduler.running)
        self.engine.reset_prefix_cache(reset_running_requests=True)
        return num_running

    def trace(self, request_id: str) -> dict[str, Any]:
        return json.loads((self.trace_dir / f"{request_id}.json").read_text())

    # -- what the engine holds ---------------------------------------------------------------------------------

    @property
    def kv_block_size(self) -> int:
        return self.scheduler.block_size

    @property
    def num_free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def num_held_blocks(self) -> int:
        """KV blocks that requests own."""
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return sum(len(blocks) for blocks in manager.req_to_blocks.values())

    def assert_idle(self) -> None:
        """No KV block, no worker slot and no queue entry outlives its request."""
        assert self.num_free_blocks == self.num_idle_blocks, "KV blocks lost"
        assert not self.scheduler.requests and not self.scheduler.running and not self.scheduler.waiting
        assert not self.model_state.slots and not self.model_state.req_idx_of, "worker slots lost"
