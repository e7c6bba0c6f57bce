"""Exact match and its uncertainty; nothing heavy is imported."""

import math
from collections.abc import Sequence

# Two-sided 95 %.
Z95 = 1.959963984540054


def normalise(answer: str) -> str:
    """Text as answers are compared: outer white space gone, inner runs of it one space, case folded, one full stop at
    the end dropped."""
    return " ".join(answer.split()).casefold().removesuffix(".").rstrip()


def is_match(answer: str, accepted: Sequence[str]) -> bool:
    """True if the answer equals an accepted one after `normalise`."""
    return normalise(answer) in {normalise(text) for text in accepted}


def wilson_interval(num_right: int, num: int, z: float = Z95) -> tuple[float, float]:
    """Confidence interval of a proportion, within [0, 1] also at its ends (Wilson 1927). num must be positive."""
    share = num_right / num
    scale = 1 + z * z / num
    centre = share + z * z / (2 * num)
    spread = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    # Rounding may leave 1e-17 where the formula gives 0 or 1.
    low = 0.0 if num_right == 0 else (centre - spread) / scale
    high = 1.0 if num_right == num else (centre + spread) / scale
    return low, high


def paired_ratio(right: Sequence[bool], base: Sequence[bool]) -> tuple[float | None, float | None, float | None]:
    """Share of right answers over that of the base on the same questions: (ratio, low, high).

    The interval is that of the ratio of two proportions in matched pairs, on a log scale: variance
    (b + c) / (num_right * num_base) with b and c the questions that only one of the two answers. Every number is None
    where the base answers nothing; the interval is None where nothing is right.
    """
    num_right, num_base = sum(right), sum(base)
    if not num_base:
        return None, None, None
    if not num_right:
        return 0.0, None, None
    num_differ = sum(a != b for a, b in zip(right, base, strict=True))
    ratio = num_right / num_base
    spread = Z95 * math.sqrt(num_differ / (num_right * num_base))
    return ratio, ratio * math.exp(-spread), ratio * math.exp(spread)
