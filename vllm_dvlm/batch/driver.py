"""Keeps workers busy with rows and writes one line per row, whatever happens to the workers. Light to import.

A row whose worker is lost goes to another one at once; a worker that is lost starts again meanwhile. A row gets its
last try alone, so that one that takes workers along takes no other rows with it. Every wait has a limit (`Limits`).
"""

import asyncio
import heapq
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm_dvlm.batch.rows import error_line


class WorkerLost(Exception):
    """A worker cannot answer any more; its rows can."""


class Worker(Protocol):
    """One engine."""

    async def start(self) -> None:
        """Load, at first and after a loss. WorkerLost if that fails."""

    async def answer(self, request: str) -> str:
        """The output line of a request in OpenAI's batch format. WorkerLost if it ends meanwhile."""

    async def stop(self) -> None:
        """End it, even if it does not react."""


@dataclass(frozen=True)
class Limits:
    """What the driver waits for, and how often it tries.

    in_flight: rows that a worker holds. attempts: workers that a row may lose before it is told so. starts: failed
    starts in a row after which a worker is given up. start_s, row_s: longest start, longest answer. window: rows that
    may be ahead of the next line to be written, with `keep_order`.
    """

    in_flight: int = 32
    attempts: int = 3
    starts: int = 3
    start_s: float = 900.0
    row_s: float = 600.0
    window: int = 1024


@dataclass(frozen=True)
class Row:
    """A row to be answered: its place in the input, its id, and its request, or the line that says why it has none."""

    place: int
    name: str
    request: str | None
    error: str = ""


@dataclass
class Life:
    """A worker from a start to its loss. num_out: rows it holds. is_alone: one of them on its last try."""

    is_lost: bool = False
    num_out: int = 0
    is_alone: bool = False


@dataclass
class Totals:
    """Sums over written lines. blocks_freed: KV blocks given back by pruning. losses: workers lost."""

    rows: int = 0
    errors: int = 0
    tokens: int = 0
    blocks_freed: int = 0
    losses: int = 0

    def add(self, line: str) -> None:
        """Count an output line."""
        answer = json.loads(line)
        body = (answer.get("response") or {}).get("body") or {}
        self.rows += 1
        self.errors += answer.get("error") is not None
        self.tokens += (body.get("usage") or {}).get("completion_tokens") or 0
        report = (body.get("kv_transfer_params") or {}).get("dvlm") or {}
        self.blocks_freed += report.get("kv_blocks_before", 0) - report.get("kv_blocks_after", 0)


