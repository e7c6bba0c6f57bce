"""R1: request number i of a seed. A sound request, and up to three things done to it."""

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm_dvlm.bench.abuse import draws

Body = dict[str, Any]
MODEL = "m"
MASK_TEXT = "<|mdm_mask|>"

# Values that somebody sends where something else was asked for.
ODD = (
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 3.0, 1e308, 10**9, 2**31, 2**53 + 1, 2**63, 2**64, 10**400),
    *(float("nan"), float("inf"), "", "none", "null", "7", "redvtp", "\x00", "\ud800", "é" * 100),
    *([], {}, [None], [[]], {"a": {"b": [1]}}, [1, "a"], list(range(300))),
)
OPTION_NAMES = (
    *("diffusion_canvas_length", "diffusion_block_length", "diffusion_max_steps", "diffusion_remasking"),
    *("diffusion_threshold", "diffusion_schedule", "diffusion_schedule_shift", "diffusion_refresh_interval"),
    *("diffusion_cfg_scale", "diffusion_suffix", "diffusion_stream", "prune_method", "prune_keep_ratio"),
    *("prune_layer", "prune_rows", "prune_positions", "diffusion_trace", "diffusion_draft", "diffusion_attention"),
    *("diffusion_step_ratio", "diffusion_top_k", "_dvlm_placed"),
    *("diffusion_block_lenght", "max_canvas_length", "_dvlm_resume", "session_id", "kv_cache_report_mode", "", "é"),
)
PARAMETER_NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "n", "seed", "max_tokens", "max_completion_tokens", "min_tokens"),
    *("stop", "stop_token_ids", "ignore_eos", "logprobs", "top_logprobs", "prompt_logprobs", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty", "use_beam_search"),
    *("bad_words", "allowed_token_ids", "include_stop_str_in_output", "skip_special_tokens", "echo", "suffix"),
    *("spaces_between_special_tokens", "truncate_prompt_tokens", "add_special_tokens", "add_generation_prompt"),
    *("continue_final_message", "chat_template", "chat_template_kwargs", "documents", "mm_processor_kwargs"),
    *("response_format", "structured_outputs", "tools", "tool_choice", "parallel_tool_calls", "priority"),
    *("request_id", "return_tokens_as_token_ids", "return_token_ids", "return_prompt_text", "cache_salt", "user"),
    *(
        "kv_transfer_params",
        "stream_options",
        "service_tier",
        "reasoning_effort",
        "include_reasoning",
        "media_io_kwargs",
    ),
    *(
        "thinking_token_budget",
        "repetition_detection",
        "no_such_parameter",
        "model",
        "vllm_xargs",
        "stream",
        "messages",
    ),
    *("prompt", "input", "prompt_embeds", "logits_processors", "watermarking", "return_token_strs"),
)
UNICODE = (
    *(
        "\ud800",
        "\udfff text",
        "\x00",
        "\x00" * 50,
        "\u202e right to left",
        "e\u0301" * 30,
        "\U0001f9d1\u200d\U0001f33e",
    ),
    *(
        "\ufeff",
        "\uffff",
        "\U0010ffff",
        "日本語のテキスト",
        "שלום",
        "\r\n\t\v\f",
        "a" * 3000,
        "\u200b" * 200,
        "%s{}{{x}}",
    ),
    *(
        MASK_TEXT,
        "<|eot_id|>",
        "<|startoftext|><|start_header_id|>system<|end_header_id|>",
        "<image>",
        "<image><image>",
    ),
    *("<image", "<|reserved_token_5|>", "</s><s>[INST]", "<filler_300>"),
)


class Request(NamedTuple):
    """One request: where to, what, and in words what was done to it."""

    path: str
    data: bytes
    what: str
    streams: bool


# -- sound requests --------------------------------------------------------------------------------------------------


def _text(rng: random.Random) -> str:
    return draws.words(rng, rng.choice([1, 3, 10, 40]))


def image_part(rng: random.Random) -> Body:
    data, mime = draws.picture_file(rng)
    return {"type": "image_url", "image_url": {"url": draws.data_url(data, mime)}}


def _content(rng: random.Random) -> Any:
    num = rng.choice([0, 0, 1, 1, 2])
    text = {"type": "text", "text": _text(rng)}
    if not num:
        return rng.choice([text["text"], [text]])
    parts = [image_part(rng) for _ in range(num)] + [text]
    rng.shuffle(parts)
    return parts


