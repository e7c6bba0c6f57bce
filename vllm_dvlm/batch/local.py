"""The only engine of a batch on one: in this process, without Ray."""

import os
from typing import Any

from vllm_dvlm.batch.driver import WorkerLost


def has_accelerator() -> bool:
    """False on a CPU host. Imports vLLM."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def keep_in_process(cores: list[int] | None) -> None:
    """Environment of an engine in this process on a CPU host, on these cores; before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if cores:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["OMP_NUM_THREADS"] = str(len(cores))


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
        await self._answerer.start(self._arguments, not has_accelerator(), self._die)

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
