"""What a model family declares, so that engine parts need not know families by name. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenTexts:
    """Texts of the tokens that have a role in decoding, as the tokenizers of the family spell them.

    forbidden: never written at a masked position; the texts of ``bos`` and ``eos`` belong to them where the official
        code excludes those.
    """

    mask: str
    end_of_turn: str
    bos: str
    eos: str
    forbidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Facts of one model family.

    name: short name for messages.
    architecture: its entry in ``architectures`` of config.json, by which checkpoints are told apart.
    model_type: ``model_type`` of its config.json, which several families may share.
    model / config: ``module:class`` of the vLLM model and of the config.
    tokens: texts of tokens with a role.
    chat_template: file in ``chat_templates/`` with the official conversation.
    image_placeholder: text that stands for an image in a prompt.
    default_canvas_len / default_block_len / default_steps: for requests that name neither a canvas nor ``max_tokens``.
        None: the canvas is one block; one step per position.
    prompt_attends_canvas: True if prompt tokens see the canvas (one bidirectional sequence), False if the prompt
        attends only to itself and is computed once.
    shifts_logits: True if the logits at position i predict position i + 1.
    """

    name: str
    architecture: str
    model_type: str
    model: str
    config: str
    tokens: TokenTexts
    chat_template: str
    default_canvas_len: int
    image_placeholder: str = "<image>"
    default_block_len: int | None = None
    default_steps: int | None = None
    prompt_attends_canvas: bool = True
    shifts_logits: bool = False
    attentions: tuple[str, ...] = ("full",)
    schedules: tuple[str, ...] = ("uniform",)
    has_suffix: bool = True
    has_step_ratio: bool = False
    has_blocks: bool = True
    stops_bound_canvas: bool = True
    scores_unknown_rows: bool = False
    follows_time_grid: bool = False
    default_top_k: int | None = None
    has_top_k_top_p: bool = False
