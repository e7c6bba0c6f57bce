"""`vllm-dvlm bench capacity`: requests in flight and free KV blocks in a fixed KV pool against keep ratio (N8).

Counts, not times: they depend on lengths and pool alone, so a narrow model with prompts of the real length will do.
"""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from vllm_dvlm.bench.common import Row, progress, report
from vllm_dvlm.bench.pruning_job import CAPACITY_SIZES, Job, key_of, measure
from vllm_dvlm.bench.pruning_job import add_arguments as add_common_arguments
from vllm_dvlm.bench.result import Result

if TYPE_CHECKING:
    from vllm_dvlm.bench.engine_host import Step

PARTS = (("vllm_dvlm.bench.capacity", "measure_capacity"),)
MAX_NUM_SEQS = 256
SETTLED = 4  # engine steps without one more request in flight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_common_arguments(parser)


def most_in_flight(pool_blocks: int, whole_blocks: int, short_blocks: int) -> int:
    """Requests that a pool can hold at once if each needs its whole length in its first step and less afterwards."""
    if pool_blocks < whole_blocks:
        return 0
    return (pool_blocks - whole_blocks) // short_blocks + 1


def _settled(steps: list["Step"]) -> bool:
    return len(steps) > SETTLED and steps[-1].num_running == steps[-1 - SETTLED].num_running


def measure_capacity(job: Job) -> Result:
    """In the child: more requests than fit, until no further one gets in; then a fixed number of them."""
    from vllm_dvlm.bench.pruning_host import PruningHost

    if not job.quick:
        job = dataclasses.replace(job, image=job.real_image)  # prompts of the real length, whatever is timed
    prompts = job.pool_prompts
    host = PruningHost(
        job, CAPACITY_SIZES, prompts, max_num_seqs=MAX_NUM_SEQS, batched_prompts=prompts, max_canvas_length=64
    )
    pool, whole = prompts * host.request_blocks, host.request_blocks
    few = max(1, prompts // 4)
    description = host.describe()
    for name in ("hidden", "layers", "heads", "intermediate", "vocabulary", "image"):
        description[f"capacity_{name}"] = description.pop(name)
    result = Result(description=description | {"capacity_pool_kv_blocks": pool, "capacity_steps": job.canvas})
    # As many steps as the canvas has positions: the first requests must live until the last one gets in.
    options = {"diffusion_max_steps": job.canvas}
    unpruned = 0
    for keep in progress(job.keep_ratios, "in flight"):
        short = host.kv_blocks(keep)
        bound = most_in_flight(pool, whole, short)
        work = [host.request(keep, cached=True, **options)] * min(MAX_NUM_SEQS, bound + 2)
        full = host.run(work, until=_settled)
        steady = host.run(work[:few], max_steps=2)
        unpruned = unpruned or full.max_running
        tokens = host.request_len(1.0) / host.request_len(keep)
        line = {
            "keep": keep,
            "tokens_held": host.request_len(keep),
            "kv_blocks_held": short,
            "in_flight": full.max_running,
            "possible": bound,
            "against_unpruned": full.max_running / unpruned,
            "tokens_before/after": tokens,
            "share": full.max_running / unpruned / tokens,
            "engine_steps_to_fill": next(
                i for i, step in enumerate(full.steps, 1) if step.num_running == full.max_running
            ),
            f"free_blocks_first_step_{few}_requests": steady.steps[0].free_blocks,
            f"free_blocks_{few}_requests": steady.steps[0].free_after,
        }
        result.rows.append(line)
        if keep < 1:
            result.figures[f"N8_in_flight_{key_of(keep)}_vs_unpruned"] = line["against_unpruned"]
            result.figures[f"N8_in_flight_share_of_token_ratio_{key_of(keep)}"] = line["share"]
        result.figures[f"N8_free_kv_blocks_{few}_requests_{key_of(keep)}"] = steady.steps[0].free_after
    result.description["free_blocks_with_requests"] = few
    result.description["engine_peak_rss_gib"] = host.describe()["engine_peak_rss_gib"]
    return result


def free_blocks(row: Row, description: Row) -> int:
    """Free KV blocks of a line, while the fixed number of requests is in flight."""
    return row[f"free_blocks_{description['free_blocks_with_requests']}_requests"]


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. ValueError for arguments that cannot be met."""
    _, (result,) = measure(arguments, PARTS)
    rows, description = result.rows, result.description

    def draw(axes: Any) -> None:
        keep = [row["keep"] for row in rows]
        axes.plot(keep, [row["in_flight"] for row in rows], marker="o", label="requests in flight, full pool")
        axes.set(xlabel="keep ratio", ylabel="requests", title="A fixed KV pool, cache on")
        other = axes.twinx()
        label = f"free KV blocks, {description['free_blocks_with_requests']} requests"
        other.plot(keep, [free_blocks(row, description) for row in rows], "C1s--", label=label)
        other.set_ylabel("KV blocks")
        axes.legend([*axes.lines, *other.lines], [line.get_label() for line in (*axes.lines, *other.lines)])

    report(arguments, rows, result.figures, description, draw)
    return 0
