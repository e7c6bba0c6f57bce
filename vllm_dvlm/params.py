"""Per-request settings and server settings: parsed once, frozen, strict.

One parser for both sides: the front end runs it to answer HTTP 400, scheduler and worker run it again on what the
front end let through. Neither torch nor vllm is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vllm_dvlm.families.base import Family
from vllm_dvlm.option_checks import choice, integer, number, optional, switch, text, unknown
from vllm_dvlm.pruning.names import AT_LAYER, ROWS, known_methods
from vllm_dvlm.terms import Plan, pruned_prompt_len, round_up

REMASKING = ("low_confidence", "random", "entropy", "margin")
SCHEDULES = ("uniform", "cosine", "shift", "logit_normal")
STREAMS = ("committed", "provisional")
POSITIONS = ("renumber", "keep")

# Rows that each built-in method takes; a method of a third party checks its own.
_ROWS_OF = {
    "none": (),
    "redvtp": ("masked", "committed", "response_prompt", "all"),
    "fastv": ("masked", "response_prompt", "all", "last"),
    "random": (),
    "uniform": (),
    "diversity": (),
}

# Keys that vLLM itself reads from extra_args; they are its business, not ours.
VLLM_EXTRA_ARGS = frozenset({"kv_cache_report_mode", "session_id"})
# Written by our scheduler for our worker, never accepted from a user.
RESUME_KEY = "_dvlm_resume"


# Settings that may be null: what they mean then is worked out elsewhere.
_MAY_BE_ABSENT = (
    "default_canvas_length",
    "default_block_length",
    "default_max_steps",
    "max_image_tiles",
    "logits_chunk_bytes",
    "num_layers",
)


def _setting(default: Any, doc: str, values: str) -> Any:
    return field(default=default, metadata={"doc": doc, "values": values})


@dataclass(frozen=True)
class DenoiseParams:
    """Settings of one request, as the user wrote them; None means 'derived' (see ``resolve``).

    The README's table of options is made from this class.
    """

    diffusion_canvas_length: int | None = _setting(
        None,
        "length of the canvas; default: `max_tokens` rounded up to whole blocks, without it the server's "
        "`default_canvas_length`",
        "1 … server maximum, or none",
    )
    diffusion_block_length: int | None = _setting(
        None, "semi-autoregressive blocks; default: the canvas is one block", "divides the canvas, or none"
    )
    diffusion_max_steps: int | None = _setting(
        None,
        "denoising steps for the whole canvas; default: one per canvas position",
        "a multiple of the blocks, or none",
    )
    diffusion_remasking: str = _setting(
        "low_confidence", "confidence that decides what is unmasked", "|".join(REMASKING)
    )
    diffusion_threshold: float | None = _setting(
        None, "Fast-dLLM parallel decoding, factor rule: the number of steps follows the confidence", "> 0, or none"
    )
    diffusion_schedule: str = _setting("uniform", "tokens per step", "uniform")
    diffusion_schedule_shift: float | None = _setting(None, "shift of the `shift` schedule", "not for this family")
    diffusion_refresh_interval: int = _setting(
        1, "1: exact, every step recomputes everything; N: prompt and finished blocks are cached for N steps", "≥ 1"
    )
    diffusion_cfg_scale: float = _setting(0.0, "classifier-free guidance (not supported yet)", "0")
    diffusion_suffix: str = _setting("", "fixed text behind the canvas, visible to all positions", "text")
    diffusion_stream: str = _setting("committed", "what a stream delivers", "committed")
    prune_method: str = _setting("none", "how the visual tokens that stay are chosen in the first step", "see below")
    prune_keep_ratio: float = _setting(0.5, "share of visual tokens kept", "(0, 1]")
    prune_layer: int | None = _setting(
        None, "fastv: layer of the first step after which it prunes; default: half the layers", "1 … layers − 1"
    )
    prune_rows: str | None = _setting(
        None, "rows whose attention scores visual tokens; default: the method's own", "|".join(ROWS)
    )
    prune_positions: str = _setting("renumber", "rotary positions of the survivors", "|".join(POSITIONS))
    diffusion_trace: int = _setting(0, "1: write a trace of the request to the server's `trace_dir`", "0|1")


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one server, from ``--additional-config '{"dvlm": {...}}'``.

    ``defaults`` holds values of request options for requests that do not set them; in the JSON they stand beside the
    other settings. ``num_layers`` and what the family says of blocks and steps are filled in by the config hook.
    """

    defaults: DenoiseParams = DenoiseParams()
    max_canvas_length: int = _setting(512, "largest canvas, suffix included, that a request may ask for", "≥ 1")
    default_canvas_length: int | None = _setting(
        None,
        "canvas of requests that name neither a canvas nor `max_tokens`; default: the family's",
        "1 … `max_canvas_length`",
    )
    max_image_tiles: int | None = _setting(None, "most tiles of one image; default: the checkpoint's grid", "≥ 1")
    trace_dir: str | None = _setting(None, "folder for traces; without it `diffusion_trace` is refused", "path")
    logits_chunk_bytes: int | None = _setting(
        None, "bound on vocabulary logits held at once; default: 8 to 32 MiB on a CPU, 256 MiB on a GPU", "≥ 1"
    )
    fastv_kv_groups: str = _setting(
        "auto", "auto: with fastv as default method and an even split, late layers get their own KV group", "auto|one"
    )
    cpu_dtype: str = _setting("float32", "dtype on a CPU host (a GPU follows `--dtype`)", "float32|bfloat16")
    num_layers: int | None = None
    default_block_length: int | None = None
    default_max_steps: int | None = None

    @classmethod
    def from_additional_config(cls, additional_config: Mapping[str, Any] | None) -> ServerSettings:
        """Read the ``dvlm`` entry; ValueError with the remedy for anything unknown or ill-typed."""
        raw = (additional_config or {}).get("dvlm", {})
        if not isinstance(raw, Mapping):
            raise ValueError(f'additional-config "dvlm" must be an object of settings, not {type(raw).__name__}')
        own = {f.name for f in fields(cls)} - {"defaults"}
        known = cls.names()
        for key in raw:
            if key not in known:
                raise ValueError(unknown(key, known, "server setting"))
        settings = cls(defaults=_parse({k: v for k, v in raw.items() if k not in own}))
        for key in own & set(raw):
            value = raw[key]
            if key == "trace_dir":
                if value is not None and not isinstance(value, str):
                    raise ValueError(f"trace_dir must be a path, not {value!r}")
            elif key == "fastv_kv_groups":
                choice(key, value, ("auto", "one"))
            elif key == "cpu_dtype":
                choice(key, value, ("float32", "bfloat16"))
            elif value is None and key in _MAY_BE_ABSENT:
                pass
            else:
                value = integer(key, value, minimum=1)
            settings = replace(settings, **{key: value})
        if (settings.default_canvas_length or 0) > settings.max_canvas_length:
            raise ValueError(
                f"default_canvas_length {settings.default_canvas_length} is larger than max_canvas_length "
                f"{settings.max_canvas_length}; lower the one or raise the other"
            )
        return settings

    @classmethod
    def names(cls) -> set[str]:
        """What the ``dvlm`` entry may say: settings, and options as defaults."""
        return {f.name for c in (cls, DenoiseParams) for f in fields(c)} - {"defaults"}

    def for_model(self, num_layers: int, family: Family) -> ServerSettings:
        """The settings with what the model says where they say nothing."""
        canvas = self.default_canvas_length or min(family.default_canvas_len, self.max_canvas_length)
        blocks = {}
        if canvas == family.default_canvas_len:
            blocks = {"default_block_length": family.default_block_len, "default_max_steps": family.default_steps}
        return replace(self, num_layers=num_layers, default_canvas_length=canvas, **blocks)

    def late_group_start(self) -> int | None:
        """Layers before the late KV cache group; None if all layers share one group.

        vLLM pads groups to the same number of layers unless they differ by less than half.
        """
        if self.num_layers is None or self.fastv_kv_groups == "one" or self.defaults.prune_method not in AT_LAYER:
            return None
        early = self.defaults.prune_layer or max(1, self.num_layers // 2)
        late = self.num_layers - early
        return early if min(early, late) > 0 and max(early, late) <= 1.5 * min(early, late) else None

    def to_mapping(self) -> dict[str, Any]:
        """Inverse of ``from_additional_config``, without the key ``dvlm``."""
        raw = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "defaults"}
        default = DenoiseParams()
        for f in fields(DenoiseParams):
            if getattr(self.defaults, f.name) != getattr(default, f.name):
                raw[f.name] = getattr(self.defaults, f.name)
        return raw

    def to_name(self) -> str:
        """Encode as an identifier suffix, for classes that any process rebuilds from their name alone."""
        return json.dumps(self.to_mapping(), sort_keys=True).encode().hex()

    @classmethod
    def from_name(cls, name: str) -> ServerSettings:
        """Inverse of ``to_name``."""
        return cls.from_additional_config({"dvlm": json.loads(bytes.fromhex(name).decode())})


