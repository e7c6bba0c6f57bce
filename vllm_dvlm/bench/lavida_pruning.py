"""L3 and L4 of `vllm-dvlm bench lavida`: RedVTP with full attention and with the prefix cache.

`measure_pruned` and `measure_pool` run in processes of their own with one engine.
"""

from typing import TYPE_CHECKING

from vllm_dvlm.bench import capacity, latency, throughput
from vllm_dvlm.bench.common import describe_run, peak_rss_bytes
from vllm_dvlm.bench.counted import LLADA_8B, ideal_speedup
from vllm_dvlm.bench.lavida_job import PrunedJob, value_line
from vllm_dvlm.bench.pruning_job import key_of
from vllm_dvlm.bench.result import Result

if TYPE_CHECKING:
    from vllm_dvlm.bench.engine_host import Run
    from vllm_dvlm.bench.pruning_host import PruningHost

# Targets at half the visual tokens: the gain in RedVTP's paper, and the share of what counted FLOPs promise.
GAIN_TARGETS, SHARE_TARGETS = {0.5: 1.28}, {0.5: 0.9}
TOKEN_SHARE_TARGET = 0.95


def _setting(host: "PruningHost", keep_ratio: float, more: str) -> str:
    job = host.job
    shape = f"{job.shape}, image prompt of {host.prompt_len}, canvas {job.canvas}, {job.num_steps} steps"
    return f"{job.method} {keep_ratio:g}, {more}, {shape}"


def _prune_percent(runs: list["Run"]) -> float:
    """Share of the processor time that scores, selects and moves rows."""
    return 100 * sum(step.prune_s for run in runs for step in run.steps) / sum(run.cpu_s for run in runs)


def _times(runs: list["Run"]) -> list[tuple[float, float]]:
    return [(run.wall_s, run.cpu_s) for run in runs]


def measure_pruned(job: PrunedJob) -> Result:
    """In the child: L3 and the requests per second of L4, on one engine with a KV pool of a few unpruned requests."""
    from vllm_dvlm.bench.pruning_host import PruningHost

    prompts, result = job.throughput_prompts, Result()
    host = PruningHost(job, job.sizes, prompts, max_num_seqs=max(job.concurrency), batched_prompts=prompts)
    if "L3" in job.figures:
        measure_full(host, result)
    if "L4" in job.figures:
        measure_requests(host, result)
    described = host.describe()
    shape = ", ".join(f"{key} {described[key]}" for key in ("hidden", "layers", "heads", "intermediate", "vocabulary"))
    result.description = describe_run("float32", job.seed) | {
        "model_pruned": shape,
        "prompt": host.prompt_len,
        "visual_tokens": host.num_visual,
        "kv_block_size": described["kv_block_size"],
    }
    result.peak_rss_bytes = peak_rss_bytes()
    return result


def measure_full(host: "PruningHost", result: Result) -> None:
    """L3: one request at a time, every step recomputes what is left of the sequence."""
    job = host.job
    settings = [latency.Setting("no cache", job.method, keep) for keep in job.keep_ratios]
    runs = latency.take_turns(host, settings, "L3")
    base = runs[settings[0]]
    for setting in settings[1:]:
        keep, pruned = setting.keep_ratio, runs[setting]
        key, words = key_of(keep), _setting(host, keep, "full attention")
        gain = f"L3_throughput_{key}_vs_unpruned"
        result.ratio(gain, words, _times(pruned), _times(base), "unpruned", GAIN_TARGETS.get(keep))
        ideal = base[0].reports[0]["flops"] / pruned[0].reports[0]["flops"]
        result.figures[f"L3_flop_ideal_{key}"] = ideal
        result.figures[f"L3_flop_ideal_{key}_counted_8b"] = ideal_speedup(LLADA_8B, latency.generation(host), keep)
        share = f"L3_share_of_flop_ideal_{key}"
        cpu_share = result.figures[gain + "_cpu_time"] / ideal
        more = words + ", share of the counted ideal"
        value_line(result, share, more, result.figures[gain] / ideal, SHARE_TARGETS.get(keep), cpu_time=cpu_share)
        result.figures[share + "_cpu_time"] = cpu_share
        result.figures[f"L3_prune_cost_percent_{key}"] = _prune_percent(pruned)


def measure_requests(host: "PruningHost", result: Result) -> None:
    """L4: requests per second in a pool of a few unpruned requests, prefix cache with and without pruning."""
    job = host.job
    blocks = job.throughput_prompts * host.request_blocks
    for count in job.concurrency:
        runs = throughput.take_turns(host, count, job.keep_ratios)
        base = runs[1.0]
        for keep in job.pruned_ratios:
            pruned = runs[keep]
            result.ratio(
                f"L4_requests_per_s_{count}_at_once_{key_of(keep)}_vs_prefix_alone",
                _setting(host, keep, f"{count} at once, prefix, pool of {blocks} KV blocks"),
                _times(pruned),
                _times(base),
                "prefix cache alone",
                1.0,
                in_flight=f"{pruned[0].max_running} / {base[0].max_running}",
            )
            result.figures[f"L4_prune_cost_percent_{count}_at_once_{key_of(keep)}"] = _prune_percent(pruned)
    lowest = min(value for name, value in result.figures.items() if name.endswith("_vs_prefix_alone"))
    result.figures["L4_requests_per_s_lowest_vs_prefix_alone"] = lowest


def measure_pool(job: PrunedJob) -> Result:
    """In the child: L4, requests in flight in a full pool, against what the tokens they hold would allow."""
    measured, result = capacity.measure_capacity(job), Result()
    pool = measured.description["capacity_pool_kv_blocks"]
    for row in measured.rows:
        keep = row["keep"]
        result.figures[f"L4_in_flight_{key_of(keep)}"] = row["in_flight"]
        if keep == 1:
            continue
        # The pool is made of whole KV blocks, and a request needs its unpruned length for a moment.
        words = f"{job.method} {keep:g}, prefix, pool of {pool} KV blocks"
        times, name = (
            f"L4_in_flight_{key_of(keep)}_vs_prefix_alone",
            f"L4_in_flight_share_of_token_ratio_{key_of(keep)}",
        )
        held = f"{row['in_flight']} / {measured.rows[0]['in_flight']}"
        value_line(result, times, words + ", times the requests", row["against_unpruned"], None, in_flight=held)
        value_line(result, name, words + ", share of the token ratio", row["share"], TOKEN_SHARE_TARGET)
        result.figures[f"L4_in_flight_possible_{key_of(keep)}"] = row["possible"]
    result.peak_rss_bytes = peak_rss_bytes()
    return result
