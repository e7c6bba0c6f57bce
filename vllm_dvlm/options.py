"""Options of a request, as its user writes them: names, values, defaults, and the check of each by itself.

What they come to together with prompt and server: ``placement``. Neither torch nor vllm is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vllm_dvlm.option_checks import choice, draft, integer, number, optional, shown, switch, text, unknown
from vllm_dvlm.pruning.names import ROWS, known_methods

REMASKING = ("low_confidence", "random", "entropy", "margin")
# Names in the official code of one family or another.
REMASKING_ALIASES = {"entrophy": "entropy", "topk_margin": "margin", "maskgit_plus": "low_confidence"}
SCHEDULES = ("uniform", "linear", "shift", "cosine", "logit_normal")
STREAMS = ("committed", "provisional")
# Name and values of other servers -> ours.
STREAM_ALIASES: dict[str, tuple[tuple[Any, str], ...]] = {
    "stream_mode": (("denoise", "provisional"), ("block_append", "committed")),
    "diffusing": ((True, "provisional"), (False, "committed")),
}
POSITIONS = ("renumber", "keep")
ATTENTIONS = ("prefix", "full")

# Keys that vLLM itself reads from extra_args; they are its business, not ours.
VLLM_EXTRA_ARGS = frozenset({"kv_cache_report_mode", "session_id"})
# Written by our scheduler for our worker, never accepted from a user: where a request that comes back stands, and what
# its options come to.
RESUME_KEY = "_dvlm_resume"
PLACED_KEY = "_dvlm_placed"
OWN_KEYS = frozenset({RESUME_KEY, PLACED_KEY})


def setting(default: Any, doc: str, values: str) -> Any:
    """A field whose line in the README's tables is made from ``doc`` and ``values``."""
    return field(default=default, metadata={"doc": doc, "values": values})


@dataclass(frozen=True)
class DenoiseParams:
    """Settings of one request, as the user wrote them; None means 'derived' (see ``resolve``).

    The README's table of options is made from this class.
    """

    diffusion_canvas_length: int | None = setting(
        None,
        "length of the canvas; default: `max_tokens` rounded up to whole blocks, without it the server's "
        "`default_canvas_length`",
        "1 … server maximum, or none",
    )
    diffusion_block_length: int | None = setting(
        None, "semi-autoregressive blocks; default: the canvas is one block", "divides the canvas, or none"
    )
    diffusion_max_steps: int | None = setting(
        None,
        "denoising steps for the whole canvas; default: one per canvas position",
        "a multiple of the blocks, or none",
    )
    diffusion_remasking: str = setting(
        "low_confidence", "confidence that decides what is unmasked", "|".join(REMASKING)
    )
    diffusion_top_k: int | None = setting(
        None,
        "likeliest tokens among which confidence is measured, 0: all; default: the family's; not every family has it",
        "≥ 0, or none",
    )
    diffusion_threshold: float | None = setting(
        None, "Fast-dLLM parallel decoding, factor rule: the number of steps follows the confidence", "> 0, or none"
    )
    diffusion_step_ratio: float | None = setting(
        None, "share of the steps that is taken, with more tokens in each; not every family has it", "(0, 1], or none"
    )
    diffusion_schedule: str = setting(
        "uniform", "tokens per step; which ones depends on the family", "|".join(SCHEDULES)
    )
    diffusion_schedule_shift: float | None = setting(
        None, "of schedule `shift`: below 1 most tokens come early, above 1 late; default: 3", "> 0, or none"
    )
    diffusion_attention: str | None = setting(
        None,
        "`prefix`: the prompt attends to itself only and is computed once; `full`: it sees the canvas; default: the "
        "family's first",
        "|".join(ATTENTIONS),
    )
    diffusion_draft: str | tuple[int, ...] = setting(
        "",
        "start of the canvas, kept as it is: token ids, or text; `<mask:N>` in it stands for N positions to fill (in a "
        "list: the mask token's id)",
        "text or token ids",
    )
    diffusion_refresh_interval: int = setting(
        1, "1: exact, every step recomputes everything; N: prompt and finished blocks are cached for N steps", "≥ 1"
    )
    diffusion_cfg_scale: float = setting(0.0, "classifier-free guidance (not supported yet)", "0")
    diffusion_suffix: str = setting("", "fixed text behind the canvas, visible to all positions", "text")
    diffusion_stream: str = setting(
        "committed", "what a stream delivers: committed text, or with it the canvas of each step", "|".join(STREAMS)
    )
    diffusion_stream_every: int = setting(1, "`provisional`: the canvas of every Nth step", "≥ 1")
    prune_method: str = setting("none", "how the visual tokens that stay are chosen in the first step", "see below")
    prune_keep_ratio: float = setting(0.5, "share of visual tokens kept", "(0, 1]")
    prune_layer: int | None = setting(
        None, "fastv: layer of the first step after which it prunes; default: half the layers", "1 … layers − 1"
    )
    prune_rows: str | None = setting(
        None, "rows whose attention scores visual tokens; default: the method's own", "|".join(ROWS)
    )
    prune_positions: str = setting("renumber", "rotary positions of the survivors", "|".join(POSITIONS))
    diffusion_trace: int = setting(0, "1: write a trace of the request to the server's `trace_dir`", "0|1")


