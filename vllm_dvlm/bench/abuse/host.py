"""One engine inside this process whose books are audited: the engine side of R2, R3 and R4.

Importing this module imports vLLM; set the environment with `engine_env.prepare` first.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm import RequestOutput

from vllm_dvlm.bench.abuse import job as jobs
from vllm_dvlm.bench.engine_host import EngineHost, Request

MAX_STEPS = 100_000


class Host(EngineHost):
    """An engine in this process and its books.

    late_group: late layers in a KV cache group of their own (fastv as the server's default method).
    """

    def __init__(self, folder: Path, late_group: bool = False) -> None:
        settings: dict[str, Any] = {"max_canvas_length": jobs.MAX_CANVAS}
        if late_group:
            settings["prune_method"] = "fastv"
        super().__init__(
            folder,
            max_model_len=jobs.MAX_MODEL_LEN,
            max_num_seqs=jobs.MAX_SEQS,
            num_gpu_blocks_override=jobs.NUM_KV_BLOCKS * (2 if late_group else 1),  # half the layers, half the bytes
            kv_cache_memory_bytes=2**26,
            limit_mm_per_prompt={"image": jobs.MAX_IMAGES},
            mm_processor_cache_gb=0.05,
            additional_config={"dvlm": settings},
        )
        self.state = self.runner.model_state
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        if len(self.managers) != 1 + late_group:
            raise RuntimeError(f"{len(self.managers)} KV cache groups instead of {1 + late_group}")
        self.num_idle_blocks = self.num_free_blocks
        self.inside: Callable[[], None] | None = None
        self.runner.model.register_forward_pre_hook(self._on_forward)

    def _on_forward(self, *_: Any) -> None:
        """Run `inside` once, while the model computes a step."""
        if self.inside is not None:
            todo, self.inside = self.inside, None
            todo()

    # -- requests ----------------------------------------------------------------------------------------------------

    def add(self, name: str, request: Request) -> None:
        self.engine.add_request(name, *request)

    def run_named(self, requests: dict[str, Request]) -> dict[str, RequestOutput]:
        """All together, to the end."""
        for name, request in requests.items():
            self.add(name, request)
        done: dict[str, RequestOutput] = {}
        for _ in range(MAX_STEPS):
            done |= {output.request_id: output for output in self.step()[1]}
            if not self.scheduler.has_requests():  # the worker hears of the last ones with one more step
                return done
        raise RuntimeError("requests that do not end")

    def abort(self, name: str) -> None:
        """By the API, between two steps."""
        self.engine.abort_request([name])

    def abort_inside(self, name: str) -> None:
        """As the server's input thread does while a step is computed: the engine core finds it before the update."""
        self.core.aborts_queue.put_nowait(self.engine.output_processor.abort_requests([name], False))

    def preempt(self) -> int:
        """Preempt every running request, by vLLM's own reset; the number of them."""
        num = len(self.scheduler.running)
        self.engine.reset_prefix_cache(reset_running_requests=True)
        return num

    def request(self, name: str) -> Any:
        """The scheduler's request of this name; None if it does not know one."""
        found = (r for i, r in self.scheduler.requests.items() if i.startswith(f"{name}-"))
        return next(found, None)

    # -- books -------------------------------------------------------------------------------------------------------

    def audit(self) -> list[str]:
        """What is wrong with the pool now, in words; true between any two operations."""
        owned = [block for m in self.managers for blocks in m.req_to_blocks.values() for block in blocks]
        problems = []
        lost = self.num_idle_blocks - self.num_free_blocks - len(owned)
        if lost:
            problems.append(f"{lost} KV blocks lost (negative: freed twice)")
        if len({block.block_id for block in owned}) != len(owned):
            problems.append("a block in two requests")
        if any(block.ref_cnt != 1 or block.is_null for block in owned):
            problems.append("an owned block with a wrong count of users")
        for manager in self.managers:
            if unknown := set(manager.req_to_blocks) - set(self.scheduler.requests):
                problems.append(f"blocks of requests that are gone: {sorted(unknown)[:3]}")
        return problems

    def audit_worker(self) -> list[str]:
        """Requests of the step just made whose row of blocks on the worker is not the scheduler's; after a step."""
        problems = []
        for request in self.scheduler.running:
            row = self.state.req_idx_of.get(request.request_id)
            held = sum(len(m.req_to_blocks[request.request_id]) for m in self.managers)
            known = None if row is None else self.state.num_kv_blocks(row)
            if held != known:
                problems.append(f"{request.request_id}: {held} blocks in the scheduler, {known} in the worker")
        return problems

    def audit_idle(self) -> list[str]:
        """What is left although no request is."""
        problems = self.audit()
        if self.num_free_blocks != self.num_idle_blocks:
            problems.append(f"{self.num_idle_blocks - self.num_free_blocks} blocks in use")
        if self.scheduler.requests or self.scheduler.running or self.scheduler.waiting:
            problems.append("requests in the scheduler")
        if self.state.slots or self.state.req_idx_of:
            problems.append("slots in the worker")
        return problems

    def settle(self) -> list[str]:
        """Step until nothing is left, then `audit_idle`."""
        for _ in range(MAX_STEPS):
            if not self.scheduler.has_requests():
                return self.audit_idle()
            self.step()
        return ["requests that do not end"]


def tokens(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)