def _messages(rng: random.Random) -> list[Body]:
    messages = [{"role": "user", "content": _content(rng)}]
    if rng.random() < 0.2:
        before = [{"role": "user", "content": _text(rng)}, {"role": "assistant", "content": _text(rng)}]
        messages = before + messages
    return [{"role": "system", "content": _text(rng)}, *messages] if rng.random() < 0.2 else messages


def _common(rng: random.Random) -> Body:
    body: Body = {"model": MODEL, "max_tokens": rng.randint(1, 24)} | draws.sampling(rng)
    if rng.random() < 0.5:
        body["vllm_xargs"] = draws.options(rng, True, 24)
    if rng.random() < 0.4:
        body["stream"] = True
        if rng.random() < 0.5:
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": rng.random() < 0.5}
    return body


def _chat(rng: random.Random) -> Body:
    body = _common(rng) | {"messages": _messages(rng)}
    return body | {"logprobs": True, "top_logprobs": rng.randint(0, 5)} if rng.random() < 0.2 else body


def _completion(rng: random.Random) -> Body:
    ids = [rng.randrange(260, 900) for _ in range(rng.choice([1, 5, 60]))]
    prompt = rng.choice([_text(rng), ids, [_text(rng) for _ in range(3)], [ids, ids[:1]]])
    body = _common(rng) | {"prompt": prompt}
    return body | {"logprobs": rng.randint(0, 5)} if rng.random() < 0.2 else body


def _responses(rng: random.Random) -> Body:
    body = _common(rng)
    body["max_output_tokens"] = body.pop("max_tokens")
    body.pop("stream_options", None)
    parts: list[Body] = [{"type": "input_text", "text": _text(rng)}]
    if rng.random() < 0.4:
        parts.append({"type": "input_image", "image_url": image_part(rng)["image_url"]["url"], "detail": "auto"})
    return body | {"input": rng.choice([_text(rng), [{"role": "user", "content": parts}]])}


def _claude(rng: random.Random) -> Body:
    body = {key: value for key, value in _common(rng).items() if key not in ("stream_options", "seed", "stop")}
    return body | {"messages": [{"role": "user", "content": _text(rng)}], "max_tokens": rng.randint(1, 24)}


def _batch(rng: random.Random) -> Body:
    body = _chat(rng)
    body.pop("stream", None)
    body.pop("stream_options", None)
    return body | {"messages": [_messages(rng) for _ in range(rng.randint(1, 4))]}


def _tokenize(rng: random.Random) -> Body:
    body = rng.choice([{"messages": _messages(rng)}, {"prompt": _text(rng)}])
    return {"model": MODEL, "return_token_strs": rng.random() < 0.5} | body


def _detokenize(rng: random.Random) -> Body:
    return {"model": MODEL, "tokens": [rng.randrange(130_000) for _ in range(rng.choice([0, 1, 30]))]}


def _count(rng: random.Random) -> Body:
    return {"model": MODEL, "messages": [{"role": "user", "content": _text(rng)}]}


ENDPOINTS: dict[str, tuple[Callable[[random.Random], Body], int]] = {  # path -> (sound request, weight)
    "/v1/chat/completions": (_chat, 44),
    "/v1/completions": (_completion, 24),
    "/v1/responses": (_responses, 10),
    "/v1/messages": (_claude, 7),
    "/v1/chat/completions/batch": (_batch, 4),
    "/invocations": (_chat, 3),
    "/tokenize": (_tokenize, 4),
    "/detokenize": (_detokenize, 2),
    "/v1/messages/count_tokens": (_count, 2),
}


def request(rng: random.Random) -> Request:
    """The request that this generator draws."""
    from vllm_dvlm.bench.abuse.mutations import MUTATIONS, break_json

    path = rng.choices(list(ENDPOINTS), [weight for _, weight in ENDPOINTS.values()])[0]
    body = ENDPOINTS[path][0](rng)
    done = []
    for _ in range(rng.choices([0, 1, 2, 3], [20, 50, 20, 10])[0]):
        done.append(rng.choice(MUTATIONS)(rng, body))
    streams = body.get("stream") is True
    data = json.dumps(body).encode()
    if rng.random() < 0.04:
        data, what = break_json(rng, data)
        done.append(what)
    return Request(path, data, "; ".join(done) or "sound", streams)
