"""The router measured, and the simulation held against it: engines that sleep stand behind the real one."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_dvlm.bench.common import Row
from vllm_dvlm.bench.scale_numbers import Load, percentile
from vllm_dvlm.bench.scale_run import Client, Server, free_port, running
from vllm_dvlm.bench.scale_simulation import Load as Asked
from vllm_dvlm.bench.scale_simulation import Router, Service, System, means, play, router_of

AT_ONCE = ((0.0, 0.0),)  # of an engine that does not sleep
MANY = 32  # requests at once that fill the router
NUM_ALONE, NUM_MANY = 60, 600
# Share of the router's throughput that sleeping engines may ask for: beyond it processes that share a few cores with
# their client slow each other, which says nothing of a router with cores of its own.
ROUTER_SHARE = 0.3
SEEDS = 8
REQUESTS_PER_CLIENT = 8


@dataclass(frozen=True)
class Measured:
    """Of requests to engines that answer at once: alone, empty: median seconds of one that meets no other, with and
    without the router. many_per_s: requests per second with `MANY` at once."""

    alone: float
    many_per_s: float
    empty: float

    @property
    def router(self) -> Router:
        """What the router adds to service times that a client measured."""
        return router_of(self.alone, self.many_per_s, self.empty)

    @property
    def way(self) -> Router:
        """What router and client add to times that an engine sleeps."""
        return router_of(self.alone, self.many_per_s, 0.0)


@contextlib.contextmanager
def sleepers(
    replicas: int, slots: int, limit: int, samples: Sequence[tuple[float, float]], seed: int = 0
) -> Iterator[Server]:
    """Engines that sleep, behind the real router; without it if replicas is 0."""
    port = free_port()
    job = {"replicas": replicas, "port": port, "limit": limit, "slots": slots, "samples": samples, "seed": seed}
    with tempfile.TemporaryDirectory(prefix="vllm-dvlm-bench-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "vllm_dvlm.cluster.sleepers", str(path)]
        with running(command, port, Path(folder) / "server.log") as server:
            yield server


def measure_router(client: Client, limit: int) -> Measured:
    """Through the real router, and past it."""
    with sleepers(0, MANY, limit, AT_ONCE) as server:
        empty = client.run(server.port, NUM_ALONE, 1, {})
    with sleepers(1, MANY, limit, AT_ONCE) as server:
        alone = client.run(server.port, NUM_ALONE, 1, {})
        many = client.run(server.port, NUM_MANY, MANY, {})
    return Measured(percentile(alone.whole, 50), many.requests_per_s, percentile(empty.whole, 50))


def stretch(service: Service, router: Router, replicas: int, slots: int) -> float:
    """How many times longer engines sleep, at least 1, so that they ask for `ROUTER_SHARE` of the router at most."""
    return max(1.0, replicas * slots * router.station / (ROUTER_SHARE * service.mean))


def simulated(system: System, num: int, clients: int) -> tuple[float, float]:
    """(requests per second, p95 in seconds), the mean of several seeds."""
    return means([play(system, Asked(num, clients), seed) for seed in range(SEEDS)])


def compare(load: Load, system: System, num: int, clients: int) -> Row:
    """Columns of a simulation beside what a client saw; deviations are shares of the latter."""
    per_s, p95 = simulated(system, num, clients)
    real_p95 = percentile(load.whole, 95)
    return {
        "requests/s": load.requests_per_s,
        "simulated/s": per_s,
        "off": per_s / load.requests_per_s - 1,
        "p95_ms": 1000 * real_p95,
        "simulated_p95_ms": 1000 * p95,
        "p95_off": p95 / real_p95 - 1,
    }


def check(
    client: Client, service: Service, measured: Measured, replicas: int, slots: int, limit: int, per_replica: int
) -> Row:
    """Engines that sleep times of `service` behind the real router, against the simulation.

    overhead: share of the throughput that the same engines would have behind a router that costs nothing.
    """
    factor = stretch(service, measured.way, replicas, slots)
    slow = service.stretched(factor)
    clients = replicas * per_replica
    num = clients * REQUESTS_PER_CLIENT
    with sleepers(replicas, slots, limit, slow.samples) as server:
        load = client.run(server.port, num, clients, {})
    row = compare(load, System(replicas, slots, slow, measured.way, limit), num, clients)
    free, _ = simulated(System(replicas, slots, slow, Router(), limit), num, clients)
    return {
        "engines": "sleep",
        "replicas": replicas,
        "stretch": factor,
        **row,
        "overhead": 1 - load.requests_per_s / free,
    }
