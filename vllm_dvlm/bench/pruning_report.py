"""`vllm-dvlm bench pruning`: N5, N6, N7 and N8 in one run, one table and one plot over the keep ratio."""

import argparse
from typing import Any

from vllm_dvlm.bench import capacity, latency
from vllm_dvlm.bench.common import Row, report
from vllm_dvlm.bench.pruning_job import Job, measure, merged
from vllm_dvlm.bench.pruning_job import add_arguments as add_common_arguments
from vllm_dvlm.bench.result import Result

PARTS = (*latency.PARTS, ("vllm_dvlm.bench.throughput", "measure_every_second"), *capacity.PARTS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_common_arguments(parser)


def table(job: Job, steps: Result, two_groups: Result, requests: Result, pool: Result) -> list[Row]:
    """One line per keep ratio, from the lines of the parts; ratios are against unpruned in the same setting."""

    def lines(mode: str, *methods: str) -> dict[float, Row]:
        return {row["keep"]: row for row in steps.rows if row["mode"] == mode and row["method"] in methods}

    exact, cached = lines("no cache", "none", job.method), lines("cache", "none", job.method)
    fastv, first = lines("no cache", "fastv"), lines("first step, renumber", job.method)
    grouped = {row["keep"]: row for row in two_groups.rows}
    counts = {row["keep"]: row for row in pool.rows}
    rates = {(row["concurrent"], row["keep"]): row for row in requests.rows}
    rows: list[Row] = []
    for keep in sorted({*exact, *fastv}, reverse=True):
        row: Row = {"keep": keep}
        if keep in exact:
            row |= {
                "visual": exact[keep]["visual"],
                "tok/s": exact[keep]["tokens_per_s"],
                "N5 x": exact[keep]["speedup"],
                "ideal": exact[keep]["ideal"],
                "of_ideal": exact[keep]["of_ideal"],
                "cache tok/s": cached[keep]["tokens_per_s"],
                "cache x": cached[keep]["speedup"],
                "N7 %": first[keep]["prune_cost_%"] if keep in first else None,
            }
        for name, found in (("", fastv), (" 2gr", grouped)):
            if keep in found and keep < 1:
                if not name:
                    row["N6 FLOPs -%"] = 100 * (1 - 1 / found[keep]["ideal"])
                row[f"N6 time -%{name}"] = 100 * (1 - 1 / found[keep]["speedup"])
        if keep in counts:
            row |= {
                "N8 in flight": counts[keep]["in_flight"],
                "N8 x": counts[keep]["against_unpruned"],
                "tokens x": counts[keep]["tokens_before/after"],
                "free blocks": capacity.free_blocks(counts[keep], pool.description),
            }
        for count in job.concurrency:
            if (count, keep) in rates:
                row[f"req/s x{count}"] = rates[count, keep]["against_unpruned"]
        rows.append(row)
    order = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    names = [*[n for n in order if not n.startswith("N6")], *[n for n in order if n.startswith("N6")]]
    return [{name: row.get(name) for name in names} for row in rows]


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. ValueError for arguments that cannot be met."""
    job, results = measure(arguments, PARTS)
    rows = table(job, *results)
    details, figures, description = merged(results)

    def draw(axes: Any) -> None:
        points = [row for row in rows if row["N5 x"] is not None]
        keep = [row["keep"] for row in points]
        axes.plot(keep, [row["N5 x"] for row in points], "C0o-", label="throughput, no cache")
        axes.plot(keep, [row["ideal"] for row in points], "C0:", label="throughput by counted FLOPs, no cache")
        axes.plot(keep, [row["cache x"] for row in points], "C2o-", label="throughput, cache + pruning / cache alone")
        axes.set(xlabel="share of visual tokens kept", ylabel="times unpruned", xlim=(1.03, 0), ylim=(0, None))
        other = axes.twinx()
        few = description["free_blocks_with_requests"]
        label = f"free KV blocks, {few} requests in flight"
        other.plot(keep, [row["free blocks"] for row in points], "C1s--", label=label)
        other.set(ylabel=f"KV blocks of {description['capacity_pool_kv_blocks']}", ylim=(0, None))
        lines = [*axes.lines, *other.lines]
        axes.legend(lines, [line.get_label() for line in lines], loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    report(arguments, rows, figures, description, draw, csv_only=details)
    return 0
