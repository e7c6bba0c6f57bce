"""Real engines under load: one alone, one behind the router, several. Imports no Ray and no vLLM."""

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dvlm.bench.common import progress_bar
from vllm_dvlm.bench.scale_numbers import Counts, Load, joined, since
from vllm_dvlm.bench.scale_plan import Plan
from vllm_dvlm.bench.scale_run import Server, free_port, is_busy, running
from vllm_dvlm.bench.settings_grid import Setting


@dataclass(frozen=True)
class Point:
    """One configuration and setting under load. replicas: 0 is an engine without the router.

    start_up: seconds. cpu_s: processor time of the server's processes for a request, None if unknown. load_average: of
    the last minute, before; busy: others worked here, the figures are doubtful.
    """

    replicas: int
    ranks: int
    setting: Setting
    load: Load
    counts: dict[str, Counts]
    start_up: float
    cpu_s: float | None
    load_average: float
    busy: bool


@dataclass(frozen=True)
class Alone:
    """One engine and setting: without and with the router in turns, and its service times: all slots taken, no line."""

    plain: Point
    served: Point
    overheads: tuple[float, ...]
    service: Load


@dataclass
class Measured:
    """alone by (ranks, name of the setting); several: points of more replicas."""

    alone: dict[tuple[int, str], Alone] = dataclasses.field(default_factory=dict)
    several: list[Point] = dataclasses.field(default_factory=list)

    @property
    def start_ups(self) -> tuple[float, ...]:
        """Seconds that a replica behind the router took, one of each server."""
        return tuple({point.start_up: None for point in [each.served for each in self.alone.values()]})


class _Bench:
    def __init__(self, plan: Plan, folder: Path, moved: Callable[[], Any]) -> None:
        self.plan, self.folder, self.moved = plan, folder, moved

    @contextlib.contextmanager
    def plain(self, ranks: int) -> Iterator[Server]:
        port, more = free_port(), {}
        if 2 * ranks <= self.plan.gpus:  # beside a replica, which Ray puts on the first ones
            own = _visible(self.plan.gpus)[-ranks:]
            more = {"CUDA_VISIBLE_DEVICES": ",".join(own)}
        command = self.plan.engine.plain(port, ranks)
        with running(command, port, self.folder / "plain.log", 1, **more) as server:
            yield server

    @contextlib.contextmanager
    def served(self, replicas: int, ranks: int) -> Iterator[Server]:
        port = free_port()
        command = self.plan.engine.served(port, ranks, replicas, self.plan.limit)
        with running(command, port, self.folder / "served.log", replicas) as server:
            yield server

    def point(self, server: Server, replicas: int, ranks: int, setting: Setting, at_once: int | None = None) -> Point:
        """One run of the client; as many requests at once as saturate unless told."""
        plan, num = self.plan, max(1, replicas)
        average = os.getloadavg()[0]
        busy = is_busy()
        before, cpu_before = server.counts(num), server.cpu_s()
        at_once = at_once or num * plan.per_replica
        load = plan.client.run(server.port, num * plan.num, at_once, plan.request_options(setting))
        cpu, counts = server.cpu_s(), since(server.counts(num), before)
        self.moved()
        requests = sum(each.requests for each in counts.values())
        cpu_s = None if cpu is None or cpu_before is None or not requests else (cpu - cpu_before) / requests
        return Point(replicas, ranks, setting, load, counts, server.start_up, cpu_s, average, busy)

    def alone(self, ranks: int) -> Iterator[Alone]:
        """Without and with the router: in turns where both have room at once, else one after the other."""
        plan = self.plan
        if plan.gpus and 2 * ranks > plan.gpus:
            plain, services = {}, {}
            with self.plain(ranks) as server:
                for setting in plan.settings:
                    plain[setting] = [self.point(server, 0, ranks, setting) for _ in range(plan.pairs)]
                    services[setting] = self.point(server, 0, ranks, setting, plan.engine.slots)
            with self.served(1, ranks) as server:
                for setting in plan.settings:
                    served = [self.point(server, 1, ranks, setting) for _ in range(plan.pairs)]
                    yield _alone(plain[setting], served, services[setting])
            return
        with self.plain(ranks) as without, self.served(1, ranks) as router:
            for setting in plan.settings:
                pairs = [
                    (self.point(without, 0, ranks, setting), self.point(router, 1, ranks, setting))
                    for _ in range(plan.pairs)
                ]
                service = self.point(without, 0, ranks, setting, plan.engine.slots)
                yield _alone([pair[0] for pair in pairs], [pair[1] for pair in pairs], service)

    def several(self, replicas: int, ranks: int) -> Iterator[Point]:
        with self.served(replicas, ranks) as server:
            for setting in self.plan.settings:
                yield self.point(server, replicas, ranks, setting)


def _visible(gpus: int) -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(gpus)]


def _alone(plain: Sequence[Point], served: Sequence[Point], service: Point) -> Alone:
    overheads = tuple(1 - b.load.requests_per_s / a.load.requests_per_s for a, b in zip(plain, served, strict=True))
    return Alone(_one(plain), _one(served), overheads, service.load)


def _one(points: Sequence[Point]) -> Point:
    """Repeated points as one."""
    counts = {
        name: Counts(
            sum(point.counts[name].requests for point in points),
            sum(point.counts[name].tokens for point in points),
            sum(point.counts[name].kv_blocks for point in points),
        )
        for name in points[0].counts
    }
    busy = any(point.busy for point in points)
    load = joined([point.load for point in points])
    average = max(point.load_average for point in points)
    known = [point.cpu_s for point in points if point.cpu_s is not None]
    cpu_s = sum(known) / len(known) if known else None
    return dataclasses.replace(points[0], load=load, counts=counts, cpu_s=cpu_s, load_average=average, busy=busy)


def measure(plan: Plan) -> Measured:
    """Every configuration of a plan. RuntimeError if a server does not come up or a request fails."""
    found = Measured()
    with (
        tempfile.TemporaryDirectory(prefix="vllm-dvlm-bench-") as folder,
        progress_bar("runs", plan.num_runs) as bar,
    ):
        bench = _Bench(plan, Path(folder), bar.update)
        for ranks in plan.ranks:
            for each in bench.alone(ranks):
                found.alone[ranks, each.plain.setting.name] = each
            for replicas in plan.replicas:
                if replicas > 1:
                    print(_placing(plan, replicas, ranks), file=sys.stderr)
                    found.several += bench.several(replicas, ranks)
    return found


def _placing(plan: Plan, replicas: int, ranks: int) -> str:
    if plan.gpus:
        return f"{replicas} replicas, {ranks} of {plan.gpus} GPUs each"
    return f"{replicas} replicas on {len(os.sched_getaffinity(0))} cores; no GPU"
