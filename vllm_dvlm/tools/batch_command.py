"""`vllm-dvlm batch`: answer a file of questions, on one engine or on replicas of it.

Streams in and out, so that a file of any size passes; every row of the input gets exactly one line of the output; run
again after a crash or Ctrl-C it goes on where it stopped.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_dvlm.batch.driver import Driver, Limits, Row, Totals, Worker
from vllm_dvlm.batch.ledger import Ledger, open_ledger
from vllm_dvlm.batch.rows import BadRow, error_line, read, request_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; all others are those of `vllm serve`."""
    limits = Limits()
    parser.add_argument("--input", type=Path, required=True, help="JSONL: OpenAI's batch format, or plain rows")
    parser.add_argument("--output", type=Path, required=True, help="JSONL; an unfinished one is gone on with")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--replicas", type=int, default=1, help="engines, by Ray where more than one (default 1)")
    parser.add_argument("--keep-order", action="store_true", help="write lines in the order of the input")
    parser.add_argument("--in-flight", type=int, default=limits.in_flight, help="rows that an engine holds")
    parser.add_argument("--row-timeout", type=float, default=limits.row_s, help="seconds of the longest answer")
    parser.add_argument("--start-timeout", type=float, default=limits.start_s, help="seconds until an engine answers")
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, help="GPUs of an engine")


def rows_of(arguments: argparse.Namespace, ledger: Ledger, fields: frozenset[str]) -> Iterator[Row]:
    """Rows without a line in the output yet, in order."""
    place = 0
    for line in read(arguments.input):
        if ledger.is_done(line.name):
            continue
        try:
            request = json.dumps(request_of(line, arguments.model, arguments.input.parent, fields))
            row = Row(place, line.name, request)
        except Exception as error:  # of this row alone
            reason = str(error) if isinstance(error, BadRow) else f"{type(error).__name__}: {error}"
            message = f"{arguments.input.name}, line {line.number}: {reason}"
            row = Row(place, line.name, None, error_line(line.name, message))
        yield row
        place += 1


def workers_of(arguments: argparse.Namespace, engine_arguments: list[str]) -> list[Worker]:
    """Engines, not yet started. ValueError if Ray is wanted and not there, or its cluster is too small."""
    from vllm_dvlm.batch.answerer import parse
    from vllm_dvlm.batch.local import LocalWorker

    args = parse(engine_arguments)
    if arguments.replicas == 1:
        return [LocalWorker(engine_arguments)]
    try:
        from vllm_dvlm.cluster import actors, resources
    except ImportError as error:
        raise ValueError(f"--replicas needs Ray: pip install 'vllm-dvlm[ray]' ({error})") from None
    replicas, in_flight = arguments.replicas, arguments.in_flight
    needed = resources.Resources.of(args, replicas)
    actors.connect(replicas, needed.num_gpus, with_dashboard=False)
    return [actors.RayWorker(engine_arguments, number, needed, in_flight) for number in range(replicas)]


def run(arguments: argparse.Namespace) -> int:
    """Answer all rows, print a summary; 0 if every row has a line, whatever it says. ValueError for bad arguments."""
    for name in ("replicas", "in_flight", "row_timeout", "start_timeout", "tensor_parallel_size"):
        if getattr(arguments, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive")
    if not arguments.input.is_file():
        raise ValueError(f"--input: {arguments.input} is no file")
    if arguments.output.exists() and arguments.output.samefile(arguments.input):
        raise ValueError("--output must be another file than --input")
    with open_ledger() as ledger:
        num = ledger.scan(arguments.input)
        done = ledger.resume(arguments.output)
        print(f"{num} rows, {done} of them answered already", flush=True)
        if done == num:
            return 0
        try:
            totals, seconds = asyncio.run(_answer(arguments, ledger, num, done))
        except KeyboardInterrupt:
            raise SystemExit("vllm-dvlm: stopped; the same command goes on where it was") from None
        except RuntimeError as error:
            raise SystemExit(f"vllm-dvlm: {error}; the same command goes on where it was") from error
    print_summary(totals, seconds)
    return 0


async def _answer(arguments: argparse.Namespace, ledger: Ledger, num: int, done: int) -> tuple[Totals, float]:
    from vllm_dvlm.batch.local import keep_in_process, steps_in_process

    if arguments.replicas == 1 and steps_in_process():
        keep_in_process()
    from vllm_dvlm.batch.answerer import chat_fields

    engine_arguments = ["--model", arguments.model, "-tp", str(arguments.tensor_parallel_size), *arguments.rest]
    limits = Limits(arguments.in_flight, row_s=arguments.row_timeout, start_s=arguments.start_timeout)
    workers = workers_of(arguments, engine_arguments)
    with (
        arguments.output.open("a", encoding="utf-8") as file,
        tqdm(total=num, initial=done, unit=" rows", desc="batch", mininterval=1) as bar,
    ):
        begin = 0.0

        def write(line: str) -> None:
            nonlocal begin
            begin = begin or time.monotonic()
            file.write(line + "\n")
            file.flush()
            bar.update()
            if driver.totals.rows % 64 == 0:
                rate = driver.totals.tokens / max(time.monotonic() - begin, 1e-3)
                bar.set_postfix({"tokens/s": f"{rate:.0f}", "KV blocks freed": driver.totals.blocks_freed})

        driver = Driver(workers, write, limits, arguments.keep_order)
        totals = await driver.run(rows_of(arguments, ledger, chat_fields()))
        return totals, time.monotonic() - begin


def print_summary(totals: Totals, seconds: float) -> None:
    """What was done, from the first line written on."""
    figures: dict[str, Any] = {
        "rows": totals.rows,
        "error lines": totals.errors,
        "rows/s": f"{totals.rows / max(seconds, 1e-3):.1f}",
        "tokens/s": f"{totals.tokens / max(seconds, 1e-3):.0f}",
        "KV blocks given back": totals.blocks_freed,
        "engines lost": totals.losses,
    }
    print("\n".join(f"{name:<22}{value}" for name, value in figures.items()), flush=True)
