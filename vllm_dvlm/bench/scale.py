"""`vllm-dvlm bench scale`: throughput of replicas behind Ray Serve, measured on this machine and simulated beyond it.

For every tensor-parallel size one engine is measured without and with the router, in turns, then each number of
replicas, all of them saturated by vLLM's own client. `--batch` times a file of rows on one engine and on several.
`--simulate` plays more replicas from what was measured, and holds the simulation against the real router with engines
that sleep the measured times, and against the real engines.
"""

import argparse
import os
import sys
from typing import Any

from vllm_dvlm.bench.common import add_output_arguments, describe_run, format_table, progress_bar, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; all others are those of `vllm serve`."""
    add_output_arguments(parser)
    parser.add_argument("--model", help="checkpoint folder or hub name (default: the demo model)")
    parser.add_argument("--replicas", metavar="N,N", help="1 is always measured (default: 1 and what the machine has)")
    parser.add_argument("--tp", default="1", metavar="N,N", help="tensor-parallel sizes of a replica (default 1)")
    parser.add_argument("--simulate", metavar="N,N", help="simulate so many replicas; needs SimPy")
    text = "with --simulate: replicas with sleeping engines that the simulation is held against (default 1,2,8)"
    parser.add_argument("--check", default="1,2,8", metavar="N,N", help=text)
    parser.add_argument("--no-check", action="store_true", help="with --simulate: leave that out")
    parser.add_argument("--settings", nargs="+", metavar="PATTERN", help='such as "refresh32_*"')
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[0.5, 0.25], help="of redvtp")
    parser.add_argument("--refresh", type=int, default=32, help="refresh interval of the cached settings")
    parser.add_argument("--max-num-seqs", type=int, default=8, help="requests that an engine computes (default 8)")
    parser.add_argument("--concurrency-per-replica", type=int, help="requests at once (default: twice --max-num-seqs)")
    parser.add_argument("--num", type=int, default=200, help="requests per replica and run (default 200)")
    parser.add_argument("--pairs", type=int, default=2, help="runs without and with the router (default 2)")
    text = "also time `vllm-dvlm batch` on N rows per replica, one engine and several in turns"
    parser.add_argument("--batch", type=int, metavar="N", help=text)
    parser.add_argument("--only-batch", action="store_true", help="with --batch: nothing is served")
    text = "latency bound, e2el:MS or ttft:MS (default e2el:2000)"
    parser.add_argument("--goodput", nargs="+", default=["e2el:2000"], metavar="KEY:MS", help=text)
    parser.add_argument("--input-len", type=int, default=16, help="text tokens of a prompt (default 16)")
    parser.add_argument("--output-len", type=int, default=16, help="tokens of an answer, its canvas (default 16)")
    parser.add_argument("--block-length", type=int, help="tokens committed together (default: half of the canvas)")
    parser.add_argument("--steps", type=int, help="denoising steps of an answer (default: one per token)")
    parser.add_argument("--images", type=int, default=1, help="random pictures of a request (default 1)")
    parser.add_argument("--image", default="168x168", metavar="HxW", help="their size (default 168x168)")
    text = 'options of `vllm bench serve` instead, such as "--dataset-name custom_image --dataset-path FILE"'
    parser.add_argument("--dataset", metavar="OPTIONS", help=text)
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. ValueError for arguments that cannot be met, RuntimeError if a server or request fails."""
    from vllm_dvlm.bench import scale_batch, scale_check, scale_measure, scale_table
    from vllm_dvlm.bench.scale_plan import plan_of
    from vllm_dvlm.bench.scale_simulation import ASSUMPTIONS, Service, simpy_module

    plan = plan_of(arguments)
    num_batch = arguments.batch
    if num_batch is not None and num_batch < 1:
        raise ValueError("--batch must be at least 1 row per replica")
    if arguments.only_batch and (num_batch is None or plan.simulate):
        raise ValueError("--only-batch needs --batch, and nothing to simulate from: leave --simulate out")
    if plan.simulate:
        simpy_module()
    averages = os.getloadavg()
    print(f"load average {averages[0]:.2f} {averages[1]:.2f} {averages[2]:.2f}; {_devices(plan)}", file=sys.stderr)
    found = scale_measure.Measured() if arguments.only_batch else scale_measure.measure(plan)
    rows, checks, about = scale_table.measured_rows(found, plan.client.images), [], {}
    batches: list[scale_batch.Batch] = []
    if num_batch is not None:
        with progress_bar("batches", len(plan.ranks) * len(plan.settings) * len(plan.replicas) * plan.pairs) as bar:
            batches = scale_batch.measure(plan, num_batch, bar.update)
        rows += scale_table.batch_rows(batches, plan.client.images)
    if plan.simulate:
        router = scale_check.measure_router(plan.client, plan.limit)
        rows += scale_table.simulated_rows(plan, found, router)
        checks = scale_table.compared(plan, found, router)
        service = Service(next(iter(found.alone.values())).service.pairs)
        for replicas in plan.check:
            slots, limit, at_once = plan.engine.slots, plan.limit, plan.per_replica
            checks.append(scale_check.check(plan.client, service, router, replicas, slots, limit, at_once))
        print("The simulation assumes:", *ASSUMPTIONS, sep="\n- ", end="\n\n")
        print("Simulation against reality (off: share by which it is higher):")
        print(format_table(checks), end="\n\n")
        about = {
            "router_station_ms": 1000 * router.router.station,
            "router_delay_ms": 1000 * router.router.delay,
        }
    if not arguments.only_batch:
        print("Percentiles of single replicas are as coarse as the buckets of vLLM's histograms.", end="\n\n")
    if any(row.get("busy") == "*" for row in rows):
        print("* others used the machine before such a run: repeat it on an idle one", file=sys.stderr)
    report(
        arguments,
        rows,
        scale_table.figures_of(found, checks, batches),
        describe_run("checkpoint", plan.client.seed, **_shapes(plan), **about),
        lambda axes: scale_table.draw(axes, rows),
        panels=2,
    )
    return 0


def _devices(plan: Any) -> str:
    return f"{plan.gpus} GPUs" if plan.gpus else f"no GPU, {len(os.sched_getaffinity(0))} cores"


def _shapes(plan: Any) -> dict[str, Any]:
    client = plan.client
    return {
        "model": os.path.basename(os.path.normpath(client.model)),
        "max_num_seqs": plan.engine.slots,
        "at_once_per_replica": plan.per_replica,
        "requests_per_replica": plan.num,
        "pairs": plan.pairs,
        "output_tokens": client.output_len,
        "block": plan.block,
        "steps": plan.steps,
        "images": client.images,
        "image": "x".join(map(str, client.image)),
        "goodput": " ".join(client.bounds) or "none",
        "load_average": os.getloadavg()[0],
    }
