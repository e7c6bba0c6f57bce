"""Checks of single option values: each returns the value to use, or raises ValueError naming option and remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

# Floats are exact up to here, and the worker's 64-bit integers have room to spare.
LARGEST = 2**53
# Over HTTP null does not arrive, so there is a word for it.
ABSENT = "none"


def shown(value: Any) -> str:
    """The value as a message repeats it: Python's spelling, cut to a readable length."""
    text = repr(value[:100] if isinstance(value, (str, bytes, list, tuple)) else value)
    return text if len(text) <= 100 else text[:97] + "..."


def unknown(key: str, known: set[str], kind: str) -> str:
    """Message for a key that is not in ``known``, with the nearest one that is."""
    if len(key) > 100:
        key = key[:97] + "..."
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"{key} is not a known {kind}; did you mean {near[0]}? Known: {', '.join(sorted(known))}"


def integer(key: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """An integer in the range; integral floats pass, since HTTP clients write integers so."""
    allowed = f"an integer ≥ {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"
    is_int = isinstance(value, int) and not isinstance(value, bool)
    is_integral = isinstance(value, float) and value.is_integer()
    if not (is_int or is_integral):
        raise ValueError(f"{key} must be {allowed}, not {shown(value)}")
    value = int(value)
    if value > LARGEST:
        raise ValueError(f"{key} must be {allowed} and at most {LARGEST}")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{key} must be {allowed}, not {shown(value)}")
    return value


def number(key: str, value: Any, allowed: str, ok: Callable[[float], bool]) -> float:
    """A finite number for which ``ok`` holds; ``allowed`` says so in words."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} must be {allowed}, not {shown(value)}")
    try:
        found = float(value)
    except OverflowError:  # an integer beyond every float
        raise ValueError(f"{key} must be {allowed}") from None
    if not math.isfinite(found) or not ok(found):
        raise ValueError(f"{key} must be {allowed}, not {shown(value)}")
    return found


def choice(key: str, value: Any, allowed: tuple[str, ...]) -> str:
    """One of ``allowed``."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value)[:100], allowed, n=1, cutoff=0.0)
        raise ValueError(f"{key} must be one of {', '.join(allowed)}, not {shown(value)}; did you mean {near[0]!r}?")
    return value


def text(key: str, value: Any) -> str:
    """Text."""
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key} must be valid Unicode, not half a character ({value[error.start]!a})") from None
    return value


# Far above any canvas, so that an error can say what is wrong before anybody looks at every id.
MOST_IDS = 2**16


def draft(key: str, value: Any) -> str | tuple[int, ...]:
    """Text, or token ids as a list."""
    if value is None:
        return ""
    if isinstance(value, str):
        return text(key, value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{key} must be text or a list of token ids, not {shown(value)}")
    if len(value) > MOST_IDS:
        raise ValueError(f"{key} has {len(value)} token ids; it must fit the canvas")
    return tuple(integer(f"{key}: a token id", i, 0) for i in value)


def switch(key: str, value: Any) -> int:
    """0 or 1."""
    if isinstance(value, bool) or (isinstance(value, (int, float)) and value in (0, 1)):
        return int(value)
    raise ValueError(f"{key} must be 0 or 1, not {shown(value)}")


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """The check for an option that may be absent: None, or the word ``none``."""
    return lambda key, value: None if value is None or value == ABSENT else check(key, value)
