"""Rows, figures and drawing of `bench scale`. Imports no Ray and no vLLM."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_dvlm.bench.common import Row
from vllm_dvlm.bench.scale_batch import Batch, times_one
from vllm_dvlm.bench.scale_check import Measured as RouterTimes
from vllm_dvlm.bench.scale_check import compare
from vllm_dvlm.bench.scale_measure import Measured, Point
from vllm_dvlm.bench.scale_numbers import latency_columns, replica_rows, total_row
from vllm_dvlm.bench.scale_plan import Plan
from vllm_dvlm.bench.scale_simulation import Load, Played, Service, System, play, scaled

REQUESTS_PER_CLIENT = 16  # of a simulation


def _head(kind: str, replicas: int, ranks: int, setting: str, replica: str = "all") -> Row:
    return {"kind": kind, "replicas": replicas, "tp": ranks, "setting": setting, "replica": replica}


def point_rows(point: Point, images: int, one_per_s: float) -> list[Row]:
    """A configuration in total and, of several replicas, each. one_per_s: requests per second of one replica."""
    kind = "served" if point.replicas else "engine"
    name = (kind, max(1, point.replicas), point.ranks, point.setting.name)
    about: Row = {
        "efficiency": scaled(point.load.requests_per_s, point.replicas, one_per_s) if point.replicas else None,
        "start_up_s": point.start_up,
        "cpu_ms": None if point.cpu_s is None else 1000 * point.cpu_s,
        "load": point.load_average,
        "busy": "*" if point.busy else "no",
    }
    rows = [_head(*name) | total_row(point.load, point.counts, images) | about]
    if point.replicas > 1:
        rows += [_head(*name, each["replica"]) | each for each in replica_rows(point.load, point.counts, images)]
    return rows


def measured_rows(found: Measured, images: int) -> list[Row]:
    """Of every configuration; one replica's come first."""
    rows: list[Row] = []
    for each in found.alone.values():
        one = each.served.load.requests_per_s
        rows += point_rows(each.plain, images, one) + point_rows(each.served, images, one)
    for point in found.several:
        one = found.alone[point.ranks, point.setting.name].served.load.requests_per_s
        rows += point_rows(point, images, one)
    return rows


def batch_rows(batches: Sequence[Batch], images: int) -> list[Row]:
    """Files of rows, answered by one engine and by several. requests/s: rows per second, median of the turns."""
    return [
        _head("batch", batch.replicas, batch.ranks, batch.setting.name)
        | {
            "requests/s": batch.rate,
            "images/s": batch.rate * images,
            "efficiency": times_one(batches, batch) / batch.replicas,
            "load": batch.load_average,
            "busy": "*" if batch.busy else "no",
        }
        for batch in batches
    ]


def good_share(played: Played, bounds: Mapping[str, float]) -> float:
    """Share of the simulated requests within all bounds, which are in milliseconds."""
    seconds = {"e2el": played.latencies, "ttft": played.to_first}
    good = [
        all(1000 * seconds[name][i] <= bound for name, bound in bounds.items()) for i in range(len(played.latencies))
    ]
    return sum(good) / len(good)


def simulated_rows(plan: Plan, found: Measured, router: RouterTimes) -> list[Row]:
    """Replicas beyond the machine. What a request commits and gives back is that of one replica."""
    rows = []
    for (ranks, name), each in found.alone.items():
        service = Service(each.service.pairs)
        base = total_row(each.served.load, each.served.counts, plan.client.images)
        one = None
        for replicas in sorted({1, *plan.simulate}):
            system = System(replicas, plan.engine.slots, service, router.router, plan.limit, found.start_ups)
            clients = replicas * plan.per_replica
            # Start-up apart: replicas that come one by one are no steady load.
            steady = System(replicas, plan.engine.slots, service, router.router, plan.limit)
            played = play(steady, Load(REQUESTS_PER_CLIENT * clients, clients))
            per_s = played.requests_per_s
            one = one or per_s
            if replicas not in plan.simulate:
                continue
            row = _head("simulated", replicas, ranks, name) | {"requests/s": per_s}
            for column in ("images/s", "tokens/s", "kv_blocks/s"):
                row[column] = per_s * base[column] / base["requests/s"]
            row |= latency_columns(played.latencies, played.to_first)
            row["good/s"] = per_s * good_share(played, plan.bounds) if plan.bounds else None
            row["efficiency"] = scaled(per_s, replicas, one)
            row["start_up_s"] = play(system, Load(1, 1)).ready
            rows.append(row)
    return rows


