"""`vllm-dvlm bench stream`: what it costs to show the canvas while it fills (C1).

One server; vLLM's own client streams the same requests with committed text alone and with snapshots, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from vllm_dvlm.bench.common import Row, add_output_arguments, describe_run, progress_bar, report
from vllm_dvlm.bench.scale_numbers import percentile
from vllm_dvlm.bench.scale_plan import DEMO_KV_BYTES, image_size, num_gpus
from vllm_dvlm.bench.scale_run import Client, free_port, is_busy, running
from vllm_dvlm.bench.serving_load import MODEL_NAME, VLLM

WAYS: dict[str, dict[str, Any]] = {
    "committed": {},
    "provisional": {"diffusion_stream": "provisional"},
    "provisional, every 4th": {"diffusion_stream": "provisional", "diffusion_stream_every": 4},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; all others are those of `vllm serve`."""
    add_output_arguments(parser)
    parser.add_argument("--model", help="checkpoint folder or hub name (default: the demo model)")
    parser.add_argument("--concurrency", type=int, default=8, help="streams at once (default 8)")
    parser.add_argument("--num", type=int, default=64, help="requests of a run (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way, in turns (default 5)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of an answer, its canvas (default 64)")
    parser.add_argument("--block-length", type=int, help="tokens committed together (default: half of the canvas)")
    parser.add_argument("--image", default="168x168", metavar="HxW", help="size of a random picture (default 168x168)")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. ValueError for arguments that cannot be met, RuntimeError if a request fails."""
    from vllm_dvlm.bench.question_job import model_of

    least = ("concurrency", "num", "rounds", "output_len")
    if wrong := [f"--{name.replace('_', '-')}" for name in least if getattr(arguments, name) < 1]:
        raise ValueError(f"{', '.join(wrong)} must be at least 1")
    canvas = arguments.output_len
    block = arguments.block_length or max(1, canvas // 2)
    if canvas % block:
        raise ValueError(f"--block-length {block} must divide --output-len {canvas}")
    model, gpus = model_of(arguments.model), num_gpus()
    options = list(arguments.rest)
    if not gpus and not any(word.startswith("--kv-cache-memory-bytes") for word in options):
        options += ["--kv-cache-memory-bytes", str(DEMO_KV_BYTES)]
    client = Client(model, 16, canvas, 1, image_size(arguments.image), (), arguments.seed)
    common = {"diffusion_canvas_length": canvas, "diffusion_block_length": block, "diffusion_max_steps": canvas}
    per_s: dict[str, list[float]] = {name: [] for name in WAYS}
    whole: dict[str, list[float]] = {name: [] for name in WAYS}
    busy = False
    port = free_port()
    command = [str(VLLM), "serve", model, "--host", "127.0.0.1", "--port", str(port), *options]
    command += ["--served-model-name", MODEL_NAME, "--max-num-seqs", str(arguments.concurrency)]
    # Without a GPU the engine has a core, and web server and client the others, as they do beside a GPU.
    environment = {} if gpus else {"VLLM_CPU_OMP_THREADS_BIND": "0", "OMP_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryDirectory(prefix="vllm-dvlm-bench-") as folder,
        running(command, port, Path(folder) / "server.log", 1, **environment),
        progress_bar("runs", arguments.rounds * len(WAYS)) as bar,
    ):
        for _ in range(arguments.rounds):
            for name, own in WAYS.items():
                busy |= is_busy()
                load = client.run(port, arguments.num, arguments.concurrency, common | own)
                per_s[name].append(load.requests_per_s)
                whole[name] += load.whole
                bar.update()
    rows = [_row(name, per_s, whole) for name in WAYS]
    figures: Row = {f"C1_{row['stream'].replace(', ', '_').replace(' ', '_')}_cost": row["cost"] for row in rows[1:]}
    about = {"canvas": canvas, "block": block, "at_once": arguments.concurrency, "rounds": arguments.rounds}
    report(
        arguments,
        rows,
        figures,
        describe_run("checkpoint", arguments.seed, busy="yes" if busy else "no", **about),
        lambda axes: _draw(axes, per_s),
    )
    return 0


def _row(name: str, per_s: dict[str, list[float]], whole: dict[str, list[float]]) -> Row:
    """cost: share of throughput lost against committed text in the same turn, median of the turns."""
    costs = [1 - own / plain for own, plain in zip(per_s[name], per_s["committed"], strict=True)]
    return {
        "stream": name,
        "requests/s": statistics.median(per_s[name]),
        "p50_ms": 1000 * percentile(whole[name], 50),
        "p95_ms": 1000 * percentile(whole[name], 95),
        "cost": statistics.median(costs),
        "cost_min": min(costs),
        "cost_max": max(costs),
    }


def _draw(axes: Any, per_s: dict[str, list[float]]) -> None:
    axes.boxplot(list(per_s.values()), tick_labels=list(per_s))
    axes.set(ylabel="requests/s", ylim=(0, None))
