"""Replicas behind a router as a discrete-event simulation with SimPy. Imports no Ray and no vLLM; all times in seconds.

A request passes the router, waits for one of the slots of its replica, holds it for a service time drawn from what was
measured, and passes the router again. `ASSUMPTIONS` are what this leaves out.
"""

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dvlm.bench.scale_numbers import percentile

ASSUMPTIONS = (
    "A replica is max_num_seqs slots and a line before them; the image's encoding is part of the time of a slot.",
    "That time is drawn from those measured with all slots taken, whatever else the replica does.",
    "The router is one server that each request passes twice, for half of the measured time, and a fixed wait.",
    "It was measured beside its client on this host; it is as fast with more replicas, and networks cost nothing.",
    "Of two replicas drawn at random the one with fewer requests gets the next, and the router knows how many at once.",
    "Replicas are alike, none is lost, and none slows another, or the router.",
)


@dataclass(frozen=True)
class Service:
    """Measured requests of one setting: (time to the first committed token, time of the whole answer) of each."""

    samples: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not self.samples or any(not 0 <= first <= whole for first, whole in self.samples):
            raise ValueError("service times need at least one pair 0 <= first <= whole")

    @property
    def mean(self) -> float:
        """Of whole answers."""
        return sum(whole for _, whole in self.samples) / len(self.samples)

    def stretched(self, factor: float) -> "Service":
        """The same, this many times longer."""
        return Service(tuple((first * factor, whole * factor) for first, whole in self.samples))


@dataclass(frozen=True)
class Router:
    """station: time of the one server for a request; delay: what else a request that meets no other takes longer."""

    station: float = 0.0
    delay: float = 0.0


@dataclass(frozen=True)
class System:
    """What is simulated. limit: requests that a replica holds, waiting ones included; others wait in the router.

    start_up: measured start-up times; a replica takes requests from then on. Empty: all are up.
    """

    num_replicas: int
    slots: int
    service: Service
    router: Router = Router()
    limit: int = 64
    start_up: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if min(self.num_replicas, self.slots, self.limit) < 1:
            raise ValueError("a simulation needs at least one replica, slot and request")


@dataclass(frozen=True)
class Load:
    """num requests: from `clients` that each send the next when the last is answered, or at random times with `rate`
    per second (Poisson)."""

    num: int
    clients: int = 0
    rate: float = 0.0

    def __post_init__(self) -> None:
        if self.num < 1 or (self.clients < 1) == (self.rate <= 0):
            raise ValueError("a load needs requests, and either clients or a rate")


@dataclass(frozen=True)
class Played:
    """begin, first, end: of every request, on one clock. waits: for a slot. counts: requests by replica.

    ready: when the last replica was up.
    """

    begin: tuple[float, ...]
    first: tuple[float, ...]
    end: tuple[float, ...]
    waits: tuple[float, ...]
    counts: tuple[int, ...]
    ready: float

    @property
    def latencies(self) -> list[float]:
        """Of whole answers, as a client sees them."""
        return [end - begin for begin, end in zip(self.begin, self.end, strict=True)]

    @property
    def to_first(self) -> list[float]:
        """Times to the first committed token."""
        return [first - begin for begin, first in zip(self.begin, self.first, strict=True)]

    @property
    def requests_per_s(self) -> float:
        """From the first request to the last answer, as vLLM's client counts."""
        return len(self.end) / (max(self.end) - min(self.begin))

    def p95(self) -> float:
        """95th percentile of the latencies."""
        return percentile(self.latencies, 95)


def simpy_module() -> Any:
    """SimPy; ValueError that tells how to install it."""
    try:
        import simpy
    except ImportError:
        raise ValueError("--simulate needs SimPy: pip install 'vllm-dvlm[ray]'") from None
    return simpy


