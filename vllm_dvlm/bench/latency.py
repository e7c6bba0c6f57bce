"""`vllm-dvlm bench latency`: one request at a time against keep ratio (N5), LLaDA-FastV (N6), cost of pruning (N7)."""

import argparse
import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

from vllm_dvlm.bench.common import Row, progress, report
from vllm_dvlm.bench.counted import LLADA_8B, Generation, ideal_speedup, keep_ratio_for, work_shares
from vllm_dvlm.bench.pruning_job import Job, key_of, measure, merged
from vllm_dvlm.bench.pruning_job import add_arguments as add_common_arguments
from vllm_dvlm.bench.result import Result

if TYPE_CHECKING:
    from vllm_dvlm.bench.engine_host import Run
    from vllm_dvlm.bench.pruning_host import PruningHost

MODULE = "vllm_dvlm.bench.latency"
PARTS = ((MODULE, "measure_steps"), (MODULE, "measure_two_groups"))
REAL_PROMPT, REAL_VISUAL = 3729, 3669  # tokens of a question about one large picture
FASTV_REDUCTION = 0.65  # counted FLOPs that N6 asks to save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_common_arguments(parser)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One kind of request."""

    mode: str  # no cache | cache
    method: str
    keep_ratio: float
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def cached(self) -> bool:
        return self.mode != "no cache"


def generation(host: "PruningHost") -> Generation:
    """The request that is measured, for counting."""
    return Generation(host.prompt_len, host.num_visual, host.job.canvas, host.job.num_steps)


def logits_flops(host: "PruningHost") -> int:
    """Multiply-adds of the vocabulary logits of a run in one block: rows still masked before each step."""
    config = host.runner.model_config.hf_config
    return generation(host).logits_rows * config.hidden_size * config.vocab_size


