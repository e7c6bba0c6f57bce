"""What a model family declares about its decoding and its prompts, so that engine parts need not know families by name.

Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Facts of a model family about its decoding and its prompts.

    name: short name for messages.
    prompt_attends_canvas: True if prompt tokens see the canvas (LLaDA-V: one bidirectional sequence), False if the
        prompt attends only to itself and is computed once (LaViDa).
    shifts_logits: True if the logits at position i predict position i + 1.
    chat_template: file in `chat_templates/` with the official conversation.
    image_placeholder: text that stands for an image in a prompt.
    """

    name: str
    chat_template: str
    image_placeholder: str = "<image>"
    prompt_attends_canvas: bool = True
    shifts_logits: bool = False


LLADA_V = Family("LLaDA-V", chat_template="llava_llada.jinja")
