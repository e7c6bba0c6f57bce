"""Checks at the front door: what is wrong with a request is said as HTTP 400 or ValueError, before the engine sees it.

For every request vLLM calls, in one function: ``validate_params`` of the classes in ``model_config.logits_processors``,
which see the parameters, then the platform's ``validate_request``, which sees the prompt, too. An error raised in the
former would reach the caller as one that is no ValueError, so it only notes whose request this is; the latter checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from vllm_dvlm.option_checks import shown
from vllm_dvlm.options import OWN_KEYS, VLLM_EXTRA_ARGS
from vllm_dvlm.placement import MASKED, ResolvedParams, Texts, check_lengths, place, read
from vllm_dvlm.pruning import create
from vllm_dvlm.sampling_parameters import (
    CHARACTERS_PER_TOKEN,
    FAMILY_PARAMETERS,
    MAX_EXTRA_TEXT,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    OWN_NAMES,
    SAMPLING_PARAMETERS,
    Refused,
    Spelling,
    asks_for_nothing,
)
from vllm_dvlm.serving import provisional_stream
from vllm_dvlm.serving.errors import InvalidRequest
from vllm_dvlm.serving.stream_status import is_http, note_admission
from vllm_dvlm.settings import ServerSettings

if TYPE_CHECKING:
    from vllm import PoolingParams
    from vllm.config import ModelConfig

    from vllm_dvlm.checkpoint.configuration import TokenIds
    from vllm_dvlm.families import Family

_PREFIX = "Options_"


def check_sampling_params(
    params: SamplingParams,
    settings: ServerSettings,
    room: int | None = None,
    spelling: Spelling = OWN_NAMES,
    limits: PromptLimits | None = None,
) -> ResolvedParams:
    """InvalidRequest naming the parameter and the remedy, for what is wrong whatever the prompt says.

    room: the model's positions behind the prompt; None if the prompt is not known.
    spelling: the names that the request's API has for parameters.
    limits: knows the ids with a role in decoding; None if no renderer of ours has been made in this process.
    Returns what the options come to.
    """
    if _is_beam_search(params):
        raise InvalidRequest(
            "use_beam_search: beam search extends texts token by token and is not possible with masked-diffusion "
            "decoding; use n > 1 with a temperature above 0",
            parameter="use_beam_search",
        )
    _refuse_unsupported(params, spelling, settings.family)
    if params.logprobs is not None and params.logprobs < 0:
        name = spelling.of("logprobs")
        raise InvalidRequest(
            f"{name}={params.logprobs} asks for the whole vocabulary, which is not supported by masked-diffusion "
            "decoding; ask for a number of tokens, at least 0",
            parameter=name,
        )
    _check_stops(params, limits)
    _check_extra_args(params.extra_args or {}, settings)
    with _refusals():
        asked = read(params.extra_args, settings)
        texts = Texts() if limits is None else asked.texts(limits.encode, limits.mask_token_id)
        resolved = place(asked, params.max_tokens, settings, room, texts)
        options = resolved.options
        if options.prune_method != "none":
            # A method of a third party says for itself which rows it takes.
            create(options.prune_method, options.prune_rows)
    return resolved


def _refuse_unsupported(params: SamplingParams, spelling: Spelling, family: Family) -> None:
    if spelling.is_chat and spelling.asked_echo and params.prompt_logprobs == 0:
        # An echo alone: nobody asked for log-probabilities of the prompt, vLLM's translation did.
        params.prompt_logprobs = None
    for name, rule in SAMPLING_PARAMETERS.items():
        if not isinstance(rule, Refused) or (family.has_top_k_top_p and name in FAMILY_PARAMETERS):
            continue
        value = getattr(params, name, None)
        if asks_for_nothing(name, value):
            continue
        written = spelling.of(name)
        given = f"={shown(value)}" if written == name and isinstance(value, (int, float, str)) else ""
        if written == name == "prompt_logprobs" and value == _echoed(params, spelling):
            given += f" (which echo with {spelling.logprobs} asks for, too)"
        raise InvalidRequest(
            f"{written}{given} is not supported by masked-diffusion decoding; {rule.remedy}",
            parameter=None if " or " in written else written.split()[0],
        )


def _echoed(params: SamplingParams, spelling: Spelling) -> int | None:
    """What vLLM's front end makes prompt_logprobs of an echo; None if it cannot have been one."""
    if spelling is OWN_NAMES:
        return None
    return 0 if params.logprobs is None and spelling.is_chat else params.logprobs