@dataclass
class Driver:
    """Runs rows through workers; `write` gets each output line, in input order if `keep_order`."""

    workers: Sequence[Worker]
    write: Callable[[str], Any]
    limits: Limits = field(default_factory=Limits)
    keep_order: bool = False
    totals: Totals = field(default_factory=Totals)

    async def run(self, rows: Iterator[Row]) -> Totals:
        """Answer every row. RuntimeError if no worker is left or `rows` fails; rows not written then have no line."""
        self._rows = rows
        # Rows whose worker was lost, and how often; those with one try left apart.
        self._again, self._last = deque[tuple[Row, int]](), deque[tuple[Row, int]]()
        self._num_out, self._is_read = 0, False
        self._held: list[tuple[int, str]] = []
        self._next_place: int | None = None
        self._changed = asyncio.Event()
        tasks = [asyncio.create_task(self._serve(worker)) for worker in self.workers]
        try:
            results = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*(worker.stop() for worker in self.workers), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        # Where `rows` itself has failed, it has ended for the other workers, too, and nothing is left for them to do.
        if unexpected := [failure for failure in failures if not isinstance(failure, WorkerLost)]:
            found = unexpected[0]
            raise RuntimeError(f"{type(found).__name__} after {self.totals.rows} rows: {found}") from found
        if failures and not self._is_done():
            raise RuntimeError(f"no engine is left, after {self.totals.rows} rows: {failures[-1]}") from failures[-1]
        return self.totals

    async def _serve(self, worker: Worker) -> None:
        """One worker's life: start, slots until it is lost or nothing is left to do, again."""
        failed = 0
        while not self._is_done():
            try:
                await asyncio.wait_for(worker.start(), self.limits.start_s)
            except (WorkerLost, TimeoutError) as error:
                failed += 1
                await worker.stop()
                if failed >= self.limits.starts:
                    raise WorkerLost(str(error) or f"no start within {self.limits.start_s:.0f} s") from error
                continue
            before, life = self.totals.rows, Life()
            slots = [asyncio.create_task(self._slot(worker, life)) for _ in range(self.limits.in_flight)]
            try:
                lost = [error for error in await asyncio.gather(*slots, return_exceptions=True) if error]
            finally:
                for slot in slots:
                    slot.cancel()
            if unexpected := [error for error in lost if not isinstance(error, WorkerLost)]:
                raise unexpected[0]
            if not lost:
                return
            self.totals.losses += 1
            failed = 0 if self.totals.rows > before else failed + 1
            await worker.stop()
            if failed >= self.limits.starts:
                raise lost[0]

    async def _slot(self, worker: Worker, life: Life) -> None:
        """Answer rows one after another; WorkerLost if the worker is lost with a row, the end if with another one."""
        while (taken := await self._take(life)) is not None:
            row, attempts = taken
            assert row.request is not None
            try:
                line = await asyncio.wait_for(worker.answer(row.request), self.limits.row_s)
            except (WorkerLost, TimeoutError) as error:
                life.is_lost = True
                self._lost(row, attempts + 1)
                raise WorkerLost(str(error) or f"no answer within {self.limits.row_s:.0f} s") from error
            except asyncio.CancelledError:
                self._lost(row, attempts)
                raise
            except Exception as error:  # of this row alone: the worker lives
                line = error_line(row.name, f"{type(error).__name__}: {error}", 500)
            life.num_out -= 1
            life.is_alone = False
            self._finish(row, line)

    def _lost(self, row: Row, attempts: int) -> None:
        if attempts >= self.limits.attempts:
            message = f"{attempts} engines were lost while this row was with them; it is not tried again"
            self._finish(row, error_line(row.name, message, 500))
            return
        (self._last if attempts + 1 == self.limits.attempts else self._again).append((row, attempts))
        self._num_out -= 1
        self._wake()

    async def _take(self, life: Life) -> tuple[Row, int] | None:
        """The next row, waiting while others may come back; None when all are answered or the worker is lost."""
        while not life.is_lost:
            taken = self._next(life)
            if taken is not None:
                self._num_out += 1
                life.num_out += 1
                return taken
            if self._is_done():
                break
            await self._changed.wait()
        return None

    def _next(self, life: Life) -> tuple[Row, int] | None:
        """A row for this worker now, or None."""
        if life.is_alone or (self._last and life.num_out):
            return None
        if self._last:
            life.is_alone = True
            return self._last.popleft()
        if self._again:
            return self._again.popleft()
        while not self._is_read and not self._is_too_far():
            row = next(self._rows, None)
            if row is None:
                self._is_read = True
                self._wake()
                break
            if self._next_place is None:
                self._next_place = row.place
            if row.request is not None:
                return row, 0
            self._num_out += 1
            self._finish(row, row.error)
        return None

    def _is_done(self) -> bool:
        return self._is_read and not self._again and not self._last and self._num_out == 0

    def _is_too_far(self) -> bool:
        return self.keep_order and self._num_out + len(self._held) >= self.limits.window

    def _finish(self, row: Row, line: str) -> None:
        self._num_out -= 1
        if self.keep_order:
            heapq.heappush(self._held, (row.place, line))
            while self._held and self._held[0][0] == self._next_place:
                self._put(heapq.heappop(self._held)[1])
                self._next_place += 1
        else:
            self._put(line)
        self._wake()

    def _put(self, line: str) -> None:
        self.totals.add(line)
        self.write(line)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