@dataclass(frozen=True)
class ResolvedParams:
    """Settings of one request after every default is filled in; what scheduler and worker compute with.

    max_new_tokens: output tokens after which the request ends; the suffix does not count against ``max_tokens``.
    """

    options: DenoiseParams
    canvas_len: int
    block_len: int
    max_steps: int
    max_tokens: int

    @property
    def num_blocks(self) -> int:
        """Blocks of the canvas."""
        return self.canvas_len // self.block_len

    def plan(self, prompt_len: int, suffix_len: int) -> Plan:
        """The course of the request, for ``terms.advance``; lengths in tokens."""
        steps = None
        if self.options.diffusion_threshold is None:
            # Steps beyond one per position unmask nothing and would repeat the same forward pass.
            steps = min(self.max_steps // self.num_blocks, self.block_len)
        return Plan(
            prompt_len, self.canvas_len, suffix_len, self.block_len, steps, self.options.diffusion_refresh_interval
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
    def emits_suffix(self) -> bool:
        """False if ``max_tokens`` ends the reply inside the canvas."""
        return self.max_tokens >= self.canvas_len

    def max_new_tokens(self, suffix_len: int) -> int:
        """Output tokens after which the request ends."""
        return self.canvas_len + suffix_len if self.emits_suffix else self.max_tokens


@dataclass(frozen=True)
class Space:
    """Where a request's canvas and suffix must fit; all counts in tokens.

    room: the model's positions behind the prompt.
    suffix_len: tokens of a suffix text.
    """

    room: int
    suffix_len: Callable[[str], int]


def resolve(
    extra_args: Mapping[str, Any] | None,
    max_tokens: int | None,
    settings: ServerSettings,
    space: Space | None = None,
) -> ResolvedParams:
    """Parse a request's options against the server's defaults and limits.

    Args:
        extra_args: flat options (``SamplingParams.extra_args``, ``vllm_xargs`` over HTTP).
        max_tokens: vLLM's limit on output tokens; None if unlimited.
        settings: the server's settings.
        space: None as long as the prompt is not known.

    Raises:
        ValueError: unknown, ill-typed, contradictory or unsupported option; names the option and the remedy.
    """
    raw = {k: v for k, v in (extra_args or {}).items() if k not in VLLM_EXTRA_ARGS and k != RESUME_KEY}
    defaults = settings.defaults
    if raw.get("prune_method", defaults.prune_method) != defaults.prune_method:
        # The server's layer and rows belong to its own method; a request that names another one takes that one's.
        defaults = replace(defaults, prune_layer=None, prune_rows=None)
    opts = _parse(raw, base=defaults)
    _refuse_unsupported(opts, settings)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}: the canvas needs a position")
    # What nobody names vLLM fills in with all that fits.
    is_unnamed = opts.diffusion_canvas_length is None and settings.default_canvas_length is not None
    is_unnamed &= max_tokens is None or (space is not None and max_tokens == space.room)
    if is_unnamed:
        room = settings.default_canvas_length if space is None else space.room
        max_tokens = max(1, min(settings.default_canvas_length, room))
    canvas, block = _canvas_and_block(opts, raw, max_tokens, settings.max_canvas_length, space)
    steps = opts.diffusion_max_steps
    if is_unnamed and canvas == settings.default_canvas_length and opts.diffusion_block_length is steps is None:
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
    return ResolvedParams(opts, canvas, block, steps, canvas if max_tokens is None else max_tokens)


def _canvas_and_block(
    opts: DenoiseParams, raw: Mapping[str, Any], max_tokens: int | None, limit: int, space: Space | None
) -> tuple[int, int]:
    """Length of the canvas and of its blocks. raw: what the request itself names; limit: the server's."""
    canvas, block = opts.diffusion_canvas_length, opts.diffusion_block_length
    if canvas is None:
        canvas = round_up(limit if max_tokens is None else max_tokens, block or 1)
        # max_tokens is an upper bound and the OpenAI layer fills in 'all that fits'; a canvas that nobody asked for
        # by name is therefore cut to what there is room for, and the reply ends with reason 'length'.
        most = limit
        if space is not None:
            suffix_len = space.suffix_len(opts.diffusion_suffix)
            most -= suffix_len
            if max_tokens is None or max_tokens <= space.room:  # else max_tokens itself is refused
                most = min(most, space.room - suffix_len)
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


def _refuse_unsupported(opts: DenoiseParams, settings: ServerSettings) -> None:
    if opts.diffusion_cfg_scale != 0:
        raise ValueError("diffusion_cfg_scale: classifier-free guidance is not supported yet; leave it at 0")
    if opts.diffusion_schedule != "uniform" or opts.diffusion_schedule_shift is not None:
        raise ValueError("diffusion_schedule: this model family unmasks by the uniform schedule; use 'uniform'")
    if opts.diffusion_stream != "committed":
        raise ValueError("diffusion_stream: only 'committed' is supported yet")
    if opts.prune_layer is not None:
        if opts.prune_method != "fastv":
            raise ValueError(f"prune_layer belongs to prune_method 'fastv', not {opts.prune_method!r}; remove it")
        if settings.num_layers is not None and opts.prune_layer >= settings.num_layers:
            raise ValueError(f"prune_layer must be from 1 to {settings.num_layers - 1}, not {opts.prune_layer}")
    check = _ROWS_OF.get(opts.prune_method)
    if opts.prune_rows is not None and check is not None and opts.prune_rows not in check:
        raise ValueError(
            f"prune_rows {opts.prune_rows!r} does not go with prune_method {opts.prune_method!r}; "
            f"use one of {', '.join(check) or 'none: remove it'}"
        )
    if opts.diffusion_trace and settings.trace_dir is None:
        raise ValueError(
            "diffusion_trace: this server writes no traces; start it with "
            '--additional-config \'{"dvlm": {"trace_dir": "FOLDER"}}\' or leave diffusion_trace at 0'
        )


def _parse(raw: Mapping[str, Any], base: DenoiseParams | None = None) -> DenoiseParams:
    known = {f.name for f in fields(DenoiseParams)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in known:
            raise ValueError(unknown(key, known, "option"))
        values[key] = _CHECKS[key](key, value)
    return replace(base or DenoiseParams(), **values)


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


_CHECKS: dict[str, Any] = {
    "diffusion_canvas_length": optional(lambda k, v: integer(k, v, 1)),
    "diffusion_block_length": optional(lambda k, v: integer(k, v, 1)),
    "diffusion_max_steps": optional(lambda k, v: integer(k, v, 1)),
    "diffusion_remasking": lambda k, v: choice(k, v, REMASKING),
    "diffusion_threshold": optional(lambda k, v: number(k, v, "a number > 0", lambda x: x > 0)),
    "diffusion_schedule": lambda k, v: choice(k, v, SCHEDULES),
    "diffusion_schedule_shift": optional(lambda k, v: number(k, v, "a number > 0", lambda x: x > 0)),
    "diffusion_refresh_interval": lambda k, v: integer(k, v, 1),
    "diffusion_cfg_scale": lambda k, v: number(k, v, "a number ≥ 0", lambda x: x >= 0),
    "diffusion_suffix": text,
    "diffusion_stream": lambda k, v: choice(k, v, STREAMS),
    "prune_method": lambda k, v: choice(k, v, known_methods()),
    "prune_keep_ratio": lambda k, v: number(k, v, "a number in (0, 1]", lambda x: 0 < x <= 1),
    "prune_layer": optional(lambda k, v: integer(k, v, 1)),
    "prune_rows": optional(lambda k, v: choice(k, v, ROWS)),
    "prune_positions": lambda k, v: choice(k, v, POSITIONS),
    "diffusion_trace": switch,
}
