"""Which rows are done: ids on disk, not in memory, and an output file that a crash cannot spoil. Light to import."""

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_dvlm.batch.rows import read

# How every output line begins, vLLM's and ours.
LINE_BEGIN = b'{"id":'


class Ledger:
    """Ids seen in the input, and ids with a line in the output, in a temporary database."""

    def __init__(self, path: str):
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("CREATE TABLE ids (name TEXT PRIMARY KEY, line INTEGER, done INTEGER) WITHOUT ROWID")

    def close(self) -> None:
        self._db.close()

    def scan(self, path: Path) -> int:
        """Number of rows of an input file. ValueError for an id that occurs twice, naming both lines."""
        self._db.execute("BEGIN")
        num = 0
        for line in read(path):
            num += 1
            try:
                self._db.execute("INSERT INTO ids VALUES (?, ?, 0)", (line.name, line.number))
            except sqlite3.IntegrityError:
                (first,) = self._db.execute("SELECT line FROM ids WHERE name = ?", (line.name,)).fetchone()
                raise ValueError(
                    f"{path.name}: lines {first} and {line.number} have the same id {line.name!r}; ids tell rows apart"
                ) from None
        self._db.execute("COMMIT")
        return num

    def resume(self, path: Path) -> int:
        """Mark the rows of an earlier output as done, cut a torn last line off, and return their number.

        ValueError if the file holds what is no output of this input.
        """
        if not path.exists():
            return 0
        end = whole_lines(path)
        num = 0
        self._db.execute("BEGIN")
        with path.open("rb") as file:
            for number, data in enumerate(file, 1):
                if not data.endswith(b"\n"):
                    if data[: len(LINE_BEGIN)] != LINE_BEGIN[: len(data)]:
                        raise ValueError(self._foreign(path, number))
                    break
                try:
                    name = json.loads(data)["custom_id"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise ValueError(self._foreign(path, number)) from None
                if self._db.execute("UPDATE ids SET done = 1 WHERE name = ? AND done = 0", (name,)).rowcount != 1:
                    raise ValueError(
                        f"{path.name}, line {number} answers {name!r}, which the input lacks or which is answered "
                        "before; name another --output"
                    )
                num += 1
        self._db.execute("COMMIT")
        os.truncate(path, end)  # only now: a file of something else stays as it is
        return num

    @staticmethod
    def _foreign(path: Path, number: int) -> str:
        return f"{path.name}, line {number} is no answer of a batch; name another --output"

    def is_done(self, name: str) -> bool:
        return bool(self._db.execute("SELECT done FROM ids WHERE name = ?", (name,)).fetchone()[0])


@contextmanager
def open_ledger() -> Iterator[Ledger]:
    """A ledger in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="vllm-dvlm-batch-") as folder:
        ledger = Ledger(os.path.join(folder, "ids.sqlite"))
        try:
            yield ledger
        finally:
            ledger.close()


def whole_lines(path: Path) -> int:
    """Length of a file up to its last line break."""
    with path.open("rb") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position > 0:
            size = min(1 << 16, position)
            position -= size
            file.seek(position)
            found = file.read(size).rfind(b"\n")
            if found >= 0:
                return position + found + 1
        return 0 if end else end
