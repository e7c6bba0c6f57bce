"""One engine that answers requests in OpenAI's batch format with the parts of vLLM's own `vllm run-batch`.

So templates, checks, errors and replies are those of the server. Importing this module imports vLLM.
"""

import asyncio
import contextlib
import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers import run_batch
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_dvlm.batch.rows import CHAT, error_line

# Options of `vllm run-batch` that are none of a batch here.
NOT_HERE = ("enable_metrics", "host", "port", "url", "output_tmp_dir")
# How soon a dead engine is noticed.
WATCH_S = 0.2


def parse(arguments: list[str]) -> Namespace:
    """vLLM's own options; SystemExit with its message for wrong ones, ValueError for what nothing here follows."""
    parser = run_batch.make_arg_parser(FlexibleArgumentParser(prog="vllm-dvlm batch"))
    args = parser.parse_args(["-i", "-", "-o", "-", *arguments])
    refuse_others(args, parser, NOT_HERE, "a batch has neither an address nor a page of metrics")
    return args


def refuse_others(args: Namespace, parser: FlexibleArgumentParser, names: tuple[str, ...], reason: str) -> None:
    """ValueError for options that vLLM has and that nothing here would follow."""
    for name in names:
        if hasattr(args, name) and getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect here ({reason}); leave it out")


def chat_fields() -> frozenset[str]:
    """Fields of a chat request."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return frozenset(ChatCompletionRequest.model_fields)


class Answerer:
    """Made on the event loop it runs on; `close` ends the engine.

    in_process: the engine's steps run in a thread of this process (a CPU host).
    """

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()
        self._tracker = run_batch.BatchProgressTracker()

    async def start(self, arguments: list[str], in_process: bool, on_death: Callable[[], Any]) -> None:
        """Load the model. `on_death` is called once if the engine dies."""
        args = parse(arguments)
        if in_process:
            from vllm_dvlm.batch.step_loop import StepLoop

            self.engine: Any = StepLoop(AsyncEngineArgs.from_cli_args(args))
            self._stack.callback(self.engine.shutdown, 10)
        else:
            from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client

            self.engine = await self._stack.enter_async_context(build_async_engine_client(args))
        self._registry = await run_batch.build_endpoint_registry(self.engine, args)

        async def watch() -> None:
            while not self.engine.errored:
                await asyncio.sleep(WATCH_S)
            on_death()

        self._watch = asyncio.create_task(watch())

    async def answer(self, line: str) -> str:
        """The output line of a request; whatever is wrong with the request is said in it."""
        name = json.loads(line)["custom_id"]
        try:
            request = run_batch.BatchRequestInput.model_validate_json(line)
        except (ValueError, KeyError) as error:
            return error_line(name, str(error))
        # Embeddings and the like are vLLM's; none of our models has them.
        if request.url != CHAT:
            return error_line(name, f"url {request.url!r}: only {CHAT} can be asked here")
        handler = self._registry["completions"]["handler_getter"]()
        found = await run_batch.run_request(handler, request, self._tracker)
        return found.model_dump_json()

    async def close(self) -> None:
        """End the engine."""
        self._watch.cancel()
        await self._stack.aclose()
