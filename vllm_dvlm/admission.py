"""Checks at the front door: what is wrong with a request is said as HTTP 400 or ValueError, before the engine sees it.

vLLM calls ``validate_params`` of the classes in ``model_config.logits_processors``; they get no config, so the
server's settings travel in the class name (``Options_<hex>``) and any process can rebuild the class from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from vllm_dvlm.params import ServerSettings, check_lengths, resolve

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


def check_sampling_params(params: SamplingParams, settings: ServerSettings) -> None:
    """VLLMValidationError (HTTP 400, a ValueError) naming the parameter and the remedy."""
    for name, neutral, remedy in _UNSUPPORTED:
        value = getattr(params, name, None)
        if not any(value is n or value == n for n in neutral):
            raise VLLMValidationError(
                f"{name}={value!r} is not supported by masked-diffusion decoding; {remedy}", parameter=name
            )
    if params.logprobs is not None and params.logprobs < 0:
        raise VLLMValidationError("logprobs must be at least 0 for masked-diffusion decoding", parameter="logprobs")
    try:
        resolve(params.extra_args, params.max_tokens, settings)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from error


@dataclass(frozen=True)
class PromptLimits:
    """What a prompt is checked against, attached to it by the renderer under ``PROMPT_LIMITS_KEY``.

    encode: text to token ids without special tokens, for the suffix.
    """

    settings: ServerSettings
    max_model_len: int
    mask_token_id: int
    encode: Callable[[str], list[int]]


PROMPT_LIMITS_KEY = "dvlm_limits"


def validate_request(engine_input: Mapping[str, Any], params: SamplingParams | PoolingParams) -> None:
    """Check a rendered prompt together with its parameters; for ``Platform.validate_request``.

    Prompts of other models carry no limits and pass. Raises VLLMValidationError (HTTP 400).
    """
    limits: PromptLimits | None = engine_input.get(PROMPT_LIMITS_KEY)
    if limits is None or not isinstance(params, SamplingParams):
        return
    token_ids = engine_input.get("prompt_token_ids")
    if not token_ids:
        raise VLLMValidationError("masked-diffusion models take text or token prompts with at least one token")
    if limits.mask_token_id in token_ids:
        raise VLLMValidationError(
            "the prompt contains the mask token, which marks positions to be filled; remove it", parameter="prompt"
        )
    resolved = resolve(params.extra_args, params.max_tokens, limits.settings)
    suffix = limits.encode(resolved.options.diffusion_suffix) if resolved.options.diffusion_suffix else []
    if limits.mask_token_id in suffix:
        raise VLLMValidationError("diffusion_suffix must not contain the mask token")
    problem = check_lengths(resolved.plan(len(token_ids), len(suffix)), limits.max_model_len, limits.settings)
    if problem is not None:
        raise VLLMValidationError(problem, parameter="diffusion_canvas_length")


class OptionsValidator(LogitsProcessor):
    """Validates requests; changes no logits. Subclasses carry the server's settings."""

    settings = ServerSettings()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """vLLM's admission hook."""
        check_sampling_params(sampling_params, cls.settings)

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
