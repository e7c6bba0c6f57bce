"""`vllm-dvlm bench frontier`: quality against throughput, in one table and one plot.

One engine with a small KV pool, as on a device whose memory is the limit. The questions are cut into parts; of every
part each setting gets all questions at once (saturation) and a few one at a time, before the next part begins. So
quality and speed come from the same answers, and a slow minute of the machine meets all settings alike. Ratios are
taken within a part; the table has their median and, for the first, their range.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_dvlm.bench import child, settings_grid
from vllm_dvlm.bench.common import Row, progress_bar, report
from vllm_dvlm.bench.quality import PARTS_OF_NAME, Scored, load, write_answers
from vllm_dvlm.bench.question_job import Job, job_of
from vllm_dvlm.bench.question_job import add_arguments as add_common_arguments
from vllm_dvlm.bench.result import Result
from vllm_dvlm.bench.settings_grid import Setting

SHOWN = ("exact_match", "x_exact", "x_cache")  # figures that are printed
MARKERS = "osD^vPX*<>ph"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_common_arguments(parser)
    parser.add_argument("--pool-prompts", type=int, default=4, help="KV pool in unpruned requests (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="parts that the questions are cut into (default 5)")
    parser.add_argument("--alone", type=int, default=16, help="questions of each part asked one at a time (default 16)")
    parser.add_argument(
        "--serve",
        type=int,
        metavar="NUM",
        help="also start `vllm serve` and send NUM requests per setting with vLLM's own `vllm bench serve`",
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """Times of one setting on one part of the questions, in seconds per answer.

    cpu_s: processor time of all threads; beside other work on the machine it says more than the wall time.
    """

    wall_s: float
    cpu_s: float
    alone_s: float
    alone_cpu_s: float
    max_running: int


def ratios(base: Sequence[Part], parts: Sequence[Part], field: str) -> list[float]:
    """How many times faster than the base, part by part."""
    return [getattr(b, field) / getattr(p, field) for b, p in zip(base, parts, strict=True)]


def median_or_none(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def speed_row(parts: Sequence[Part], exact: Sequence[Part], cache: Sequence[Part]) -> Row:
    """Columns of speed; `exact` and `cache` are the unpruned baselines, `cache` empty if it was not measured.

    answers/s: at saturation; x_exact, x_cache: that over the baselines'; alone_ms: engine time of one answer, one
    request at a time; alone_x_...: how many times faster than the baselines'.
    """
    against_exact = ratios(exact, parts, "wall_s")
    row: Row = {
        "answers/s": statistics.median(1 / part.wall_s for part in parts),
        "x_exact": statistics.median(against_exact),
        "x_min": min(against_exact),
        "x_max": max(against_exact),
        "x_cache": median_or_none(ratios(cache, parts, "wall_s") if cache else []),
        "in_flight": max(part.max_running for part in parts),
        "alone_ms": statistics.median(1000 * part.alone_s for part in parts),
        "alone_x_exact": statistics.median(ratios(exact, parts, "alone_s")),
        "alone_x_cache": median_or_none(ratios(cache, parts, "alone_s") if cache else []),
        "cpu_x_exact": statistics.median(ratios(exact, parts, "cpu_s")),
        "alone_cpu_x_exact": statistics.median(ratios(exact, parts, "alone_cpu_s")),
    }
    return row


def mark_front(rows: Sequence[Row]) -> None:
    """Column `front`: "*" where no other setting has both more answers per second and a better exact match."""
    for row in rows:
        beaten = any(
            other["answers/s"] >= row["answers/s"]
            and other["exact"] >= row["exact"]
            and (other["answers/s"], other["exact"]) != (row["answers/s"], row["exact"])
            for other in rows
        )
        row["front"] = "" if beaten else "*"


def measure_frontier(job: Job) -> Result:
    """In the child: all settings in turn, part by part."""
    items, about = load(job)
    if len(items) < job.repeats:
        raise ValueError(f"{len(items)} questions cannot be cut into {job.repeats} parts; lower --repeats.")
    from vllm_dvlm.bench.question_host import Answer, QuestionHost

    host = QuestionHost(job, items)
    edges = [len(items) * part // job.repeats for part in range(job.repeats + 1)]
    said: dict[Setting, list[Answer]] = {setting: [] for setting in job.settings}
    times: dict[Setting, list[Part]] = {setting: [] for setting in job.settings}
    num_alone = sum(min(job.alone, end - begin) for begin, end in zip(edges, edges[1:], strict=False))
    with progress_bar("answers", len(job.settings) * (len(items) + num_alone)) as bar:
        for setting in job.settings:  # buffers of every size are touched once
            host.ask(items[: job.batch], setting, job.seed)
        for begin, end in zip(edges, edges[1:], strict=False):
            for setting in job.settings:
                part, seed = items[begin:end], job.seed + begin
                asked = host.ask(part, setting, seed, on_answer=bar.update)
                few = host.ask(part[: job.alone], setting, seed, at_once=1, on_answer=bar.update)
                said[setting] += asked.answers
                num, num_few = len(part), len(few.answers)
                times[setting].append(
                    Part(
                        asked.wall_s / num, asked.cpu_s / num, few.wall_s / num_few, few.cpu_s / num_few,
                        asked.max_running,
                    )
                )  # fmt: skip
    if job.answers:
        write_answers(Path(job.answers), items, said)
    result = Result(description=host.describe() | about | {"repeats": job.repeats, "alone": job.alone})
    base = job.settings[0]
    cache = cache_baseline(job.settings)
    for setting in job.settings:
        scored = Scored(setting, items, said[setting], said[base])
        quality = scored.row()
        names = ("setting", *PARTS_OF_NAME, "exact", "low", "high", "relative", "flops")
        row = {name: quality[name] for name in names}
        result.rows.append(row | speed_row(times[setting], times[base], times[cache] if cache else []))
    mark_front(result.rows)
    return result


def cache_baseline(settings: Sequence[Setting]) -> Setting | None:
    """Unpruned, with the longest refresh interval and a fixed number of steps; None where that is the base itself."""
    found = Setting(settings_grid.cached_mode(settings))
    return found if found != settings[0] and found in settings else None


def figures_of(rows: Sequence[Row]) -> Row:
    """Flat figures: F_redvtp_25_exact_match, F_redvtp_25_x_exact, F_redvtp_25_x_cache, ..."""
    figures: Row = {}
    renamed = {"exact": "exact_match", "answers/s": "answers_per_s", "served/s": "served_per_s"}
    left_out = {"setting", "front", *PARTS_OF_NAME}
    for row in rows:
        for name, value in row.items():
            if name not in left_out:
                figures[f"F_{row['setting']}_{renamed.get(name, name)}"] = value
    return figures


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. ValueError for arguments that cannot be met or a file without a good row."""
    wrong = [name for name in ("pool_prompts", "repeats", "alone") if getattr(arguments, name) < 1]
    if wrong or (arguments.serve is not None and arguments.serve < 1):
        raise ValueError("--pool-prompts, --repeats, --alone and --serve must be at least 1.")
    job = job_of(
        arguments,
        settings_grid.frontier_default,
        with_cache=True,
        pool_prompts=arguments.pool_prompts,
        repeats=arguments.repeats,
        alone=arguments.alone,
    )
    if arguments.list_settings:
        return 0
    result = child.run(__name__, "measure_frontier", job)
    rows, description = result.rows, result.description | {"threshold": arguments.threshold}
    if arguments.serve is not None:
        from vllm_dvlm.bench import serving_load

        served = serving_load.measure(job, arguments.serve, description)
        rows = [row | served[row["setting"]] for row in rows]
        description |= {"served_requests": arguments.serve, "served_at_once": job.batch}
    figures = figures_of(rows)
    hidden = (*PARTS_OF_NAME, "cpu_x_exact", "alone_cpu_x_exact")
    shown = {key: value for key, value in figures.items() if key.endswith(SHOWN) and "cpu" not in key}
    shown = {key: value for key, value in shown.items() if "alone" not in key}
    report(
        arguments,
        rows,
        shown,
        description,
        lambda axes: _draw(axes, rows),
        csv_columns=hidden,
        json_only=figures,
        panels=2,
    )
    return 0


