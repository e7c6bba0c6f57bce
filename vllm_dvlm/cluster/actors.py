"""Engines of a batch as Ray actors. A lost one is made anew by the driver, which also repeats its rows: Ray's own
retries would wait for the dead actor."""

import asyncio
import json
import os
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from vllm_dvlm.batch.driver import WorkerLost
from vllm_dvlm.batch.local import keep_in_process

# Until an actor has a place in the cluster.
PLACE_S = 60.0


@ray.remote(max_restarts=0, max_task_retries=0)
class EngineActor:
    """An engine in a process of Ray's."""

    async def pid(self) -> int:
        """Answers once the actor has a place."""
        return os.getpid()

    async def start(self, arguments: list[str], share: tuple[int, int] | None) -> None:
        """Load. share: on a CPU host, which of how many replicas this is; None on one with GPUs."""
        # Ranks inside an engine are not Ray's.
        os.environ.pop("RAY_ADDRESS", None)
        if share is not None:
            keep_in_process(cores_of(*share))
        from vllm_dvlm.batch.answerer import Answerer

        self._answerer = Answerer()
        # A process that is gone is noticed at once; one whose engine is dead would answer with errors.
        await self._answerer.start(arguments, share is not None, lambda: os._exit(1))

    async def answer(self, request: str) -> str:
        line = await self._answerer.answer(request)
        if self._answerer.engine.errored:
            os._exit(1)
        return line


class RayWorker:
    """One replica; `number` of `num_replicas`, which share the cores of a CPU host. in_flight: rows that it holds."""

    def __init__(self, arguments: list[str], number: int, num_replicas: int, num_gpus: int, in_flight: int) -> None:
        self._arguments, self._number, self._num_replicas = arguments, number, num_replicas
        self._num_gpus, self._in_flight = num_gpus, in_flight
        self._actor: Any = None
        self.pid: int | None = None

    async def start(self) -> None:
        """Make the actor and load; WorkerLost if it ends meanwhile, or finds no place.

        RuntimeError if the engine says why it cannot start: it would say so again.
        """
        options = {"num_gpus": self._num_gpus, "num_cpus": 1, "max_concurrency": self._in_flight + 1}
        self._actor = EngineActor.options(**options).remote()
        try:
            self.pid = await asyncio.wait_for(self._actor.pid.remote(), PLACE_S)
        except TimeoutError:
            raise WorkerLost(f"the cluster has no place for replica {self._number}: see `ray status`") from None
        except RayError as error:
            raise WorkerLost(_last_line(error)) from error
        share = None if self._num_gpus else (self._number, self._num_replicas)
        try:
            await self._actor.start.remote(self._arguments, share)
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


def cores_of(number: int, num_replicas: int) -> list[int]:
    """Cores of a replica on this host, as if all of them were here; every replica has one at least."""
    cores = sorted(os.sched_getaffinity(0))
    if num_replicas >= len(cores):
        return [cores[number % len(cores)]]
    return cores[number * len(cores) // num_replicas : (number + 1) * len(cores) // num_replicas]


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def connect(num_replicas: int, num_gpus: int) -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this host; ValueError if it is too small."""
    from vllm_dvlm.cluster import head

    address = os.environ.get("RAY_ADDRESS")
    if address and (found := head.silence(address, num_replicas * num_gpus)) is not None:
        raise ValueError(found)
    ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    have, kind = ray.cluster_resources(), "GPU" if num_gpus else "CPU"
    wanted = num_replicas * (num_gpus or 1)
    if have.get(kind, 0) < wanted:
        raise ValueError(
            f"{num_replicas} replicas need {wanted} {kind}s and the Ray cluster has {have.get(kind, 0):g}: lower "
            "--replicas, or add nodes (`ray start --address=HEAD:6379`)"
        )
