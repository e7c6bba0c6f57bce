"""Engines of a batch as Ray actors. A lost one is made anew by the driver, which also repeats its rows: Ray's own
retries would wait for the dead actor."""

import asyncio
import json
import os
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vllm_dvlm.batch.driver import WorkerLost
from vllm_dvlm.cluster.resources import Resources

# Until an actor has a place in the cluster.
PLACE_S = 60.0


@ray.remote(max_restarts=0, max_task_retries=0)
class EngineActor:
    """An engine in a process of Ray's."""

    async def pid(self) -> int:
        """Answers once the actor has a place."""
        return os.getpid()

    async def start(self, arguments: list[str], resources: Resources, number: int) -> None:
        """Load. number: which of the replicas this is."""
        resources.enter(number)
        from vllm_dvlm.batch.answerer import Answerer

        self._answerer = Answerer()
        # A process that is gone is noticed at once; one whose engine is dead would answer with errors.
        await self._answerer.start(arguments, resources.in_process, lambda: os._exit(1))

    async def answer(self, request: str) -> str:
        line = await self._answerer.answer(request)
        if self._answerer.engine.errored:
            os._exit(1)
        return line


class RayWorker:
    """One replica of several, by its number. in_flight: rows that it holds."""

    def __init__(self, arguments: list[str], number: int, resources: Resources, in_flight: int) -> None:
        self._arguments, self._number = arguments, number
        self._resources, self._in_flight = resources, in_flight
        self._actor: Any = None
        self._group: PlacementGroup | None = None
        self.pid: int | None = None

    async def start(self) -> None:
        """Make the actor and load; WorkerLost if it ends meanwhile, or finds no place.

        RuntimeError if the engine says why it cannot start: it would say so again.
        """
        options: dict[str, Any] = {"num_cpus": 1, "max_concurrency": self._in_flight + 1}
        if self._resources.bundles is None:
            options["num_gpus"] = self._resources.num_gpus
        else:
            self._group = ray.util.placement_group(self._resources.bundles, strategy="PACK")
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
            )
        self._actor = EngineActor.options(**options).remote()
        try:
            self.pid = await asyncio.wait_for(self._actor.pid.remote(), PLACE_S)
        except TimeoutError:
            raise WorkerLost(f"the cluster has no place for replica {self._number}: see `ray status`") from None
        except RayError as error:
            raise WorkerLost(_last_line(error)) from error
        try:
            await self._actor.start.remote(self._arguments, self._resources, self._number)
        except RayActorError as error:
            raise WorkerLost(_last_line(error)) from error
        except RayError as error:
            raise RuntimeError(_last_line(error)) from error

    async def answer(self, request: str) -> str:
        try:
            return await self._actor.answer.remote(request)
        except RayActorError as error:
            raise WorkerLost(_last_line(error)) from error
        except RayError as error:  # of one request; the actor lives
            from vllm_dvlm.batch.rows import error_line

            return error_line(json.loads(request)["custom_id"], _last_line(error), 500)

    async def stop(self) -> None:
        if self._actor is not None:
            actor, self._actor = self._actor, None
            ray.kill(actor)
        if self._group is not None:
            group, self._group = self._group, None
            ray.util.remove_placement_group(group)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def connect(
    num_replicas: int, num_gpus: int, environment: dict[str, str] | None = None, with_dashboard: bool = True
) -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this host; ValueError if it is too small.

    environment: variables of the processes that are started there. with_dashboard: of a cluster that starts here;
    its processes take a share of the cores.
    """
    from vllm_dvlm.cluster import head

    address = os.environ.get("RAY_ADDRESS")
    if address and (found := head.silence(address, num_replicas * num_gpus)) is not None:
        raise ValueError(found)
    alone: dict[str, Any] = {} if address or with_dashboard else {"include_dashboard": False}
    variables = {"env_vars": environment or {}}
    ray.init(address=address, log_to_driver=False, logging_level="WARNING", runtime_env=variables, **alone)
    have, kind = ray.cluster_resources(), "GPU" if num_gpus else "CPU"
    wanted = num_replicas * (num_gpus or 1)
    if have.get(kind, 0) < wanted:
        raise ValueError(
            f"{num_replicas} replicas need {wanted} {kind}s and the Ray cluster has {have.get(kind, 0):g}: lower "
            "--replicas, or add nodes (`ray start --address=HEAD:6379`)"
        )
