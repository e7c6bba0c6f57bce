"""Numbers of a served load: percentiles, pages of metrics, what a client's result says. Imports no Ray and no vLLM."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dvlm.bench.common import Row

PERCENTILES = (50, 95, 99)
ALONE = "-"  # replica of a page without the label `replica`: one server's own

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", re.M)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# Exported counter -> name here.
_COUNTERS = {
    "vllm:request_success_total": "requests",
    "vllm_dvlm:committed_tokens_total": "tokens",
    "vllm_dvlm:kv_blocks_freed_total": "kv_blocks",
}
_HISTOGRAMS = {"vllm:e2e_request_latency_seconds_bucket": "e2e", "vllm:time_to_first_token_seconds_bucket": "first"}


def percentile(values: Sequence[float], percent: float) -> float:
    """Linearly between the two nearest, as numpy does. ValueError for no values."""
    if not values:
        raise ValueError("no values have no percentile")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Counts:
    """Of one replica so far. e2e, first: requests by upper bound of their seconds, cumulative as in Prometheus."""

    requests: float = 0
    tokens: float = 0
    kv_blocks: float = 0
    e2e: Mapping[float, float] = dataclasses.field(default_factory=dict)
    first: Mapping[float, float] = dataclasses.field(default_factory=dict)

    def __sub__(self, before: "Counts") -> "Counts":
        def less(now: Mapping[float, float], then: Mapping[float, float]) -> dict[float, float]:
            return {bound: count - then.get(bound, 0) for bound, count in now.items()}

        return Counts(
            self.requests - before.requests,
            self.tokens - before.tokens,
            self.kv_blocks - before.kv_blocks,
            less(self.e2e, before.e2e),
            less(self.first, before.first),
        )


def read_page(page: str) -> dict[str, Counts]:
    """Counts by replica of a page of metrics; the replica of a page without that label is `ALONE`."""
    numbers: dict[str, dict[str, float]] = {}
    buckets: dict[str, dict[str, dict[float, float]]] = {}
    for name, inside, value in _SAMPLE.findall(page):
        if name not in _COUNTERS and name not in _HISTOGRAMS:
            continue
        labels = dict(_LABEL.findall(inside))
        replica = labels.get("replica", ALONE)
        if name in _COUNTERS:
            found = numbers.setdefault(replica, {})
            found[_COUNTERS[name]] = found.get(_COUNTERS[name], 0) + float(value)
        else:
            found = buckets.setdefault(replica, {}).setdefault(_HISTOGRAMS[name], {})
            bound = float(labels["le"])
            found[bound] = found.get(bound, 0) + float(value)
    return {name: Counts(**numbers.get(name, {}), **buckets.get(name, {})) for name in {*numbers, *buckets}}


def since(now: Mapping[str, Counts], before: Mapping[str, Counts]) -> dict[str, Counts]:
    """What every replica did in between, in the order of their names; one that was not there before began at nothing.

    ValueError if one that was there is gone: it was replaced, so the load was no steady one.
    """
    if gone := before.keys() - now.keys():
        raise ValueError(f"replica {', '.join(sorted(gone))} was lost while it was measured; see the server's log")
    return {name: now[name] - before.get(name, Counts()) for name in sorted(now)}


def bucket_percentile(buckets: Mapping[float, float], percent: float) -> float | None:
    """Percentile of a histogram, linearly within a bucket as Prometheus does; None for an empty one."""
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0
    if not total:
        return None
    low, below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= total * percent / 100:
            if math.isinf(bound):
                return low
            return low + (bound - low) * (total * percent / 100 - below) / max(buckets[bound] - below, 1e-12)
        low, below = bound, buckets[bound]
    return low


@dataclass(frozen=True)
class Load:
    """What vLLM's client saw of one run; times in seconds, first and whole of every request.

    good_per_s: requests per second within the bound of --goodput, None without one.
    """

    requests_per_s: float
    good_per_s: float | None
    first: tuple[float, ...]
    whole: tuple[float, ...]
    starts: tuple[float, ...] = ()

    @property
    def pairs(self) -> tuple[tuple[float, float], ...]:
        """(first, whole) of every request."""
        return tuple(zip(self.first, self.whole, strict=True))


def read_result(result: Mapping[str, Any], num: int) -> Load:
    """From the file of `vllm bench serve --save-detailed`. RuntimeError unless all `num` requests were answered."""
    if result.get("completed") != num:
        reasons = [error.strip().splitlines()[-1] for error in result.get("errors", ()) if error.strip()]
        raise RuntimeError(f"{result.get('completed')} of {num} requests were answered: {(reasons or ['?'])[0]}")
    return Load(
        result["request_throughput"],
        result.get("request_goodput"),
        tuple(result["ttfts"]),
        tuple(result["latencies"]),
        tuple(result.get("start_times", ())),
    )


def joined(loads: Sequence[Load]) -> Load:
    """Several runs of the same load as one: mean rates, all requests."""
    good = [load.good_per_s for load in loads if load.good_per_s is not None]
    return Load(
        sum(load.requests_per_s for load in loads) / len(loads),
        sum(good) / len(good) if good else None,
        tuple(value for load in loads for value in load.first),
        tuple(value for load in loads for value in load.whole),
    )


def latency_columns(whole: Sequence[float], first: Sequence[float]) -> Row:
    """p50_ms ... and first_p50_ms ... of seconds."""
    columns = {f"p{p}_ms": 1000 * percentile(whole, p) for p in PERCENTILES}
    return columns | {f"first_p{p}_ms": 1000 * percentile(first, p) for p in PERCENTILES}


def total_row(load: Load, counts: Mapping[str, Counts], images: int) -> Row:
    """Columns of a configuration: rates per second, latencies in milliseconds as the client saw them.

    Tokens and KV blocks are those per request on the page of metrics, of which warm-up requests are part, times the
    client's requests per second. images: per request.
    """
    requests = sum(each.requests for each in counts.values())
    if not requests:
        raise ValueError("the page of metrics counts no requests: does the server run vllm_dvlm?")
    return {
        "requests/s": load.requests_per_s,
        "images/s": load.requests_per_s * images,
        "tokens/s": load.requests_per_s * sum(each.tokens for each in counts.values()) / requests,
        "kv_blocks/s": load.requests_per_s * sum(each.kv_blocks for each in counts.values()) / requests,
        **latency_columns(load.whole, load.first),
        "good/s": load.good_per_s,
    }


def replica_rows(load: Load, counts: Mapping[str, Counts], images: int) -> list[Row]:
    """Rows of single replicas: rates by their share of the requests, latencies from their own histograms."""
    requests = sum(each.requests for each in counts.values())
    rows = []
    for number, each in enumerate(counts.values()):
        per_s = load.requests_per_s * each.requests / requests
        row: Row = {"replica": str(number), "requests/s": per_s, "images/s": per_s * images}
        for column, amount in (("tokens/s", each.tokens), ("kv_blocks/s", each.kv_blocks)):
            row[column] = load.requests_per_s * amount / requests
        for prefix, buckets in (("", each.e2e), ("first_", each.first)):
            for p in PERCENTILES:
                seconds = bucket_percentile(buckets, p)
                row[f"{prefix}p{p}_ms"] = None if seconds is None else 1000 * seconds
        rows.append(row)
    return rows