def _draw(axes: Sequence[Any], rows: Sequence[Row]) -> None:
    """Exact match over answers per second, at saturation and one request at a time.

    A marker per method, a colour per mode, a line along the keep ratios of both.
    """
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    pruners = list(dict.fromkeys(_pruner(row) for row in rows))
    for panel, alone in zip(axes, (False, True), strict=True):
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            groups.setdefault((row["mode"], _pruner(row)), []).append(row)
        for (mode, pruner), points in groups.items():
            x = [speed(row, alone) for row in points]
            style = {"color": f"C{modes.index(mode) % 10}", "marker": MARKERS[pruners.index(pruner) % len(MARKERS)]}
            below = [row["exact"] - row["low"] for row in points]
            above = [row["high"] - row["exact"] for row in points]
            label = f"{pruner}, {mode}"
            panel.errorbar(x, [row["exact"] for row in points], [below, above], label=label, linewidth=1, **style)
            for start in groups.get((mode, "unpruned"), []):  # keep ratio 1 of every line
                line = (start, points[0])
                speeds = [speed(row, alone) for row in line]
                panel.plot(speeds, [row["exact"] for row in line], color=style["color"], linewidth=0.5)
            for at, row in zip(x, points, strict=True):
                if row["keep"] < 1:
                    offset = {"textcoords": "offset points", "xytext": (3, 3), "fontsize": 6}
                    panel.annotate(f"{row['keep']:g}", (at, row["exact"]), **offset)
        title = "one request at a time" if alone else "many requests, small KV pool"
        panel.set(xlabel="answers per second", ylabel="exact match", title=title, xlim=(0, None), ylim=(0, 1.03))
    axes[0].legend(fontsize=6, ncols=2)


def speed(row: Row, alone: bool) -> float:
    """Answers per second, at saturation or one request at a time."""
    return 1000 / row["alone_ms"] if alone else row["answers/s"]


def _pruner(row: Row) -> str:
    name = "unpruned" if row["method"] == "none" else row["method"]
    name += "" if row["layer"] is None else f" L{row['layer']}"
    return name + (", kept positions" if row["positions"] == "keep" else "")
