"""Whether this package makes the host wait for a GPU: torch's sync debug mode around its parts of a step.

First in "warn" mode, which names every place; then in "error" mode, in which a wait ends the step. What vLLM does
between the parts may wait: its mode stays "default".
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_dvlm.tools.selftest.report import FAIL, PASS

# A step's parts, by attribute of vLLM's model runner. Merging embeddings is vLLM's code, in first steps alone.
PARTS = {"model_state": ("prepare_inputs", "prepare_attn"), "model": ("__call__",), "sampler": ("__call__",)}
SLOWER = "slower than need be, answers are right; report it with the file of --json"


@contextmanager
def around_parts(runner: Any, set_mode: Callable[[str], None], mode: str) -> Iterator[None]:
    """Within: ``set_mode(mode)`` before each part of a step, ``set_mode("default")`` after it."""

    def around(part: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            set_mode(mode)
            try:
                return part(*args, **kwargs)
            finally:
                set_mode("default")

        return call

    classes = {}
    for attribute, names in PARTS.items():
        thing = getattr(runner, attribute)
        classes[attribute] = base = type(thing)
        # A class of its own: the runner calls two of them as functions, which looks at the class alone.
        thing.__class__ = type(base.__name__, (base,), {name: around(getattr(base, name)) for name in names})
    try:
        yield
    finally:
        for attribute, base in classes.items():
            getattr(runner, attribute).__class__ = base


def _place(filename: str, line: int | None) -> tuple[bool, str]:
    """Whether a place is in this package, and how a report names it."""
    import vllm_dvlm.patches

    path = Path(filename)
    own = [Path(module.__path__[0]) for module in (vllm_dvlm, vllm_dvlm.patches)]
    return any(folder in path.parents for folder in own), f"{path.name}:{line}"


def check_sync(runner: Any, generate: Callable[[], Any], set_mode: Callable[[str], None]) -> tuple[str, str, str]:
    """(status, detail, remedy) of a batch that ``generate`` runs on the engine of ``runner``, in this process.

    set_mode: ``torch.cuda.set_sync_debug_mode``, or what a test has in its place.
    """
    import torch

    generate()  # whatever is done once is done by now
    with warnings.catch_warnings(record=True) as caught, around_parts(runner, set_mode, "warn"):
        warnings.simplefilter("always")
        generate()
    waits = [_place(each.filename, each.lineno) for each in caught if "synchroniz" in str(each.message)]
    own = sorted({place for is_own, place in waits if is_own})
    if own:
        return FAIL, f"waits in {', '.join(own)}", SLOWER
    try:
        with around_parts(runner, set_mode, "error"):
            generate()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        torch_folder = Path(torch.__file__).parent
        frames = traceback.extract_tb(error.__traceback__)
        frame = [each for each in frames if torch_folder not in Path(each.filename).parents][-1]
        is_own, place = _place(frame.filename, frame.lineno)
        if is_own:
            return FAIL, f"waits in {place}", SLOWER
        return PASS, f"no waits of this package in a batch of every kind; vLLM waits in {place}", ""
    return PASS, f"no waits within steps, in a batch of every kind ({len(waits)} in vLLM's code)", ""
