"""What a model family declares, so that engine parts need not know families by name. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

# LLaVA's text for an image, in every family that builds on it.
IMAGE_PLACEHOLDER = "<image>"


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
    attentions: what prompt tokens may attend to, the default first. "full": one bidirectional sequence, the prompt
        sees the canvas; "prefix": the prompt attends to itself alone and is computed once.
    schedules: names of the ways to spread the positions of a block over its steps, the default first.
    has_suffix: True if text may be fixed behind the canvas.
    has_step_ratio: True if a share of the steps may be named in place of their number.
    has_blocks: True if a canvas may be decoded in blocks from left to right; False: it is one block.
    stops_bound_canvas: True if nothing is decoded behind a stop found in the canvas; False: a stop inside the canvas
        ends no step, it only cuts the reply.
    scores_unknown_rows: True if the logits of embedding rows without a token take part in the softmax that gives
        confidences.
    default_top_k: the logits kept per position where a request names no ``top_k``; None: all.
    has_top_k_top_p: True if ``top_k`` and ``top_p`` of a request act on confidences and draws.
    follows_time_grid: True if the "uniform" schedule takes its counts from a grid of times from 1 to 0.001, so that
        early steps may write nothing.
    shifts_logits: True if the logits at position i predict position i + 1.
    published_name: of the checkpoint that its authors published.
    published: keys of that checkpoint's config.json that differ from the defaults of the config class.
    """

    name: str
    architecture: str
    model_type: str
    model: str
    config: str
    tokens: TokenTexts
    chat_template: str
    default_canvas_len: int
    image_placeholder: str = IMAGE_PLACEHOLDER
    default_block_len: int | None = None
    default_steps: int | None = None
    attentions: tuple[str, ...] = ("full",)
    schedules: tuple[str, ...] = ("uniform",)
    has_suffix: bool = True
    has_step_ratio: bool = False
    has_blocks: bool = True
    stops_bound_canvas: bool = True
    scores_unknown_rows: bool = False
    default_top_k: int | None = None
    has_top_k_top_p: bool = False
    follows_time_grid: bool = False
    shifts_logits: bool = False
    published_name: str = ""
    published: tuple[tuple[str, object], ...] = ()
