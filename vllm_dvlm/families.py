"""What a model family declares about its decoding, so that engine parts need not know families by name.

Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Decoding facts of a model family.

    name: short name for messages.
    prompt_attends_canvas: True if prompt tokens see the canvas (LLaDA-V: one bidirectional sequence), False if the
        prompt attends only to itself and is computed once (LaViDa).
    shifts_logits: True if the logits at position i predict position i + 1.
    """

    name: str
    prompt_attends_canvas: bool = True
    shifts_logits: bool = False


LLADA_V = Family("LLaDA-V")
