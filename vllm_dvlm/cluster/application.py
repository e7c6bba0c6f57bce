"""An engine and vLLM's own web application around it, without a web server and without Ray.

So its endpoints, errors, report and header are those of `vllm serve`. Importing this module imports no vLLM: the
environment of the process can still be set.
"""

import asyncio
import contextlib
import types
from argparse import Namespace
from collections.abc import AsyncIterator
from typing import Any

# Options of `vllm serve` for its web server. The address here is Ray Serve's.
NOT_HERE = (
    "uds",
    "grpc_port",
    "uvicorn_log_level",
    "disable_uvicorn_access_log",
    "disable_access_log_for_endpoints",
    "ssl_ca_certs",
    "enable_ssl_refresh",
    "ssl_cert_reqs",
    "ssl_ciphers",
    "h11_max_incomplete_event_size",
    "h11_max_header_count",
    "api_server_count",
    "headless",
)


def parse(arguments: list[str]) -> Namespace:
    """`vllm serve`'s own options; SystemExit with its message for wrong ones, ValueError for its web server's."""
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    except ImportError:  # moved in vLLM 0.33
        from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_dvlm.batch.answerer import refuse_others

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm-dvlm serve"))
    args = parser.parse_args(arguments)
    refuse_others(args, parser, NOT_HERE, "the address of the replicas is Ray Serve's")
    if bool(args.ssl_keyfile) != bool(args.ssl_certfile):
        raise ValueError("--ssl-keyfile and --ssl-certfile belong together")
    validate_parsed_serve_args(args)
    return args


class Application:
    """Made on the event loop it runs on. `app` answers requests as an ASGI application; `close` ends the engine."""

    async def start(self, arguments: list[str], in_process: bool) -> None:
        """Load the model. in_process: the engine's steps run in a thread of this process (a CPU host)."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        args = parse(arguments)
        self._tasks: set[asyncio.Task] = set()
        self._stack = contextlib.AsyncExitStack()
        self.engine = await _engine(args, in_process, self._stack)
        tasks = await self.engine.get_supported_tasks()
        self.app = build_app(args, tasks, self.engine.model_config)
        await init_app_state(self.engine, self.app.state, args, tasks)
        # vLLM's handler of fatal errors asks the web server to end; whoever runs this watches the engine.
        self.app.state.server = types.SimpleNamespace()
        await self._stack.enter_async_context(self.app.router.lifespan_context(self.app))

    async def respond(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[dict[str, Any]]]:
        """Answer one request: the application's ASGI messages, as many at a time as there are.

        The head of a reply comes together with the first part of its body. Who stops reading ends the request, as a
        client that hangs up does.
        """
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        gone = asyncio.Event()
        requests = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if requests:
                return requests.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def answer() -> None:
            try:
                await self.app(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(answer())
        self._tasks.add(task)  # asyncio itself keeps none
        task.add_done_callback(self._tasks.discard)
        try:
            ready: list[dict[str, Any]] = []
            while (message := await messages.get()) is not None:
                ready.append(message)
                if messages.empty() and message["type"] != "http.response.start":
                    yield ready
                    ready = []
            if ready:
                yield ready
            await task
        finally:
            # The application ends the request itself. Cancelled, vLLM's handlers would leave it running.
            gone.set()

    async def close(self) -> None:
        """End the engine."""
        await self._stack.aclose()


async def _engine(args: Namespace, in_process: bool, stack: contextlib.AsyncExitStack) -> Any:
    if in_process:
        from vllm.engine.arg_utils import AsyncEngineArgs

        from vllm_dvlm.batch.step_loop import StepLoop

        engine = StepLoop(AsyncEngineArgs.from_cli_args(args))
        stack.callback(engine.shutdown, 10)
        return engine
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client

    return await stack.enter_async_context(build_async_engine_client(args))
