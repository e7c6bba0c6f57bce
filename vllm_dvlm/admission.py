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
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from vllm_dvlm.errors import InvalidRequest
from vllm_dvlm.params import RESUME_KEY, ResolvedParams, ServerSettings, Space, check_lengths, resolve
from vllm_dvlm.pruning import create
from vllm_dvlm.stream_status import note_admission

if TYPE_CHECKING:
    from vllm import PoolingParams

_PREFIX = "Options_"

# Parameters of vLLM that denoising does not honour: (name, neutral values, remedy).
_UNSUPPORTED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("presence_penalty", (0, None), "leave it at 0"),
    ("frequency_penalty", (0, None), "leave it at 0"),
    ("repetition_penalty", (1, None), "leave it at 1"),
    ("top_p", (1, None), "leave it at 1 and use temperature"),
    ("top_k", (0, -1, None), "leave it at 0 and use temperature"),
    ("min_p", (0, None), "leave it at 0 and use temperature"),
    ("min_tokens", (0, None), "leave it at 0; ignore_eos fills the whole canvas"),
    ("logit_bias", (None,), "remove it"),
    ("allowed_token_ids", (None,), "remove it"),
    ("bad_words", (None, []), "remove it"),
    ("prompt_logprobs", (None,), "remove it; logprobs of the reply are available"),
    ("prompt_logprob_token_ids", (None,), "remove it"),
    ("logprob_token_ids", (None,), "remove it; use logprobs=N"),
    ("structured_outputs", (None,), "remove response_format and guided options"),
    ("repetition_detection", (None,), "remove it"),
    ("thinking_token_budget", (None,), "remove it"),
    ("trace_decode_token_ids", (None,), "remove it"),
)


def check_sampling_params(
    params: SamplingParams, settings: ServerSettings, space: Space | None = None
) -> ResolvedParams:
    """InvalidRequest naming the parameter and the remedy, for what is wrong whatever the prompt says.

    space: what the prompt leaves; None if the prompt is not known. Returns what the options come to.
    """
    if _is_beam_search(params):
        raise InvalidRequest(
            "use_beam_search: beam search extends texts token by token and is not possible with masked-diffusion "
            "decoding; use n > 1 with a temperature above 0",
            parameter="use_beam_search",
        )
    for name, neutral, remedy in _UNSUPPORTED:
        value = getattr(params, name, None)
        # Arrays would compare element by element.
        if not any(value is n or (isinstance(value, (int, float, list)) and value == n) for n in neutral):
            shown = f"={value!r}" if isinstance(value, (int, float, str)) else ""
            raise InvalidRequest(
                f"{name}{shown} is not supported by masked-diffusion decoding; {remedy}", parameter=name
            )
    if params.logprobs is not None and params.logprobs < 0:
        raise InvalidRequest("logprobs must be at least 0 for masked-diffusion decoding", parameter="logprobs")
    if RESUME_KEY in (params.extra_args or {}):
        raise InvalidRequest(f"{RESUME_KEY} is not an option; remove it", parameter=RESUME_KEY)
    with _refusals():
        resolved = resolve(params.extra_args, params.max_tokens, settings, space)
        options = resolved.options
        if options.prune_method != "none":
            # A method of a third party says for itself which rows it takes.
            create(options.prune_method, options.prune_rows)
    return resolved


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

    encode: text to token ids without special tokens, for the suffix.
    """

    settings: ServerSettings
    max_model_len: int
    mask_token_id: int
    encode: Callable[[str], list[int]]

    def space(self, prompt_len: int) -> Space:
        """What a prompt of this length leaves for canvas and suffix."""
        return Space(self.max_model_len - prompt_len, lambda text: len(self.encode(text)) if text else 0)


PROMPT_LIMITS_KEY = "dvlm_limits"

# Parameters that vLLM is about to validate, with the settings of their server, between its two calls.
_noted: ContextVar[tuple[SamplingParams, ServerSettings] | None] = ContextVar("dvlm_noted", default=None)


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
    settings = noted[1]
    limits: PromptLimits | None = engine_input.get(PROMPT_LIMITS_KEY)
    if limits is None:  # some of vLLM's less common endpoints do not ask the renderer
        check_sampling_params(params, settings)
        return
    token_ids = engine_input.get("prompt_token_ids")
    resolved = check_sampling_params(params, settings, limits.space(len(token_ids)) if token_ids else None)
    _check_prompt(token_ids, resolved, limits)


def _check_prompt(token_ids: list[int] | None, resolved: ResolvedParams, limits: PromptLimits) -> None:
    if not token_ids:
        raise InvalidRequest(
            "masked-diffusion models take text or token prompts with at least one token", parameter="prompt"
        )
    if limits.mask_token_id in token_ids:
        raise InvalidRequest(
            "the prompt contains the mask token, which marks positions to be filled; remove it", parameter="prompt"
        )
    suffix = limits.encode(resolved.options.diffusion_suffix) if resolved.options.diffusion_suffix else []
    if limits.mask_token_id in suffix:
        raise InvalidRequest("diffusion_suffix must not contain the mask token", parameter="diffusion_suffix")
    problem = check_lengths(resolved.plan(len(token_ids), len(suffix)), limits.max_model_len, limits.settings)
    if problem is not None:
        raise InvalidRequest(problem, parameter="diffusion_canvas_length")


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