def fastv_ratio(host: "PruningHost") -> float:
    """Highest keep ratio, in hundredths, at which fastv at half the layers saves FASTV_REDUCTION of the FLOPs."""
    config = host.runner.model_config.hf_config
    return keep_ratio_for(config, generation(host), FASTV_REDUCTION, config.num_hidden_layers // 2)


def counted_at_8b(host: "PruningHost") -> Row:
    """Figures by count at LLaDA-V 8B's sizes and a prompt of real length, and shares of the work there and here."""
    here, layer = generation(host), LLADA_8B.num_hidden_layers // 2
    real = dataclasses.replace(here, prompt_len=REAL_PROMPT, num_visual=REAL_VISUAL)
    figures: Row = {f"N5_ideal_{key_of(keep)}_counted_8b": ideal_speedup(LLADA_8B, real, keep) for keep in (0.5, 0.25)}
    figures["N6_keep_for_65_percent_counted_8b"] = keep_ratio_for(LLADA_8B, real, FASTV_REDUCTION, layer)
    for name, config, work in (("8b", LLADA_8B, real), ("here", host.runner.model_config.hf_config, here)):
        figures |= {f"work_share_{part}_{name}": share for part, share in work_shares(config, work).items()}
        official = work_shares(config, work, every_position=True)
        figures[f"work_share_logits_of_every_position_{name}"] = official["logits"]
    return figures


def take_turns(host: "PruningHost", settings: list[Setting], label: str) -> dict[Setting, list["Run"]]:
    """Every setting once per repeat, in turn, so that all see the same machine."""
    runs: dict[Setting, list[Run]] = {setting: [] for setting in settings}
    work = {s: [host.request(s.keep_ratio, s.cached, s.method, **dict(s.options))] for s in settings}
    for setting in settings:  # buffers of every size are touched once
        host.run(work[setting], max_steps=2)
    for _ in progress(range(host.job.repeats), label):
        for setting in settings:
            runs[setting].append(host.run(work[setting]))
    return runs


def describe_runs(host: "PruningHost", setting: Setting, runs: list["Run"], base: list["Run"]) -> Row:
    """Line of the table: times, ratios against the unpruned runs of the same repeats, and where the time goes."""
    from vllm_dvlm.bench.pruning_host import median_ratio

    walls = [run.wall_s for run in runs]
    flops, base_flops = runs[0].reports[0]["flops"], base[0].reports[0]["flops"]
    with_logits = logits_flops(host)
    ideal = base_flops / flops
    speedup = median_ratio([run.wall_s for run in base], walls)
    forward = median_ratio([run.part_s("forward") for run in base], [run.part_s("forward") for run in runs])

    def percent(part: str) -> float:
        return 100 * statistics.median(run.part_s(part) / run.cpu_s for run in runs)

    return {
        "mode": setting.mode,
        "method": setting.method if setting.keep_ratio < 1 else "none",
        "keep": setting.keep_ratio,
        "visual": runs[0].reports[0]["visual_tokens_after"],
        "median_s": statistics.median(walls),
        "tokens_per_s": host.job.canvas / statistics.median(walls),
        "speedup": speedup,
        "cpu_speedup": median_ratio([run.cpu_s for run in base], [run.cpu_s for run in runs]),
        "ideal": ideal,
        "of_ideal": speedup / ideal,
        "ideal_with_logits": (base_flops + with_logits) / (flops + with_logits),
        "forward_of_ideal": forward / ideal,
        "forward_%": percent("forward"),
        "logits_%": percent("logits"),
        "score_%": percent("score"),
        "complete_%": percent("complete"),
    }


def measure_steps(job: Job) -> Result:
    """In the child: N5, the cached setting beside it, N6 in one KV cache group, N7."""
    from vllm_dvlm.bench.pruning_host import PruningHost

    host = PruningHost(job, job.sizes)
    result = Result(description=host.describe() | {"prompt": host.prompt_len, "visual_tokens": host.num_visual})
    result.figures["image_encoding_s"] = host.encode_s
    result.figures |= counted_at_8b(host)
    ratio = fastv_ratio(host)
    exact = [Setting("no cache", job.method, keep) for keep in job.keep_ratios]
    cached = [Setting("cache", job.method, keep) for keep in job.keep_ratios]
    fastv = [Setting("no cache", "fastv", keep) for keep in sorted({ratio, 0.25}, reverse=True)]
    extra = [setting for setting in fastv if setting not in exact]
    runs = take_turns(host, exact + extra, "no cache") | take_turns(host, cached, "cache")
    base = {"no cache": runs[exact[0]], "cache": runs[cached[0]]}
    rows = {setting: describe_runs(host, setting, its_runs, base[setting.mode]) for setting, its_runs in runs.items()}
    result.rows = list(rows.values())
    for setting in exact[1:]:
        row, key = rows[setting], key_of(setting.keep_ratio)
        result.figures[f"N5_throughput_{key}_vs_unpruned"] = row["speedup"]
        result.figures[f"N5_throughput_{key}_vs_unpruned_cpu_time"] = row["cpu_speedup"]
        result.figures[f"N5_share_of_flop_ideal_{key}"] = row["of_ideal"]
        result.figures[f"N5_share_of_ideal_with_logits_{key}"] = row["speedup"] / row["ideal_with_logits"]
        result.figures[f"N5_share_of_flop_ideal_{key}_cpu_time"] = row["cpu_speedup"] / row["ideal"]
    best = max(rows[setting]["speedup"] for setting in exact)
    result.figures["N5_throughput_gain_percent_best"] = 100 * (best - 1)
    for setting in cached[1:]:
        key = f"N5_cache_and_pruning_{key_of(setting.keep_ratio)}_vs_cache_alone"
        result.figures[key] = rows[setting]["speedup"]
    _fastv_figures(rows[Setting("no cache", "fastv", ratio)], "one_group", result)
    _measure_first_step(host, result)
    result.description["engine_peak_rss_gib"] = host.describe()["engine_peak_rss_gib"]
    return result


def _fastv_figures(row: Row, groups: str, result: Result) -> None:
    """N6: counted FLOPs saved, time saved, and the share of the first that shows in the second."""
    flops_saved, time_saved, cpu_saved = (1 - 1 / row[name] for name in ("ideal", "speedup", "cpu_speedup"))
    result.figures["N6_fastv_keep_ratio"] = row["keep"]
    result.figures["N6_flops_saved_percent"] = 100 * flops_saved
    result.figures[f"N6_time_saved_percent_{groups}"] = 100 * time_saved
    result.figures[f"N6_time_saved_per_flops_saved_{groups}"] = time_saved / flops_saved
    result.figures[f"N6_cpu_time_saved_per_flops_saved_{groups}"] = cpu_saved / flops_saved


def _measure_first_step(host: "PruningHost", result: Result) -> None:
    """N7: the first step alone, cache on so that KV rows move.

    Two views: processor time inside the step (of pruning, against the unpruned step), and wall time of both steps.
    """
    job = host.job
    methods = dict.fromkeys((job.method, "fastv"))
    settings = [Setting("cache", job.method, keep) for keep in job.keep_ratios]
    settings += [Setting("cache", method, 0.25) for method in methods if method != job.method]
    settings.append(Setting("cache", job.method, 0.25, (("prune_positions", "keep"),)))
    work = {s: [host.request(s.keep_ratio, s.cached, s.method, **dict(s.options))] for s in settings}
    walls: dict[Setting, list[float]] = {setting: [] for setting in settings}
    cpus: dict[Setting, list[float]] = {setting: [] for setting in settings}
    inside: dict[Setting, list[tuple[float, float]]] = {setting: [] for setting in settings}
    for repeat in progress(range(3 + job.repeats), "first step"):
        for setting in settings:
            step = host.run(work[setting], max_steps=1).steps[0]
            if repeat:  # the first one warms up
                walls[setting].append(step.wall_s)
                cpus[setting].append(step.cpu_s)
                inside[setting].append((step.parts_s["score"], step.parts_s["complete"]))
    whole = statistics.median(walls[settings[0]])
    for setting in settings[1:]:
        score, complete = (statistics.median(times) for times in zip(*inside[setting], strict=True))
        share = statistics.median(
            sum(parts) / base for parts, base in zip(inside[setting], cpus[settings[0]], strict=True)
        )
        positions = dict(setting.options).get("prune_positions", "renumber")
        result.rows.append(
            {
                "mode": f"first step, {positions}",
                "method": setting.method,
                "keep": setting.keep_ratio,
                "median_s": statistics.median(walls[setting]),
                "unpruned_s": whole,
                "score_ms": 1000 * score,
                "complete_ms": 1000 * complete,
                "prune_cost_%": 100 * share,
                "cpu_against_unpruned_%": 100
                * (statistics.median(cpus[setting]) / statistics.median(cpus[settings[0]]) - 1),
                "step_against_unpruned_%": 100 * (statistics.median(walls[setting]) / whole - 1),
            }
        )
        if setting.method == job.method and not setting.options:
            result.figures[f"N7_prune_cost_percent_of_first_step_{key_of(setting.keep_ratio)}"] = 100 * share


def measure_two_groups(job: Job) -> Result:
    """In the child: N6 where fastv is the server's default and the late layers have a KV cache group of their own."""
    from vllm_dvlm.bench.pruning_host import PruningHost

    host = PruningHost(job, job.sizes, prune_method="fastv")
    result = Result(description=host.describe())
    num_groups = len(host.scheduler.kv_cache_config.kv_cache_groups)
    result.figures["N6_kv_cache_groups"] = num_groups
    keep = fastv_ratio(host)
    base, short = settings = [Setting("no cache", "fastv", 1.0), Setting("no cache", "fastv", keep)]
    runs = take_turns(host, settings, "fastv, two groups")
    row = describe_runs(host, short, runs[short], runs[base]) | {"method": f"fastv, {num_groups} KV groups"}
    result.rows.append(row)
    _fastv_figures(row, "two_groups" if num_groups == 2 else "auto", result)
    # A block of one of two groups holds half the layers, so only bytes compare.
    layer_blocks = num_groups * host.request_blocks
    held = host.scheduler.kv_cache_config.num_blocks - 1 - runs[short][0].steps[0].free_blocks
    result.figures["N6_first_step_kv_share_two_groups"] = held / layer_blocks
    result.figures["N6_first_step_kv_share_one_group"] = 1.0
    return result


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. ValueError for arguments that cannot be met."""
    _, results = measure(arguments, PARTS)
    rows, figures, description = merged(results)

    def draw(axes: Any) -> None:
        for mode in ("no cache", "cache"):
            points = [row for row in rows if row["mode"] == mode and row["method"] in ("none", description["method"])]
            axes.plot([p["keep"] for p in points], [p["speedup"] for p in points], marker="o", label=mode)
            axes.plot([p["keep"] for p in points], [p["ideal"] for p in points], "k:", label=f"counted FLOPs, {mode}")
        axes.set(xlabel="keep ratio", ylabel="throughput against unpruned", title="One request at a time")
        axes.legend()

    report(arguments, rows, figures, description, draw)
    return 0
