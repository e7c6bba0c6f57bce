"""What a request's options come to, with its prompt and its server: lengths, blocks, steps, what the canvas holds.

In three moves, each made once per request by whoever needs the answer (the front end, to answer HTTP 400, and the
scheduler): ``read`` what is asked, turn its texts into tokens, ``place`` it. The worker is sent the result. Neither
torch nor vllm is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_dvlm.families import Family
from vllm_dvlm.options import OWN_KEYS, VLLM_EXTRA_ARGS, DenoiseParams, parse
from vllm_dvlm.pruning.names import AT_LAYER
from vllm_dvlm.refusals import refuse_unsupported
from vllm_dvlm.settings import ServerSettings
from vllm_dvlm.steps import Plan, pruned_prompt_len, round_up, steps_on_grid, steps_per_block

# A position of a draft that is to be filled.
MASKED = -1
_MASKS = re.compile(r"<mask:(\d{1,7})>")
# Positions that the masks of a text may stand for together; any canvas is shorter.
_MOST_MASKS = 2**16


@dataclass(frozen=True)
class Texts:
    """Texts of a request's options as tokens.

    suffix_ids: behind the canvas. draft: the canvas from its start on, ``MASKED`` where it is to be filled.
    """

    suffix_ids: tuple[int, ...] = ()
    draft: tuple[int, ...] = ()


@dataclass(frozen=True)
class Asked:
    """Options of a request over its server's defaults. named: those that the request itself gives."""

    options: DenoiseParams
    named: frozenset[str]

    def texts(self, encode: Callable[[str], list[int]], mask_token_id: int) -> Texts:
        """The texts as tokens. encode: text to ids, special tokens by their names, none added."""
        suffix = self.options.diffusion_suffix
        return Texts(
            tuple(encode(suffix)) if suffix else (), draft_tokens(self.options.diffusion_draft, encode, mask_token_id)
        )


def draft_tokens(
    draft: str | tuple[int, ...], encode: Callable[[str], list[int]], mask_token_id: int
) -> tuple[int, ...]:
    """Tokens of a draft, ``MASKED`` where it is to be filled: at the mask token, and N times at ``<mask:N>`` of a text.

    ValueError if the masks are more than any canvas has.
    """
    if not isinstance(draft, str):
        return tuple(MASKED if i == mask_token_id else i for i in draft)
    found: list[int] = []
    for number, piece in enumerate(_MASKS.split(draft)):
        if number % 2:
            if len(found) + int(piece) > _MOST_MASKS:
                raise ValueError("diffusion_draft is longer than any canvas: use fewer masks")
            found += [MASKED] * int(piece)
        elif piece:
            found += [MASKED if i == mask_token_id else i for i in encode(piece)]
    return tuple(found)


