"""Names of pruning methods, without importing any: the front end checks options with this table.

A third party adds a method with an entry point in the group ``vllm_dvlm.pruners``: name = "package.module:Class".
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

ENTRY_POINT_GROUP = "vllm_dvlm.pruners"

# name -> class. One row per method; 'none' has no class.
METHODS = {
    "redvtp": "vllm_dvlm.pruning.redvtp:RedVTP",
    "fastv": "vllm_dvlm.pruning.fastv:FastV",
    "random": "vllm_dvlm.pruning.controls:RandomPruner",
    "uniform": "vllm_dvlm.pruning.controls:UniformPruner",
    "diversity": "vllm_dvlm.pruning.diversity:DiversityPruner",
}

# Methods that prune inside the first step, after layer ``prune_layer``; the others after it.
AT_LAYER = frozenset({"fastv"})

# Which attention rows score visual tokens: canvas positions still masked after the step's commit, the ones just
# committed, canvas and text rows of the prompt, every row of the sequence, the last canvas row.
ROWS = ("masked", "committed", "response_prompt", "all", "last")


@cache
def targets() -> dict[str, str]:
    """Method name to "module:Class", the package's own and those of installed entry points.

    Raises:
        ValueError: an entry point takes the name of another method.
    """
    table = dict(METHODS)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in table or entry.name == "none":
            raise ValueError(f"pruning method {entry.name!r} is declared twice; rename the entry point {entry.value}")
        table[entry.name] = entry.value
    return table


def known_methods() -> tuple[str, ...]:
    """Allowed values of ``prune_method``."""
    return ("none", *targets())