def _check_stops(params: SamplingParams, limits: PromptLimits | None) -> None:
    """Bounds of what ends a reply, and that it can."""
    strings, ids = params.stop or [], params.stop_token_ids or []
    if isinstance(strings, str):
        strings = [strings]
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop: {len(strings)} strings; use at most {MAX_STOP_STRINGS}", parameter="stop")
    longest = max(map(len, strings), default=0)
    if longest > MAX_STOP_CHARACTERS:
        raise InvalidRequest(
            f"stop: a string of {longest} characters; use at most {MAX_STOP_CHARACTERS}", parameter="stop"
        )
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids has {len(ids)} ids; use at most {MAX_STOP_TOKEN_IDS}", parameter="stop_token_ids"
        )
    for token_id in ids if limits is not None else ():
        role = limits.role_of(token_id)
        if role is not None:
            raise InvalidRequest(
                f"stop_token_ids: no reply contains id {token_id}, {role}; remove it", parameter="stop_token_ids"
            )


def _check_extra_args(extra_args: Mapping[str, Any], settings: ServerSettings) -> None:
    """Bounds of texts, before anybody tokenizes them, and keys that are none of our options."""
    most = CHARACTERS_PER_TOKEN * settings.max_canvas_length
    for key, place_of in (("diffusion_suffix", "behind the canvas into"), ("diffusion_draft", "into")):
        value = extra_args.get(key)
        if isinstance(value, str) and len(value) > most:
            raise InvalidRequest(
                f"{key} has {len(value)} characters; use at most {most}, and no more tokens than fit {place_of} "
                f"max_canvas_length {settings.max_canvas_length}",
                parameter=key,
            )
    for key in OWN_KEYS & extra_args.keys():
        raise InvalidRequest(f"{key} is not an option; remove it", parameter=key)
    for key in ("kv_transfer_params", "ec_transfer_params"):
        if key in extra_args:
            raise InvalidRequest(
                f"{key}: this server neither sends nor receives what another has computed; remove it", parameter=key
            )
    for key in VLLM_EXTRA_ARGS & extra_args.keys():
        value = extra_args[key]
        if isinstance(value, (list, tuple, dict)) or len(str(value)) > MAX_EXTRA_TEXT:
            raise InvalidRequest(f"{key} must be a text of at most {MAX_EXTRA_TEXT} characters", parameter=key)


@contextmanager
def _refusals() -> Iterator[None]:
    """ValueErrors of options as InvalidRequest: their messages begin with the name of what is wrong."""
    try:
        yield
    except ValueError as error:
        raise InvalidRequest(str(error), parameter=str(error).split()[0].rstrip(":")) from error


def _is_beam_search(params: SamplingParams) -> bool:
    """True for the one-token requests of which vLLM's front end makes a beam search.

    Nothing else tells them apart: no parameter says so, and their prompts are made anew for every token.
    """
    return params.max_tokens == 1 and params.watermarking is False and not params.detokenize and bool(params.logprobs)


@dataclass(frozen=True)
class PromptLimits:
    """What a prompt is checked against, attached to it by the renderer under ``PROMPT_LIMITS_KEY``.

    model_config: vLLM's; its ``max_model_len`` may shrink after the renderer is made (``--max-model-len auto``).
    token_ids: the ids with a role in decoding.
    image_token_id: stands for visual tokens in a prompt.
    encode: text to token ids without special tokens, for the suffix.
    """

    settings: ServerSettings
    model_config: ModelConfig
    token_ids: TokenIds
    image_token_id: int
    encode: Callable[[str], list[int]]

    @property
    def max_model_len(self) -> int:
        """Positions of the model, as of now."""
        return self.model_config.max_model_len

    @property
    def mask_token_id(self) -> int:
        """The token of an undecided position."""
        return self.token_ids.mask_token_id

    def role_of(self, token_id: int) -> str | None:
        """What keeps an id out of every reply; None for ids that a reply may contain."""
        ids = self.token_ids
        if token_id == ids.mask_token_id:
            return "the mask token, which marks positions to be filled"
        if token_id == self.image_token_id:
            return "which stands for an image in prompts"
        if token_id in ids.forbidden_token_ids:
            return "which masked-diffusion decoding never writes"
        if not 0 <= token_id < ids.num_tokens:
            return f"which is none of the tokenizer's {ids.num_tokens} ids"
        return None


PROMPT_LIMITS_KEY = "dvlm_limits"
SPELLING_KEY = "dvlm_spelling"

# Parameters that vLLM is about to validate, with the settings of their server, between its two calls.
_noted: ContextVar[tuple[SamplingParams, ServerSettings] | None] = ContextVar("dvlm_noted", default=None)
# The latest limits of each server of this process, for prompts that no renderer has seen.
_limits: dict[ServerSettings, PromptLimits] = {}


def remember(limits: PromptLimits) -> None:
    """Called by a renderer once it knows its limits."""
    _limits[limits.settings] = limits


def validate_request(engine_input: Mapping[str, Any], params: SamplingParams | PoolingParams) -> None:
    """Check a rendered prompt together with its parameters; for ``Platform.validate_request``.

    Requests to other models pass. Raises InvalidRequest (HTTP 400, a ValueError).
    """
    try:
        _check_request(engine_input, params)
    except BaseException:
        note_admission(False)
        raise
    note_admission(True)


