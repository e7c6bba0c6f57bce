"""`vllm-dvlm serve`: replicas of vLLM's own server behind one address, by Ray Serve.

Every replica runs vLLM's FastAPI application as `vllm serve` does, so its endpoints, errors, report and header are
those. Serve queues in front, balances by requests in flight, replaces replicas, drains them on shutdown.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
import types
from argparse import Namespace
from typing import Any

import ray
from ray import serve

from vllm_dvlm.batch.local import has_accelerator, keep_in_process
from vllm_dvlm.cluster.actors import connect, cores_of
from vllm_dvlm.cluster.metrics_page import Board, Page

APP, BOARD = "vllm_dvlm", "vllm_dvlm_metrics"
# How soon a dead engine takes its replica along: one that is left would fail fast and draw all requests.
WATCH_S = 0.2


@serve.deployment(name="engine")
@serve.ingress()  # the application is made with the engine
class Replica:
    """One engine and its application. on_cpu: the engine's steps run in this process, on its share of the cores."""

    async def __init__(self, arguments: list[str], num_replicas: int, on_cpu: bool, board: Any) -> None:
        # Ranks inside an engine are not Ray's.
        os.environ.pop("RAY_ADDRESS", None)
        context = serve.get_replica_context()
        if on_cpu:
            keep_in_process(cores_of(context.rank.rank, num_replicas))
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        args = parse(arguments)
        self._stack = contextlib.AsyncExitStack()
        self.engine = await _engine(args, on_cpu, self._stack)
        tasks = await self.engine.get_supported_tasks()
        self._app = build_app(args, tasks, self.engine.model_config)
        await init_app_state(self.engine, self._app.state, args, tasks)
        # vLLM's handler of fatal errors asks the web server to end; the watcher below does that here.
        self._app.state.server = types.SimpleNamespace()
        self._page = Page(board, context.replica_id.unique_id)
        await self._page.open(self._app)
        self._watch = asyncio.create_task(self._leave_with_the_engine())

    async def _leave_with_the_engine(self) -> None:
        while not self.engine.errored:
            await asyncio.sleep(WATCH_S)
        print("the engine died, so its replica ends", file=sys.stderr, flush=True)
        os._exit(1)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def check_health(self) -> None:
        """Asked by Serve every --health-period seconds."""
        await self.engine.check_health()

    async def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._watch.cancel()
            await self._page.close()
            await self._stack.aclose()


async def _engine(args: Namespace, on_cpu: bool, stack: contextlib.AsyncExitStack) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    if on_cpu:
        from vllm_dvlm.batch.step_loop import StepLoop

        engine = StepLoop(AsyncEngineArgs.from_cli_args(args))
        stack.callback(engine.shutdown, 10)
        return engine
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client

    return await stack.enter_async_context(build_async_engine_client(args))


def parse(arguments: list[str]) -> Namespace:
    """`vllm serve`'s own options; SystemExit with its message for wrong ones."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser(prog="vllm-dvlm serve")).parse_args(arguments)
    validate_parsed_serve_args(args)
    return args


def run(arguments: Namespace, engine_arguments: list[str]) -> int:
    """Serve until SIGINT or SIGTERM. ValueError for a cluster that is too small."""
    args = parse(engine_arguments)
    on_cpu = not has_accelerator()
    num_gpus = 0 if on_cpu else arguments.tensor_parallel_size
    most = arguments.max_replicas or arguments.replicas
    connect(most, num_gpus)
    ended = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: ended.set())
    host, port = args.host or "0.0.0.0", args.port
    serve.start(http_options={"host": host, "port": port, "request_timeout_s": arguments.request_timeout})
    board = Board.options(name=BOARD, get_if_exists=True, num_cpus=0).remote()
    options: dict[str, Any] = {
        "max_ongoing_requests": arguments.max_ongoing_requests,
        "max_queued_requests": -1,
        "health_check_period_s": arguments.health_period,
        "health_check_timeout_s": arguments.health_timeout,
        "graceful_shutdown_timeout_s": arguments.drain_timeout,
        "graceful_shutdown_wait_loop_s": 0.5,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": num_gpus},
    }
    if arguments.max_replicas:
        options["autoscaling_config"] = {
            "min_replicas": arguments.min_replicas or 1,
            "max_replicas": arguments.max_replicas,
            "initial_replicas": arguments.replicas,
            "target_ongoing_requests": arguments.target_ongoing_requests,
        }
    else:
        options["num_replicas"] = arguments.replicas
    try:
        serve.run(Replica.options(**options).bind(engine_arguments, most, on_cpu, board), name=APP, blocking=False)
        print(f"{arguments.replicas} replicas of {arguments.model} at http://{host}:{port}", flush=True)
        ended.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0