class _Run:
    def __init__(self, system: System, load: Load, seed: int) -> None:
        simpy = simpy_module()
        self.system, self.load, self.random = system, load, random.Random(seed)
        self.env = simpy.Environment()
        self.router = simpy.Resource(self.env)
        self.slots = [simpy.Resource(self.env, system.slots) for _ in range(system.num_replicas)]
        self.held = [0] * system.num_replicas
        self.counts = [0] * system.num_replicas
        self.up: list[int] = []
        self.waiting: list[Any] = []
        self.rows: list[tuple[float, float, float, float]] = []
        self.left = load.num
        self.ready = 0.0

    def start_up(self, replica: int) -> Generator:
        yield self.env.timeout(self.random.choice(self.system.start_up) if self.system.start_up else 0)
        self.up.append(replica)
        self.ready = self.env.now
        self.wake(self.system.limit)

    def wake(self, num: int) -> None:
        """Let as many of those who wait in the router look again."""
        for event in self.waiting[:num]:
            event.succeed()
        del self.waiting[:num]

    def choose(self) -> int | None:
        """A replica, or None if all that are up hold as much as they may."""
        drawn = self.random.sample(self.up, min(2, len(self.up)))
        free = [replica for replica in drawn if self.held[replica] < self.system.limit]
        if not free:  # the router draws again until one has a place
            free = [replica for replica in self.up if self.held[replica] < self.system.limit]
        return min(free, key=self.held.__getitem__, default=None)

    def pass_router(self) -> Generator:
        if self.system.router.station:
            with self.router.request() as turn:
                yield turn
                yield self.env.timeout(self.system.router.station / 2)

    def request(self) -> Generator:
        env, begin = self.env, self.env.now
        yield from self.pass_router()
        yield env.timeout(self.system.router.delay / 2)
        while (replica := self.choose()) is None:
            event = env.event()
            self.waiting.append(event)
            yield event
        self.held[replica] += 1
        arrived = env.now
        with self.slots[replica].request() as slot:
            yield slot
            started = env.now
            to_first, whole = self.random.choice(self.system.service.samples)
            yield env.timeout(whole)
        self.held[replica] -= 1
        self.counts[replica] += 1
        self.wake(1)
        yield env.timeout(self.system.router.delay / 2)
        yield from self.pass_router()
        # The first part of an answer takes the way of the last.
        first = started + to_first + (env.now - started - whole)
        self.rows.append((begin, first, env.now, started - arrived))

    def client(self) -> Generator:
        while self.left:
            self.left -= 1
            yield from self.request()

    def arrivals(self) -> Generator:
        for _ in range(self.load.num):
            yield self.env.timeout(self.random.expovariate(self.load.rate))
            self.env.process(self.request())

    def play(self) -> Played:
        for replica in range(self.system.num_replicas):
            self.env.process(self.start_up(replica))
        if self.load.rate:
            self.env.process(self.arrivals())
        for _ in range(self.load.clients):
            self.env.process(self.client())
        self.env.run()
        begin, first, end, waits = zip(*sorted(self.rows), strict=True)
        return Played(begin, first, end, waits, tuple(self.counts), self.ready)


def play(system: System, load: Load, seed: int = 0) -> Played:
    """Simulate; the same seed gives the same requests. ValueError without SimPy."""
    return _Run(system, load, seed).play()


def router_of(alone: float, most_per_s: float, empty: float) -> Router:
    """The router of two measurements with engines that answer at once.

    Args:
        alone: seconds of a request that meets no other. most_per_s: requests per second with many at once.
        empty: seconds of a request to such an engine without a router, alone.
    """
    if min(alone, most_per_s) <= 0 or empty < 0:
        raise ValueError("a router's measurements must be positive")
    station = 1 / most_per_s
    return Router(station, max(0.0, alone - empty - station))


def scaled(requests_per_s: float, num_replicas: int, one_per_s: float) -> float:
    """Scaling efficiency: throughput over that of as many single replicas."""
    return requests_per_s / (num_replicas * one_per_s)


def means(played: Sequence[Played]) -> tuple[float, float]:
    """(requests per second, 95th percentile of the latency), averaged over runs with several seeds."""
    return sum(p.requests_per_s for p in played) / len(played), sum(p.p95() for p in played) / len(played)
