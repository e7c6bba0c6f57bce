"""Replicas of vLLM's own server behind one address, as an application of Ray Serve.

Serve queues in front, balances by requests in flight, replaces replicas, drains them. `app` is the entry point of a
Serve config file or a RayService; `vllm-dvlm serve` is launch.py.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from ray import serve

from vllm_dvlm.cluster.application import Application, parse
from vllm_dvlm.cluster.board import board
from vllm_dvlm.cluster.front import Front
from vllm_dvlm.cluster.metrics_page import Page
from vllm_dvlm.cluster.resources import Resources

# How soon a dead engine takes its replica along: one that is left would fail fast and draw all requests.
WATCH_S = 0.2
# Requests that a front holds; what they wait for is a replica.
FRONT_REQUESTS = 100_000


@dataclass(frozen=True)
class Settings:
    """Options of the served application; the defaults and meanings are those of `vllm-dvlm serve --help`."""

    replicas: int = 1
    min_replicas: int | None = None
    max_replicas: int | None = None
    target_ongoing_requests: float = 8.0
    upscale_delay: float = 30.0
    downscale_delay: float = 600.0
    max_ongoing_requests: int = 64
    max_queued_requests: int | None = None
    fronts: int = 1
    health_period: float = 2.0
    health_timeout: float = 5.0
    drain_timeout: float = 120.0
    request_timeout: float = 600.0

    def check(self) -> None:
        """ValueError for values that make no sense."""
        for name, value in asdict(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        if self.min_replicas and not self.max_replicas:
            raise ValueError("--min-replicas needs --max-replicas; for a fixed number use --replicas")
        if self.max_replicas and not (self.min_replicas or 1) <= self.replicas <= self.max_replicas:
            raise ValueError("--replicas, with which it starts, must lie between --min-replicas and --max-replicas")

    @property
    def most(self) -> int:
        """Replicas at most."""
        return self.max_replicas or self.replicas


class Replica:
    """One engine and its application."""

    async def __init__(self, arguments: list[str], resources: Resources) -> None:
        context = serve.get_replica_context()
        resources.enter(context.rank.rank)
        self._application = Application()
        await self._application.start(arguments, resources.in_process)
        self._engine = self._application.engine
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        self._page = Page(board(), context.replica_id.unique_id)
        await self._page.open(get_prometheus_registry())
        self._watch = asyncio.create_task(self._leave_with_the_engine())

    async def _leave_with_the_engine(self) -> None:
        while True:
            self._leave_if_dead()
            await asyncio.sleep(WATCH_S)

    def _leave_if_dead(self) -> None:
        if self._engine.errored:
            print("the engine died, so its replica ends", file=sys.stderr, flush=True)
            os._exit(1)

    async def respond(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[dict[str, Any]]]:
        """See `Application.respond`. Nothing that a dead engine says is passed on: the front asks another replica."""
        parts = self._application.respond(scope, body)
        async with contextlib.aclosing(parts):
            async for messages in parts:
                self._leave_if_dead()
                yield messages

    async def check_health(self) -> None:
        """Asked by Serve every --health-period seconds."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._watch.cancel()
            await self._page.close()
            await self._application.close()


def deployment(settings: Settings, resources: dict[str, Any]) -> dict[str, Any]:
    """Options of the engines' deployment."""
    options: dict[str, Any] = {
        "name": "engine",
        "max_ongoing_requests": settings.max_ongoing_requests,
        "max_queued_requests": settings.max_queued_requests or -1,
        "health_check_period_s": settings.health_period,
        "health_check_timeout_s": settings.health_timeout,
        "graceful_shutdown_timeout_s": settings.drain_timeout,
        "graceful_shutdown_wait_loop_s": 0.5,
        **resources,
    }
    if settings.max_replicas:
        options["autoscaling_config"] = {
            "min_replicas": settings.min_replicas or 1,
            "max_replicas": settings.max_replicas,
            "initial_replicas": settings.replicas,
            "target_ongoing_requests": settings.target_ongoing_requests,
            "upscale_delay_s": settings.upscale_delay,
            "downscale_delay_s": settings.downscale_delay,
        }
    else:
        options["num_replicas"] = settings.replicas
    return options


def behind_front(engines: serve.Application, settings: Settings) -> serve.Application:
    """The address before these engines: a bound deployment whose class has `respond`, as `Replica` does."""
    options: dict[str, Any] = {
        "name": "front",
        "num_replicas": settings.fronts,
        "max_ongoing_requests": FRONT_REQUESTS,
        "health_check_period_s": settings.health_period,
        "graceful_shutdown_timeout_s": settings.drain_timeout,
        "graceful_shutdown_wait_loop_s": 0.5,
        "ray_actor_options": {"num_cpus": 0},
    }
    return serve.deployment(serve.ingress()(Front), **options).bind(engines)


def application(arguments: list[str], settings: Settings) -> serve.Application:
    """Engines with these options of `vllm serve`, behind fronts."""
    resources = Resources.of(parse(arguments), settings.most)
    options = deployment(settings, resources.of_serve())
    return behind_front(serve.deployment(Replica, **options).bind(arguments, resources), settings)


def app(args: dict[str, Any]) -> serve.Application:
    """Builder for a Serve config file (`import_path: vllm_dvlm.cluster.serving:app`).

    Args:
        args: `model`; `engine`, a list of options of `vllm serve`; and any of `Settings`. ValueError for others.
    """
    args = dict(args)
    if "model" not in args:
        raise ValueError("args need a `model`: a checkpoint folder or hub name")
    arguments = ["--model", args.pop("model"), *map(str, args.pop("engine", []))]
    names = {field.name for field in fields(Settings)}
    if unknown := sorted(args.keys() - names):
        raise ValueError(f"args know no {', '.join(unknown)}; they are model, engine, {', '.join(sorted(names))}")
    settings = Settings(**args)
    settings.check()
    return application(arguments, settings)
