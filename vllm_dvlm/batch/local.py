"""The only engine of a batch on one: in this process, without Ray."""

import os
from typing import Any

from vllm_dvlm.batch.driver import WorkerLost


def has_accelerator() -> bool:
    """False on a CPU host. Imports vLLM."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def steps_in_process() -> bool:
    """Whether an engine's steps run in the process of its replica: on a CPU host, where a process of their own would
    be waited for busily, on cores that others need. `VLLM_ENABLE_V1_MULTIPROCESSING=1` wants that process all the same.
    """
    return not has_accelerator() and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "1"


def keep_in_process() -> None:
    """Set vLLM's switch for it; before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def bind_threads(cores: list[int], num_ranks: int) -> None:
    """Environment of an engine on a CPU host that has these cores, for its ranks; before vLLM is imported."""
    from vllm_dvlm.cpu_host.defaults import split_cores

    # One rank takes all of them: nothing else of vLLM wants a core where its steps run in this process.
    bound = ",".join(map(str, cores)) if num_ranks == 1 else split_cores(cores, num_ranks)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bound
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(cores) // num_ranks))


class LocalWorker:
    """An engine of this process. It cannot be started twice: a batch whose only engine dies is resumed."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self._answerer: Any = None
        self._is_lost = False

    async def start(self) -> None:
        if self._is_lost:
            raise WorkerLost("the engine died (its reason stands above); run the command again to go on")
        from vllm_dvlm.batch.answerer import Answerer

        self._answerer = Answerer()
        await self._answerer.start(self._arguments, steps_in_process(), self._die)

    def _die(self) -> None:
        self._is_lost = True

    async def answer(self, request: str) -> str:
        if self._is_lost:
            raise WorkerLost("the engine died")
        line = await self._answerer.answer(request)
        if self._answerer.engine.errored:
            self._is_lost = True
            raise WorkerLost("the engine died")
        return line

    async def stop(self) -> None:
        if self._answerer is not None:
            answerer, self._answerer = self._answerer, None
            await answerer.close()
