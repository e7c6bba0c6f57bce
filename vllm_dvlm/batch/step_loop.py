"""An engine in this very process behind vLLM's asynchronous interface: its steps run in a thread.

`AsyncLLM` always starts a process for its core, whose queues are waited for busily; on a CPU host that takes the cores
that other replicas need (two replicas on two cores: slower than one). `LLMEngine` keeps everything in one process, and
`EngineClient` is what vLLM's serving classes ask for. Only what answers requests is here.
"""

import asyncio
import contextvars
import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from functools import partial
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.engine.protocol import EngineClient
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories


def _refuse(name: str) -> Any:
    async def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        remedy = "VLLM_ENABLE_V1_MULTIPROCESSING=1 gives the engine a process of its own"
        raise NotImplementedError(f"{name} is not offered by an engine that runs in this process; {remedy}")

    return method


_Unused = type("_Unused", (), {name: _refuse(name) for name in EngineClient.__abstractmethods__})


def _is_no_thread_warning(record: logging.LogRecord) -> bool:
    """False for what vLLM's CPU worker says whenever a picture is prepared in its process."""
    return "torch.set_num_threads" not in record.getMessage()


class StepLoop(_Unused, EngineClient):  # type: ignore[misc, valid-type]
    """Runs on the event loop in which it was made; `shutdown` ends the thread."""

    def __init__(self, engine_args: EngineArgs | AsyncEngineArgs) -> None:
        logging.getLogger("vllm.v1.worker.cpu_worker").addFilter(_is_no_thread_warning)
        # As AsyncLLM does; LLMEngine leaves the loggers of plugins, ours among them, out.
        loggers = load_stat_logger_plugin_factories()
        self._engine = LLMEngine.from_engine_args(engine_args, stat_loggers=loggers)
        self.vllm_config = self._engine.vllm_config
        self.model_config = self._engine.model_config
        self.renderer = self._engine.renderer
        self.input_processor = self._engine.input_processor
        self._loop = asyncio.get_running_loop()
        self._queues: dict[str, asyncio.Queue] = {}
        self._numbers = itertools.count()
        # What the thread is asked to do between two steps: calls without arguments.
        self._asked: deque[Any] = deque()
        self._has_work = threading.Event()
        self._is_stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine steps", daemon=True)
        self._thread.start()

    # -- the thread --

    def _run(self) -> None:
        scheduler = self._engine.engine_core.engine_core.scheduler
        try:
            while not self._is_stopped:
                while self._asked:
                    self._asked.popleft()()
                # As the loop of vLLM's own process: once more after the last request has ended, so that the worker
                # frees it and the metrics say so.
                if not scheduler.has_requests():
                    self._has_work.wait()
                    self._has_work.clear()
                    continue
                if outputs := self._engine.step():
                    self._loop.call_soon_threadsafe(self._hand_out, outputs)
        except BaseException as error:  # told to every waiting request, and to all that come
            self._error = error
            self._loop.call_soon_threadsafe(self._fail)

    def _ask(self, call: Any) -> None:
        self._asked.append(call)
        self._has_work.set()

    # -- the event loop --

    def _hand_out(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            if (queue := self._queues.get(output.request_id)) is not None:
                queue.put_nowait(output)

    def _fail(self) -> None:
        for queue in self._queues.values():
            queue.put_nowait(self.dead_error)

    async def generate(  # type: ignore[override]
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`; an error at admission is raised here. Two requests may bear the same id."""
        if self.errored:
            raise self.dead_error
        queue: asyncio.Queue = asyncio.Queue()
        name = f"{request_id}-{next(self._numbers)}"
        self._queues[name] = queue
        for unused in ("data_parallel_rank", "reasoning_ended", "reasoning_parser_kwargs"):
            kwargs.pop(unused, None)

        def add() -> None:
            try:
                self._engine.add_request(name, prompt, sampling_params, **kwargs)
            except Exception as error:
                self._loop.call_soon_threadsafe(queue.put_nowait, error)

        # Admission tells the stream of this very connection (stream_status).
        self._ask(partial(contextvars.copy_context().run, add))
        is_finished = False
        try:
            while not is_finished:
                output = await queue.get()
                if isinstance(output, BaseException):
                    is_finished = True
                    raise output
                is_finished = output.finished
                output.request_id = request_id
                yield output
        finally:
            del self._queues[name]
            if not is_finished:
                self._ask(lambda: self._engine.abort_request([name]))

    async def get_supported_tasks(self) -> Any:
        return self._engine.get_supported_tasks()

    async def is_tracing_enabled(self) -> bool:
        return False

    async def do_log_stats(self) -> None:
        self._ask(self._engine.do_log_stats)

    async def check_health(self) -> None:
        if self.errored:
            raise self.dead_error

    @property
    def is_running(self) -> bool:
        return not self._is_stopped and self._error is None

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    @property
    def errored(self) -> bool:
        return self._error is not None

    @property
    def dead_error(self) -> BaseException:
        dead = EngineDeadError()
        dead.__cause__ = self._error
        return dead

    def shutdown(self, timeout: float | None = None) -> None:
        """End the thread after its step, and the engine."""
        self._is_stopped = True
        self._has_work.set()
        self._thread.join(timeout)
        self._engine.engine_core.shutdown()
