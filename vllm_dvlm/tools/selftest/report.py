"""Rows of a self-test, their table and their file. Imports neither torch nor vLLM."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PASS, FAIL, NOT_HERE = "PASS", "FAIL", "NOT HERE"
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[/\\][\w.+@~ -]*[\w.+@~-])*[/\\]([\w.+@~-]+)")


@dataclass(frozen=True)
class Row:
    """One check. detail: what was seen, one line. remedy: what to do about a failure."""

    check: str
    status: str
    detail: str = ""
    remedy: str = ""
    seconds: float = 0.0


def table(rows: Sequence[Row]) -> str:
    """Lines for a terminal: status, check, what was seen; under a failure what to do."""
    width = max(len(row.check) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.status:<8}  {row.check:<{width}}  {row.detail}".rstrip())
        if row.status == FAIL and row.remedy:
            lines.append(f"{'':<8}  {'':<{width}}  -> {row.remedy}")
    return "\n".join(lines)


def without_paths(text: str) -> str:
    """The text with every path cut to its last part: folders may name people and machines."""
    return _PATH.sub(r"\1", text)


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """For a bug report: versions, device and rows; no paths, no names of users or hosts."""
    found = about | {"rows": [dataclasses.asdict(row) for row in rows]}
    return json.dumps(_without_paths(found), indent=1) + "\n"


def _without_paths(value: Any) -> Any:
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    return [_without_paths(each) for each in value] if isinstance(value, list) else value