@dataclass(frozen=True)
class ResolvedParams:
    """Settings of one request after every default is filled in; what scheduler and worker compute with.

    caches_prompt, row_offset: see ``steps.Plan``. grid_steps: intervals of the time grid that counts are read from, of
    families that follow one. top_k: likeliest tokens among which confidence is measured; None: all.
    max_new_tokens: output tokens after which the request ends; the suffix does not count against
    ``max_tokens``.
    """

    options: DenoiseParams
    canvas_len: int
    block_len: int
    max_steps: int
    max_tokens: int
    texts: Texts = Texts()
    caches_prompt: bool = False
    grid_steps: int | None = None
    row_offset: int = 0
    top_k: int | None = None

    def to_mapping(self) -> dict[str, Any]:
        """As plain values, for the way to the worker."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any]) -> ResolvedParams:
        """Inverse of ``to_mapping``; on the way tuples may have become lists."""
        options = dict(raw["options"])
        if not isinstance(options["diffusion_draft"], str):
            options["diffusion_draft"] = tuple(options["diffusion_draft"])
        texts = Texts(*(tuple(raw["texts"][name]) for name in ("suffix_ids", "draft")))
        return cls(**{**raw, "options": DenoiseParams(**options), "texts": texts})

    @property
    def suffix_len(self) -> int:
        """Tokens behind the canvas."""
        return len(self.texts.suffix_ids)

    @property
    def first_block_start(self) -> int:
        """Canvas position of the first block in which the draft leaves anything to fill."""
        draft = self.texts.draft
        first = draft.index(MASKED) if MASKED in draft else len(draft)
        return min(first, self.canvas_len - 1) // self.block_len * self.block_len

    @property
    def num_blocks(self) -> int:
        """Blocks of the canvas."""
        return self.canvas_len // self.block_len

    def plan(self, prompt_len: int) -> Plan:
        """The course of the request, for ``steps.advance``. prompt_len: in tokens."""
        steps = None
        if self.options.diffusion_threshold is None:
            # Steps beyond one per position unmask nothing and would repeat the same forward pass.
            steps = min(self.max_steps // self.num_blocks, self.block_len) + self.first_token_from_prompt
        return Plan(
            prompt_len,
            self.canvas_len,
            self.suffix_len,
            self.block_len,
            steps,
            self.options.diffusion_refresh_interval,
            self.caches_prompt,
            self.first_block_start,
            self.row_offset,
            self.first_token_from_prompt,
        )

    def pruned_plan(self, plan: Plan, num_visual: int) -> Plan | None:
        """The course after pruning; None if nothing is to be pruned. num_visual: visual tokens of the prompt."""
        if self.options.prune_method == "none" or num_visual == 0:
            return None
        prompt_len = pruned_prompt_len(plan.prompt_len, num_visual, self.options.prune_keep_ratio)
        return None if prompt_len == plan.prompt_len else replace(plan, prompt_len=prompt_len)

    def prune_after_layers(self, num_layers: int) -> int | None:
        """Layers of the first step that see the whole prompt; None if all do (the method prunes after the step)."""
        if self.options.prune_method not in AT_LAYER:
            return None
        return self.options.prune_layer or max(1, num_layers // 2)

    @property
    def first_token_from_prompt(self) -> bool:
        """See ``steps.Plan``."""
        is_open = not self.texts.draft or self.texts.draft[0] == MASKED
        return self.caches_prompt and self.row_offset > 0 and is_open

    @property
    def follows_table(self) -> bool:
        """True if the counts per step are not those of the uniform schedule over the masks of a block."""
        return self.grid_steps is not None or self.options.diffusion_schedule != "uniform"

    @property
    def emits_suffix(self) -> bool:
        """False if ``max_tokens`` ends the reply inside the canvas."""
        return self.max_tokens >= self.canvas_len

    @property
    def max_new_tokens(self) -> int:
        """Output tokens after which the request ends."""
        return self.canvas_len + self.suffix_len if self.emits_suffix else self.max_tokens


def read(extra_args: Mapping[str, Any] | None, settings: ServerSettings) -> Asked:
    """Options of a request against its server's defaults and what its model can do.

    extra_args: flat options (``SamplingParams.extra_args``, ``vllm_xargs`` over HTTP).

    Raises:
        ValueError: unknown, ill-typed, contradictory or unsupported option; names the option and the remedy.
    """
    raw = {k: v for k, v in (extra_args or {}).items() if k not in VLLM_EXTRA_ARGS and k not in OWN_KEYS}
    defaults = settings.defaults
    if raw.get("prune_method", defaults.prune_method) != defaults.prune_method:
        # The server's layer and rows belong to its own method; a request that names another one takes that one's.
        defaults = replace(defaults, prune_layer=None, prune_rows=None)
    options = parse(raw, base=defaults)
    refuse_unsupported(options, settings)
    return Asked(options, frozenset(raw))


def resolve(
    extra_args: Mapping[str, Any] | None,
    max_tokens: int | None,
    settings: ServerSettings,
    room: int | None = None,
    texts: Texts = Texts(),  # noqa: B008 - frozen
) -> ResolvedParams:
    """``read`` and ``place`` in one, for who has no texts or has their tokens already."""
    return place(read(extra_args, settings), max_tokens, settings, room, texts)


def place(
    asked: Asked,
    max_tokens: int | None,
    settings: ServerSettings,
    room: int | None = None,
    texts: Texts = Texts(),  # noqa: B008
) -> ResolvedParams:
    """Fill in every default and check the lengths against each other.

    Args:
        asked: what ``read`` found.
        max_tokens: vLLM's limit on output tokens; None if unlimited.
        settings: the server's settings.
        room: the model's positions behind the prompt; None as long as the prompt is not known.
        texts: what ``Asked.texts`` says.

    Raises:
        ValueError: as ``read``.
    """
    opts, raw, defaults = asked.options, asked.named, settings.defaults
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}: the canvas needs a position")
    # What nobody names vLLM fills in with all that fits.
    is_unnamed, default = False, settings.default_canvas_length
    if default is not None and opts.diffusion_canvas_length is None and (max_tokens is None or max_tokens == room):
        is_unnamed = True
        max_tokens = max(1, default if room is None else min(default, room))
    canvas, block = _canvas_and_block(asked, max_tokens, settings.max_canvas_length, room, len(texts.suffix_ids))
    steps = opts.diffusion_max_steps
    if is_unnamed and canvas == default and opts.diffusion_block_length is steps is None:
        block, steps = settings.default_block_length or canvas, settings.default_max_steps
    num_blocks = canvas // block
    if steps is None:
        steps = canvas
    if steps < num_blocks or steps % num_blocks:
        nearest = max(num_blocks, round(steps / num_blocks) * num_blocks)
        # The server's number of steps may have been chosen for another canvas than the request's; if not, it is wrong.
        is_other = defaults.diffusion_canvas_length is None or "diffusion_canvas_length" in raw
        is_other |= "diffusion_block_length" in raw
        if "diffusion_max_steps" in raw or not is_other:
            raise ValueError(
                f"diffusion_max_steps {steps} must be a multiple of the number of blocks, {num_blocks} "
                f"(canvas {canvas} / block {block}); the nearest is {nearest}"
            )
        steps = nearest
    grid_steps = None
    if settings.family.follows_time_grid:
        grid_steps, steps = steps_on_grid(canvas, steps, opts.diffusion_step_ratio)
    elif opts.diffusion_step_ratio is not None:
        steps = num_blocks * steps_per_block(canvas, block, steps, opts.diffusion_step_ratio)
    attention = opts.diffusion_attention or settings.family.attentions[0]
    _check_draft(texts.draft, canvas)
    return ResolvedParams(
        opts,
        canvas,
        block,
        steps,
        canvas if max_tokens is None else max_tokens,
        texts,
        attention == "prefix",
        grid_steps,
        int(settings.family.shifts_logits),
        _top_k(opts, settings.family),
    )


def _top_k(opts: DenoiseParams, family: Family) -> int | None:
    if opts.diffusion_top_k is None:
        return family.default_top_k
    return opts.diffusion_top_k or None


def _check_draft(draft: tuple[int, ...], canvas: int) -> None:
    if len(draft) > canvas:
        raise ValueError(
            f"diffusion_draft of {len(draft)} tokens does not fit the canvas of {canvas}; shorten the draft, or raise "
            "diffusion_canvas_length or max_tokens"
        )
    if len(draft) == canvas and MASKED not in draft:
        raise ValueError(
            "diffusion_draft leaves nothing to fill; ask for a longer canvas, or put <mask:N> into the draft"
        )


def _canvas_and_block(
    asked: Asked, max_tokens: int | None, limit: int, room: int | None, suffix_len: int
) -> tuple[int, int]:
    """Length of the canvas and of its blocks. limit: the server's."""
    opts, raw = asked.options, asked.named
    canvas, block = opts.diffusion_canvas_length, opts.diffusion_block_length
    if canvas is None:
        canvas = round_up(limit if max_tokens is None else max_tokens, block or 1)
        # max_tokens is an upper bound and the OpenAI layer fills in 'all that fits'; a canvas that nobody asked for
        # by name is therefore cut to what there is room for, and the reply ends with reason 'length'.
        most = limit
        if room is not None:
            most -= suffix_len
            if max_tokens is None or max_tokens <= room:  # else max_tokens itself is refused
                most = min(most, room - suffix_len)
        if block is not None and block > limit:
            raise ValueError(
                f"diffusion_block_length {block} is larger than the server's max_canvas_length {limit}; "
                f"ask for at most {limit}"
            )
        if canvas > most >= (block or 1):  # where not even a block is left, ``check_lengths`` says what does not fit
            canvas = most // (block or 1) * (block or 1)
    elif canvas > limit:
        raise ValueError(
            f"diffusion_canvas_length {canvas} is larger than the server's max_canvas_length {limit}; "
            f"ask for at most {limit} or start the server with "
            f'--additional-config \'{{"dvlm": {{"max_canvas_length": {canvas}}}}}\''
        )
    block = block or canvas
    if canvas % block:
        nearest = _nearest_divisor(canvas, block)
        if "diffusion_block_length" in raw or "diffusion_canvas_length" not in raw:
            raise ValueError(
                f"diffusion_block_length {block} does not divide diffusion_canvas_length {canvas}; "
                f"use a divisor, for example {nearest}"
            )
        block = nearest  # the server's default, beside a canvas that the request names
    return canvas, block


def check_lengths(plan: Plan, max_model_len: int, settings: ServerSettings) -> str | None:
    """None if prompt, canvas and suffix fit, else what to tell the user."""
    lengths = f"prompt of {plan.prompt_len}, canvas of {plan.canvas_len} and suffix of {plan.suffix_len} tokens"
    if plan.total_len > max_model_len:
        return (
            f"{lengths} exceed the model's {max_model_len} positions; shorten the prompt, use a smaller image, or "
            "lower max_tokens or diffusion_canvas_length"
        )
    if plan.canvas_len + plan.suffix_len > settings.max_canvas_length:
        return (
            f"canvas and suffix together exceed the server's max_canvas_length {settings.max_canvas_length} "
            f"({lengths}); lower diffusion_canvas_length or shorten diffusion_suffix"
        )
    return None


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))
