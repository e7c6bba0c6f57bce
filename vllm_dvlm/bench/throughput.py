"""`vllm-dvlm bench throughput`: requests per second in a small KV pool, cache on, against keep ratio (N8)."""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_dvlm.bench.common import progress, report
from vllm_dvlm.bench.pruning_job import Job, key_of, measure, merged
from vllm_dvlm.bench.pruning_job import add_arguments as add_common_arguments
from vllm_dvlm.bench.result import Result

if TYPE_CHECKING:
    from vllm_dvlm.bench.engine_host import Run
    from vllm_dvlm.bench.pruning_host import PruningHost

PARTS = (("vllm_dvlm.bench.throughput", "measure_requests"),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_common_arguments(parser)


def measure_every_second(job: Job) -> Result:
    """In the child: `measure_requests` for every second keep ratio, the mildest, which gains least, among them."""
    return measure_requests(dataclasses.replace(job, keep_ratios=(1.0, *job.pruned_ratios[::2])))


def take_turns(host: "PruningHost", count: int, ratios: Sequence[float]) -> dict[float, list["Run"]]:
    """This many requests at once, cache on, for every keep ratio once per repeat."""
    runs: dict[float, list[Run]] = {keep: [] for keep in ratios}
    # Many requests are a long measurement in themselves.
    repeats = host.job.repeats if count == 1 else max(1, host.job.repeats - 1)
    for repeat in progress(range(1 + repeats), f"{count} at once"):
        for keep in ratios:
            work = [host.request(keep, cached=True)] * count
            if repeat:
                runs[keep].append(host.run(work))
            else:
                host.run(work, max_steps=2)  # buffers of every size are touched once
    return runs


def measure_requests(job: Job) -> Result:
    """In the child: 1, 4 and 16 requests at once, all of them asked for at the start; pruned against unpruned."""
    from vllm_dvlm.bench.pruning_host import PruningHost, median_ratio

    prompts = job.throughput_prompts
    host = PruningHost(job, job.sizes, prompts, max_num_seqs=max(job.concurrency), batched_prompts=prompts)
    result = Result(description=host.describe())
    pool = prompts * host.request_blocks
    ratios = (1.0, *job.pruned_ratios)
    result.description["throughput_pool_kv_blocks"] = pool
    for count in job.concurrency:
        runs = take_turns(host, count, ratios)
        base = [run.wall_s for run in runs[1.0]]
        for keep in ratios:
            walls = [run.wall_s for run in runs[keep]]
            prune = [sum(step.prune_s for step in run.steps) / run.cpu_s for run in runs[keep]]
            cpu = median_ratio([run.cpu_s for run in runs[1.0]], [run.cpu_s for run in runs[keep]])
            line = {
                "concurrent": count,
                "keep": keep,
                "requests_per_s": count / statistics.median(walls),
                "against_unpruned": median_ratio(base, walls),
                "cpu_against_unpruned": cpu,
                "max_in_flight": runs[keep][0].max_running,
                "engine_steps": len(runs[keep][0].steps),
                "prune_%": 100 * statistics.median(prune),
            }
            result.rows.append(line)
            if keep < 1:
                name = f"N8_requests_per_s_{count}_concurrent_{key_of(keep)}_vs_unpruned"
                result.figures[name] = line["against_unpruned"]
                result.figures[f"{name}_cpu_time"] = line["cpu_against_unpruned"]
    pruned = [row["against_unpruned"] for row in result.rows if row["keep"] < 1]
    if pruned:
        result.figures["N8_requests_per_s_lowest_vs_unpruned"] = min(pruned)
    result.description["engine_peak_rss_gib"] = host.describe()["engine_peak_rss_gib"]
    return result


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. ValueError for arguments that cannot be met."""
    job, results = measure(arguments, PARTS)
    rows, figures, description = merged(results)

    def draw(axes: Any) -> None:
        for count in job.concurrency:
            points = [row for row in rows if row["concurrent"] == count]
            label = f"{count} at once"
            axes.plot([p["keep"] for p in points], [p["requests_per_s"] for p in points], marker="o", label=label)
        axes.set(xlabel="keep ratio", ylabel="requests per second", title="Small KV pool, cache on")
        axes.legend()

    report(arguments, rows, figures, description, draw)
    return 0
