"""`vllm-dvlm serve`: starts or replaces the served application and stays until it is to end."""

import signal
import threading
import time
import uuid
from argparse import Namespace
from typing import Any

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError

from vllm_dvlm.cluster.actors import connect
from vllm_dvlm.cluster.application import parse
from vllm_dvlm.cluster.board import board
from vllm_dvlm.cluster.resources import Resources
from vllm_dvlm.cluster.serving import Settings, application

APP = "vllm_dvlm"
# How soon the command notices that another one has taken its place, or has failed to.
LOOK_S = 1.0
# Of Serve's controller, if it starts now: without it a replica that does not answer is drained, for --drain-timeout,
# while its requests could be repeated at once.
ENVIRONMENT = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}


def run(arguments: list[str], settings: Settings) -> None:
    """Serve until SIGINT, SIGTERM, or until a later command serves in its place.

    ValueError for a small cluster and for replicas that do not start; what an earlier command serves then stays.
    """
    args = parse(arguments)
    resources = Resources.of(args, settings.most)
    connect(settings.most, resources.num_gpus, ENVIRONMENT)
    try:
        # Wrong options are found here, in seconds, and not in a replica whose predecessor is gone.
        _check(args)
        _serve(args, arguments, settings)
    finally:
        ray.shutdown()


def _check(args: Namespace) -> None:
    """ValueError if vLLM or this package refuses the options or the model."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    if current_platform.is_unspecified():  # a head without a GPU
        return
    try:
        AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except Exception as error:
        raise ValueError(str(error)) from error


def _serve(args: Namespace, arguments: list[str], settings: Settings) -> None:
    ended = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: ended.set())
    host, port = args.host or "0.0.0.0", args.port
    tls = {name: getattr(args, name) for name in ("ssl_keyfile", "ssl_certfile") if getattr(args, name)}
    serve.start(http_options={"host": host, "port": port, "request_timeout_s": settings.request_timeout, **tls})
    command, shared = uuid.uuid4().hex, _come()
    try:
        try:
            _deploy(arguments, settings)
        except BaseException:
            ray.get(shared.undo.remote())  # an earlier command deploys its own again
            raise
        ray.get(shared.own.remote(command))
        is_mine = True
        scheme = "https" if tls else "http"
        print(f"{settings.replicas} replicas of {args.model} at {scheme}://{host}:{port}", flush=True)
        while is_mine and not ended.wait(LOOK_S):
            is_mine = ray.get(shared.owner.remote()) == command
            if is_mine and ray.get(shared.is_undone.remote()):
                print("another command could not serve in place of this one, which goes on", flush=True)
                _deploy(arguments, settings)
        if is_mine:
            _drain(shared, settings.drain_timeout)
        else:
            print("another command serves now", flush=True)
    finally:
        if ray.get(shared.leave_to_others.remote(command)):
            _delete()
            ray.kill(shared)


def _come() -> Any:
    """The board, told of this command; a new one where an earlier command takes its own along at this moment."""
    for _ in range(9):
        try:
            shared = board()
            ray.get(shared.come.remote())
            return shared
        except RayActorError:
            time.sleep(LOOK_S)
    raise ValueError("what an earlier command left on the cluster does not react; end it with `serve shutdown`")


def _deploy(arguments: list[str], settings: Settings) -> None:
    """Start or exchange replicas; ValueError with the reason of one that does not start."""
    try:
        serve.run(application(arguments, settings), name=APP, blocking=False)
    except RuntimeError as error:
        found = serve.status().applications.get(APP)
        reasons = [each.message for each in found.deployments.values() if each.message] if found else []
        raise ValueError("the replicas do not start: " + (_reason("\n".join(reasons)) or str(error))) from error


def _reason(message: str) -> str:
    """The last error in Serve's message, which holds the traceback of a replica."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return errors[-1] if errors else " ".join(lines)


def _drain(shared: Any, timeout_s: float) -> None:
    """What was accepted is answered; what comes now is refused."""
    try:
        ray.get(shared.close.remote(), timeout=timeout_s)
    except GetTimeoutError:
        print(f"not all requests were answered within --drain-timeout {timeout_s:g}", flush=True)


def _delete() -> None:
    """End the application, and Serve where it has no other."""
    serve.delete(APP)
    if not serve.status().applications.keys() - {APP}:
        serve.shutdown()