def _check_request(engine_input: Mapping[str, Any], params: SamplingParams | PoolingParams) -> None:
    noted = _noted.get()
    _noted.set(None)
    if noted is None or noted[0] is not params:
        return
    # Some of vLLM's less common endpoints do not ask the renderer.
    limits: PromptLimits | None = engine_input.get(PROMPT_LIMITS_KEY) or _limits.get(noted[1])
    if engine_input.get("type") == "multimodal" and PROMPT_LIMITS_KEY not in engine_input:
        # Tensors and their places in the prompt as the client says: what does not fit would end the engine.
        raise InvalidRequest(
            "features: this server takes no images that another one has processed; send the images themselves",
            parameter="features",
        )
    spelling: Spelling = engine_input.get(SPELLING_KEY, OWN_NAMES)
    token_ids = engine_input.get("prompt_token_ids")
    room = limits.max_model_len - len(token_ids) if limits is not None and token_ids else None
    resolved = check_sampling_params(params, noted[1], room, spelling, limits)
    _check_stream(params, resolved)
    if limits is not None:
        _check_prompt(token_ids, resolved, limits, params, spelling)


def _check_stream(params: SamplingParams, resolved: ResolvedParams) -> None:
    """A stream that shows canvases needs somebody who watches."""
    if resolved.options.diffusion_stream != "provisional":
        return
    channel = provisional_stream.channel()
    interval = params.stream_interval or (channel.stream_interval if channel is not None else 1)
    if params.n > 1:
        problem = f"shows one canvas, not {params.n}: leave n at 1"
    elif interval > 1:
        where = "" if params.stream_interval else "--"
        problem = (
            f"shows the canvas of each step, and {where}stream-interval {interval} would hide those in between: leave "
            "it at 1 and use diffusion_stream_every"
        )
    elif is_http() and channel is None:
        problem = "works on /v1/chat/completions and /v1/completions: use one of them"
    elif params.output_kind == RequestOutputKind.FINAL_ONLY:
        problem = "shows the canvas of each step, and this request is answered at once: set stream to true"
    else:
        return
    raise InvalidRequest(f"diffusion_stream 'provisional' {problem}", parameter="diffusion_stream")


def _check_prompt(
    token_ids: list[int] | None,
    resolved: ResolvedParams,
    limits: PromptLimits,
    params: SamplingParams,
    spelling: Spelling,
) -> None:
    if not token_ids:
        raise InvalidRequest(
            "masked-diffusion models take text or token prompts with at least one token", parameter="prompt"
        )
    if limits.mask_token_id in token_ids:
        raise InvalidRequest(
            "the prompt contains the mask token, which marks positions to be filled; remove it", parameter="prompt"
        )
    for token_id, what in ((limits.mask_token_id, "mask token"), (limits.image_token_id, "placeholder of images")):
        if token_id in resolved.texts.suffix_ids:
            raise InvalidRequest(f"diffusion_suffix must not contain the {what}", parameter="diffusion_suffix")
    for token_id in resolved.texts.draft:
        if token_id == limits.image_token_id or (token_id != MASKED and token_id >= limits.token_ids.num_tokens):
            raise InvalidRequest(
                f"diffusion_draft contains id {token_id}, {limits.role_of(token_id)}; remove it",
                parameter="diffusion_draft",
            )
    problem = check_lengths(resolved.plan(len(token_ids)), limits.max_model_len, limits.settings)
    if problem is not None:
        sent = [name for name in ("diffusion_canvas_length", "diffusion_suffix") if name in (params.extra_args or {})]
        parameter = next(iter(sent), spelling.max_tokens)
        raise InvalidRequest(problem.replace("max_tokens", spelling.max_tokens), parameter=parameter)


class OptionsValidator(LogitsProcessor):
    """Marks requests as ours; changes no logits. Subclasses carry the server's settings.

    vLLM builds these classes from their names in any process and gives them no config, so the settings travel in the
    name (``Options_<hex>``).
    """

    settings = ServerSettings()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """vLLM's admission hook; never raises."""
        _noted.set((sampling_params, cls.settings))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def add_request(self, *args: Any, **kwargs: Any) -> bool:
        """False: never applied to a request's logits."""
        return False

    def apply(self, logits: Any, *args: Any, **kwargs: Any) -> Any:
        """Identity."""
        return logits


def __getattr__(name: str) -> type[OptionsValidator]:
    """``Options_<hex>`` -> a validator with the settings that the hex spells."""
    if not name.startswith(_PREFIX):
        raise AttributeError(name)
    settings = ServerSettings.from_name(name.removeprefix(_PREFIX))
    validator = type(name, (OptionsValidator,), {"settings": settings, "__module__": __name__})
    globals()[name] = validator
    return validator