def _other_names(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Other servers' names for `diffusion_stream`, as that. ValueError for values that mean nothing."""
    found = dict(raw)
    for key, meanings in STREAM_ALIASES.items():
        if key not in found:
            continue
        given = found.pop(key)
        kinds = (str,) if isinstance(meanings[0][0], str) else (bool, int, float)
        stream = next((name for value, name in meanings if isinstance(given, kinds) and given == value), None)
        if stream is None:
            allowed = ", ".join(str(value).lower() for value, _ in meanings)
            raise ValueError(f"{key} must be one of {allowed}, not {shown(given)}")
        if found.setdefault("diffusion_stream", stream) != stream:
            raise ValueError(f"{key} {shown(given)} contradicts diffusion_stream {shown(found['diffusion_stream'])}")
    return found


def parse(raw: Mapping[str, Any], base: DenoiseParams | None = None) -> DenoiseParams:
    """Options by name to checked options; ValueError for what is unknown or ill-typed. base: what is not in ``raw``."""
    known = {f.name for f in fields(DenoiseParams)}
    values: dict[str, Any] = {}
    for key, value in _other_names(raw).items():
        if key not in known:
            raise ValueError(unknown(key, known, "option"))
        values[key] = _CHECKS[key](key, value)
    return replace(base or DenoiseParams(), **values)


def _official(remasking: Any) -> Any:
    return REMASKING_ALIASES.get(remasking, remasking) if isinstance(remasking, str) else remasking


_CHECKS: dict[str, Any] = {
    "diffusion_canvas_length": optional(lambda k, v: integer(k, v, 1)),
    "diffusion_block_length": optional(lambda k, v: integer(k, v, 1)),
    "diffusion_max_steps": optional(lambda k, v: integer(k, v, 1)),
    "diffusion_remasking": lambda k, v: choice(k, _official(v), REMASKING),
    "diffusion_top_k": optional(lambda k, v: integer(k, v, 0)),
    "diffusion_threshold": optional(lambda k, v: number(k, v, "a number > 0", lambda x: x > 0)),
    "diffusion_step_ratio": optional(lambda k, v: number(k, v, "a number in (0, 1]", lambda x: 0 < x <= 1)),
    "diffusion_attention": optional(lambda k, v: choice(k, v, ATTENTIONS)),
    "diffusion_draft": draft,
    "diffusion_schedule": lambda k, v: choice(k, v, SCHEDULES),
    "diffusion_schedule_shift": optional(lambda k, v: number(k, v, "a number > 0", lambda x: x > 0)),
    "diffusion_refresh_interval": lambda k, v: integer(k, v, 1),
    "diffusion_cfg_scale": lambda k, v: number(k, v, "a number ≥ 0", lambda x: x >= 0),
    "diffusion_suffix": text,
    "diffusion_stream": lambda k, v: choice(k, v, STREAMS),
    "diffusion_stream_every": lambda k, v: integer(k, v, 1),
    "prune_method": lambda k, v: choice(k, v, known_methods()),
    "prune_keep_ratio": lambda k, v: number(k, v, "a number in (0, 1]", lambda x: 0 < x <= 1),
    "prune_layer": optional(lambda k, v: integer(k, v, 1)),
    "prune_rows": optional(lambda k, v: choice(k, v, ROWS)),
    "prune_positions": lambda k, v: choice(k, v, POSITIONS),
    "diffusion_trace": switch,
}
