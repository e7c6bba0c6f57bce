"""What becomes of each of vLLM's sampling parameters: one table, read by ``admission``.

A parameter that denoising does not honour is refused unless it asks for nothing, under the name that the user wrote.
``tests/upstream`` compares the table with vLLM's own list. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# What vLLM's own sampler takes (vllm/v1/worker/gpu/sample/logit_bias.py); ours compares each committed token with all.
MAX_STOP_TOKEN_IDS = 128
# Over HTTP vLLM takes four; a list of this length costs a search each per step.
MAX_STOP_STRINGS = 128
MAX_STOP_CHARACTERS = 1024
# Keys of extra_args that are vLLM's.
MAX_EXTRA_TEXT = 1024
# Longer than nearly every token: a suffix refused for its characters would have too many tokens as well.
CHARACTERS_PER_TOKEN = 64

# Kinds of parameters: read by the scheduler or worker of ours / vLLM's front end or output processor does all of it,
# or it has no object here (each says why) / refused.
READ, UPSTREAM = "read", "upstream"


@dataclass(frozen=True)
class Refused:
    """A parameter that denoising does not honour.

    neutral: True for values that ask for nothing; None and empty lists and mappings always do.
    """

    remedy: str
    neutral: Callable[[Any], bool] = lambda value: False


def _equals(*values: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and value in values


def _all_zero(bias: Any) -> bool:
    return isinstance(bias, dict) and not any(bias.values())


SAMPLING_PARAMETERS: dict[str, str | Refused] = {
    "n": UPSTREAM,  # one request each
    "presence_penalty": Refused("leave it at 0", _equals(0)),
    "frequency_penalty": Refused("leave it at 0", _equals(0)),
    "repetition_penalty": Refused("leave it at 1", _equals(1)),
    "temperature": READ,
    "watermarking": UPSTREAM,  # asks for the server's watermark, and a server with one does not start
    "top_p": Refused("leave it at 1 and use temperature", _equals(1)),
    "top_k": Refused("leave it at 0 and use temperature", _equals(0, -1)),
    "min_p": Refused("leave it at 0 and use temperature", _equals(0)),
    "seed": READ,
    "stop": UPSTREAM,
    "stop_token_ids": READ,
    "ignore_eos": READ,
    "max_tokens": READ,
    "min_tokens": Refused("leave it at 0; ignore_eos fills the whole canvas", _equals(0)),
    "logprobs": READ,
    "prompt_logprobs": Refused("remove it; logprobs of the reply are available"),
    "prompt_logprob_token_ids": Refused("remove it"),
    "prompt_logprob_start": UPSTREAM,  # refused by vLLM without prompt_logprob_token_ids
    "logprob_token_ids": READ,
    "flat_logprobs": UPSTREAM,
    "detokenize": UPSTREAM,
    "skip_special_tokens": UPSTREAM,
    "spaces_between_special_tokens": UPSTREAM,
    "include_stop_str_in_output": UPSTREAM,
    "output_kind": UPSTREAM,
    "stream_interval": UPSTREAM,
    "skip_clone": UPSTREAM,
    "output_text_buffer_length": UPSTREAM,
    "_eos_token_id": READ,
    "_all_stop_token_ids": UPSTREAM,
    "_watermarking_skipped": UPSTREAM,
    "structured_outputs": Refused("remove it"),
    "logit_bias": Refused("remove it", _all_zero),
    "allowed_token_ids": Refused("remove it"),
    "extra_args": READ,
    "bad_words": Refused("remove it"),
    "_bad_words_token_ids": UPSTREAM,  # made from bad_words
    "skip_reading_prefix_cache": UPSTREAM,  # there is no prefix cache
    "thinking_token_budget": Refused("remove it"),
    "repetition_detection": Refused("remove it", lambda value: not getattr(value, "max_pattern_size", 1)),
    "routed_experts_prompt_start": UPSTREAM,  # cuts a reply that a server with that flag would give; it does not start
    "trace_decode_token_ids": Refused("remove it"),
}


# Of the refused ones, those that some families honour (``Family.has_top_k_top_p``).
FAMILY_PARAMETERS = frozenset({"top_k", "top_p"})


def asks_for_nothing(name: str, value: Any) -> bool:
    """True if a refused parameter's value changes nothing."""
    if value is None or (isinstance(value, (list, tuple, dict, set)) and not value):
        return True
    rule = SAMPLING_PARAMETERS[name]
    return isinstance(rule, Refused) and rule.neutral(value)


@dataclass(frozen=True)
class Spelling:
    """What a request's API calls the parameters that vLLM translates before admission sees them.

    The fields are the names to use in a message; several, where the API has several and vLLM does not say which.
    asked_echo: True if the request asked for its prompt back; vLLM then makes prompt_logprobs of logprobs.
    is_chat: True for chats, whose ``top_logprobs`` is 0 unless given, so that ``echo`` alone gives prompt_logprobs 0.
    """

    logprobs: str = "logprobs"
    max_tokens: str = "max_tokens"
    structured_outputs: str = "structured_outputs"
    asked_echo: bool = False
    is_chat: bool = False

    def of(self, name: str) -> str:
        """The user's name of a sampling parameter."""
        if name == "prompt_logprobs" and self.asked_echo:
            return f"echo with {self.logprobs}"
        return getattr(self, name, name)


OWN_NAMES = Spelling()
"""Python callers write sampling parameters by vLLM's own names."""


def spelling_of(tok_params: Any, chat_params: Any = None) -> Spelling:
    """Read the spelling from what vLLM's endpoints give the renderer.

    tok_params: ``TokenizeParams``; the endpoints put their name of max_tokens there, and that the prompt's text is
        wanted. None from Python callers, who write sampling parameters by their own names.
    chat_params: ``ChatParams`` of a conversation; None for a plain prompt.
    """
    if getattr(tok_params, "max_total_tokens_param", None) != "max_model_len":
        return OWN_NAMES
    max_tokens, echo = tok_params.max_output_tokens_param, bool(tok_params.needs_detokenization)
    if max_tokens == "max_output_tokens":  # the Responses API
        named = [*_tools(chat_params), "text.format", "structured_outputs"]
        return Spelling("top_logprobs", max_tokens, " or ".join(named))
    if chat_params is None:
        return Spelling("logprobs", max_tokens, "response_format or structured_outputs", echo)
    named = [*_formats(chat_params.response_format), *_tools(chat_params)]
    return Spelling("top_logprobs", max_tokens, " or ".join(named or ["structured_outputs"]), echo, is_chat=True)


def _formats(response_format: Any) -> list[str]:
    if getattr(response_format, "type", "text") == "text":
        return []
    # The Messages API's output format becomes a response format whose schema vLLM names so.
    schema = getattr(response_format, "json_schema", None)
    is_from_messages = getattr(schema, "name", None) == "json_schema"
    return ["response_format", "output_config.format"] if is_from_messages else ["response_format"]


def _tools(chat_params: Any) -> list[str]:
    return ["tool_choice"] if getattr(chat_params, "tool_choice", None) not in (None, "none") else []
