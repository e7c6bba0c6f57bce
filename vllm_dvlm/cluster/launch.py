"""`vllm-dvlm serve`: starts or replaces the served application and stays until it is to end."""

import signal
import threading
import uuid

import ray
from ray import serve
from ray.exceptions import GetTimeoutError

from vllm_dvlm.cluster.actors import connect
from vllm_dvlm.cluster.application import parse
from vllm_dvlm.cluster.board import board
from vllm_dvlm.cluster.resources import Resources
from vllm_dvlm.cluster.serving import Settings, application

APP = "vllm_dvlm"
# How soon the command notices that another one has taken its place.
LOOK_S = 1.0
# Of Serve's controller, if it starts now: without it a replica that does not answer is drained, for --drain-timeout,
# while its requests could be repeated at once.
ENVIRONMENT = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}


def run(arguments: list[str], settings: Settings) -> None:
    """Serve until SIGINT, SIGTERM, or until a later command serves in its place. ValueError for a small cluster."""
    args = parse(arguments)
    resources = Resources.of(args, settings.most)
    connect(settings.most, resources.num_gpus, ENVIRONMENT)
    ended = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: ended.set())
    host, port = args.host or "0.0.0.0", args.port
    serve.start(http_options={"host": host, "port": port, "request_timeout_s": settings.request_timeout})
    command, shared = uuid.uuid4().hex, board()
    ray.get(shared.own.remote(command))
    is_mine = True
    try:
        try:
            serve.run(application(arguments, settings), name=APP, blocking=False)
        except RuntimeError as error:
            raise ValueError(f"the replicas do not start: {error}") from error
        print(f"{settings.replicas} replicas of {args.model} at http://{host}:{port}", flush=True)
        while is_mine and not ended.wait(LOOK_S):
            is_mine = ray.get(shared.owner.remote()) == command
        if is_mine:
            # What was accepted is answered; what comes now is refused.
            try:
                ray.get(shared.close.remote(), timeout=settings.drain_timeout)
            except GetTimeoutError:
                print(f"not all requests were answered within --drain-timeout {settings.drain_timeout:g}", flush=True)
        else:
            print("another command serves now", flush=True)
    finally:
        if is_mine:
            _delete()
            ray.kill(shared)
        ray.shutdown()


def _delete() -> None:
    """End the application, and Serve where it has no other."""
    serve.delete(APP)
    if not serve.status().applications.keys() - {APP}:
        serve.shutdown()