def compared(plan: Plan, found: Measured, router: RouterTimes) -> list[Row]:
    """The simulation beside real engines; several of them share the cores of a host without GPUs."""
    rows = []
    points = [each.served for each in found.alone.values()] + found.several
    for point in points:
        service = Service(found.alone[point.ranks, point.setting.name].service.pairs)
        system = System(point.replicas, plan.engine.slots, service, router.router, plan.limit)
        # Repeated runs are joined: a run is that many requests.
        num, clients = point.replicas * plan.num, point.replicas * plan.per_replica
        about = {"engines": f"{point.setting.name}, tp {point.ranks}", "replicas": point.replicas, "stretch": None}
        rows.append(about | compare(point.load, system, num, clients))
    return rows


def figures_of(found: Measured, checks: Sequence[Row], batches: Sequence[Batch] = ()) -> Row:
    """S1: scaling efficiency. S2: router overhead, median of the pairs; a batch's rows per second, times those of one
    engine. S5: simulation against sleeping engines behind the real router, and against real engines."""
    figures: Row = {}
    for point in found.several:
        one = found.alone[point.ranks, point.setting.name].served.load.requests_per_s
        key = f"S1_{point.setting.name}_tp{point.ranks}_efficiency_{point.replicas}_replicas"
        figures[key] = scaled(point.load.requests_per_s, point.replicas, one)
    for batch in batches:
        if batch.replicas > 1:
            key = f"S2_batch_{batch.setting.name}_tp{batch.ranks}_{batch.replicas}_replicas_times_one"
            figures[key] = times_one(batches, batch)
    for (ranks, name), each in found.alone.items():
        figures[f"S2_{name}_tp{ranks}_router_overhead"] = statistics.median(each.overheads)
        figures[f"S2_{name}_tp{ranks}_router_overhead_min"] = min(each.overheads)
        figures[f"S2_{name}_tp{ranks}_router_overhead_max"] = max(each.overheads)
    for row in checks:
        key = "sleeping" if row["engines"] == "sleep" else row["engines"].replace(", tp ", "_tp")
        figures[f"S5_{key}_{row['replicas']}_replicas_throughput_off"] = row["off"]
        figures[f"S5_{key}_{row['replicas']}_replicas_p95_off"] = row["p95_off"]
        if "overhead" in row:
            figures[f"S2_{key}_{row['replicas']}_replicas_router_overhead"] = row["overhead"]
    return figures


def draw(axes: Sequence[Any], rows: Sequence[Row]) -> None:
    """Requests per second and p95 over replicas, a colour per setting and tp: served, simulated, in a batch."""
    totals = [row for row in rows if row["replica"] == "all" and row["kind"] != "engine"]
    for panel, column in zip(axes, ("requests/s", "p95_ms"), strict=True):
        for number, key in enumerate(dict.fromkeys((row["setting"], row["tp"]) for row in totals)):
            for kind, style in (("served", "o-"), ("simulated", "x--"), ("batch", "s:")):
                points = [row for row in totals if (row["setting"], row["tp"]) == key and row["kind"] == kind]
                points = [row for row in points if column in row]  # a batch has no latencies
                label = f"{key[0]}, tp {key[1]}" if kind == "served" else None
                x, y = [row["replicas"] for row in points], [row[column] for row in points]
                panel.plot(x, y, style, color=f"C{number % 10}", label=label, markersize=4, linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set(xlabel="replicas (dashed: simulated, dotted: batch)", ylabel=column, ylim=(0, None))
    axes[0].legend(fontsize=6)
