"""Pruning methods: how much each visual token matters.

A method says how important each visual token of a request is; it neither selects, moves nor frees anything. It is
given a ``StepView`` of the first denoising step and returns one number per visual token, higher is kept.

Adding a method, in five places:

1. a file in this folder with one frozen dataclass that derives from ``Pruner``; its docstring names the paper;
2. a row in ``names.METHODS`` (in another package: an entry point in the group ``vllm_dvlm.pruners``);
3. a row in ``tests/unit/pruning_cases.py``, which runs it through the tests that every method must pass;
4. a golden case, if the authors' code exists;
5. a row in the README's table of methods.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module

from vllm_dvlm.pruning.base import Pruner, StepView
from vllm_dvlm.pruning.names import known_methods, targets

__all__ = ["Pruner", "StepView", "create", "known_methods"]


def create(method: str, rows: str | None = None) -> Pruner:
    """The pruner for a request's options.

    Args:
        method: a name of ``known_methods`` other than 'none'.
        rows: ``prune_rows``; None for the method's own default.

    Raises:
        ValueError: the method does not take these rows.
    """
    module, name = targets()[method].split(":")
    cls = getattr(import_module(module), name)
    if rows is None:
        return cls()
    if "rows" not in {f.name for f in fields(cls)}:
        raise ValueError(f"prune_rows does not go with prune_method {method!r}; remove it")
    return cls(rows=rows)
