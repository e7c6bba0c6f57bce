"""R1: what may be done to a sound request. Each changes the body in place and says what it did."""

import random
from typing import Any

from vllm_dvlm.bench.abuse import draws
from vllm_dvlm.bench.abuse.fuzz_bodies import MODEL, ODD, OPTION_NAMES, PARAMETER_NAMES, UNICODE, Body, image_part


def short(value: Any, length: int = 60) -> str:
    """A value in few characters."""
    shown = (
        repr(value) if not isinstance(value, int) or abs(value) < 10**20 else f"an integer of {value.bit_length()} bits"
    )
    return shown if len(shown) <= length else f"{shown[:length]}… ({len(shown)} characters)"


def _option(rng: random.Random, body: Body) -> str:
    xargs = body.get("vllm_xargs")
    if not isinstance(xargs, dict):
        xargs = body["vllm_xargs"] = {}
    name = rng.choice(OPTION_NAMES)
    xargs[name] = rng.choice(ODD)
    return f"{name}={short(xargs[name])}"


def _parameter(rng: random.Random, body: Body) -> str:
    name = rng.choice(PARAMETER_NAMES)
    body[name] = rng.choice(ODD)
    return f"{name}={short(body[name])}"


def _any_value(rng: random.Random, body: Body) -> str:
    """Somewhere in the body."""
    target: Any = body
    path = []
    while True:
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        path.append(str(key))
        if not isinstance(target[key], (dict, list)) or not target[key] or rng.random() < 0.3:
            break
        target = target[key]
    if rng.random() < 0.25:
        del target[key]
        return f"{'.'.join(path)} removed"
    target[key] = rng.choice(ODD)
    return f"{'.'.join(path)}={short(target[key])}"


def _length(rng: random.Random, body: Body) -> str:
    if rng.random() < 0.5:
        name = "max_output_tokens" if "input" in body else rng.choice(["max_tokens", "max_completion_tokens"])
        body[name] = rng.choice([0, -1, 1, 63, 64, 65, 960, 1023, 1024, 1025, 10**6, 2**31, 2**63])
        return f"{name}={body[name]}"
    num = rng.choice([900, 1000, 1020, 1023, 1024, 1025, 5000, 60_000])
    text = draws.words(rng, num)
    if "prompt" in body:
        body["prompt"] = rng.choice([text, [300] * num])
    elif "input" in body:
        body["input"] = text
    else:
        body["messages"] = [{"role": "user", "content": text}]
    return f"a prompt of {num} words"


def _unicode(rng: random.Random, body: Body) -> str:
    text = rng.choice(UNICODE)
    where = rng.choice(["prompt", "prompt", "stop", "suffix", "draft", "model", "role", "user"])
    if where == "stop":
        body["stop"] = text
    elif where in ("suffix", "draft"):
        body["vllm_xargs"] = {f"diffusion_{where}": text}
    elif where in ("model", "user"):
        body[where] = text
    elif "prompt" in body or "input" in body:
        body["prompt" if "prompt" in body else "input"] = f"what {text} is"
    else:
        role = text if where == "role" else "user"
        body["messages"] = [{"role": role, "content": f"what {text} is"}]
    return f"{where} with {short(text)}"


def _huge_list(rng: random.Random, body: Body) -> str:
    num = rng.choice([129, 1000, 100_000])
    few = min(num, 1000)
    lists: dict[str, Any] = {
        "stop_token_ids": list(range(num)),
        "stop": [f"word{i}" for i in range(num)],
        "logit_bias": {str(i): 1 for i in range(num)},
        "bad_words": [f"word{i}" for i in range(num)],
        "allowed_token_ids": list(range(num)),
        "vllm_xargs": {f"option{i}": i for i in range(few)},
        "tools": [{"type": "function", "function": {"name": f"f{i}", "parameters": {}}} for i in range(few)],
        "messages": [{"role": "user", "content": "a"} for _ in range(few)],
        "prompt": [[300] for _ in range(130)] if num == 129 else [300] * num,
        "logprob_token_ids": list(range(num)),
    }
    name = rng.choice(list(lists))
    body[name] = lists[name]
    return f"{name} with {len(body[name])} entries"


def _image_parts(body: Body) -> list[Any] | None:
    """The list of content parts of the last message, made one if it is text; None if there are no messages."""
    messages = body.get("messages") or body.get("input")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return None
    content = messages[-1].get("content")
    if not isinstance(content, list):
        content = messages[-1]["content"] = [{"type": "text", "text": str(content)}]
    return content


def _image(rng: random.Random, body: Body) -> str:
    parts = _image_parts(body)
    if parts is None:
        return _option(rng, body)
    data, mime = draws.picture_file(rng)
    b64 = draws.data_url(data, mime)
    urls = {
        "cut short": draws.data_url(data[: len(data) // 2], mime),
        "without its head": draws.data_url(data[10:], mime),
        "with bytes changed": draws.data_url(bytes(b ^ (i % 97 == 50) for i, b in enumerate(data)), mime),
        "empty": draws.data_url(b"", mime),
        "of text": draws.data_url(b"hello world" * 30, "image/png"),
        "of random bytes": draws.data_url(rng.randbytes(500), mime),
        "svg": draws.data_url(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "image/svg+xml"),
        "of a video type": draws.data_url(data, "video/mp4"),
        "with wrong base64": b64[:-7] + "*é",
        "without base64": "data:image/png," + "a" * 40,
        "of no address": "nowhere",
        "of another scheme": "ftp://127.0.0.1/cat.png",
        "of a file": "file:///etc/hostname",
        "that is no text": rng.choice([5, None, ["a"], {"url": b64}]),
        "very wide": (20_000, 3),
        "very high": (1, 9000),
        "large": (4000, 3000),
    }
    what = rng.choice([*urls, "many", "missing", "surplus placeholder", "as input_image", "as other kinds"])
    if what == "many":
        parts.extend(image_part(rng) for _ in range(rng.choice([3, 30])))
    elif what == "missing":
        parts.append({"type": "text", "text": "<image> what"})
    elif what == "surplus placeholder":
        parts.extend([image_part(rng), {"type": "text", "text": "<image> and <image>"}])
    elif what == "as input_image":
        parts.append({"type": "input_image", "image_url": b64})
    elif what == "as other kinds":
        kind = rng.choice(["audio_url", "video_url", "image_embeds", "image_pil", "input_audio", "file", "refusal", 7])
        parts.append({"type": kind, str(kind): {"url": b64}})
    else:
        url = draws.data_url(*_plain(urls[what])) if isinstance(urls[what], tuple) else urls[what]
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return f"image {what}"


def _plain(size: tuple[int, int]) -> tuple[bytes, str]:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", size, (90, 160, 30)).save(out, "PNG")
    return out.getvalue(), "image/png"


def _structure(rng: random.Random, body: Body) -> str:
    messages: list[Any] = rng.choice(
        [
            [],
            [{}],
            [{"role": "user"}],
            [{"role": "user", "content": []}],
            [{"role": "user", "content": ""}],
            [{"role": "user", "content": [{"type": "text"}]}],
            [{"role": "user", "content": [{"text": "a"}]}],
            [{"role": "robot", "content": "a"}],
            [{"role": "system", "content": "only"}],
            [{"role": "assistant", "content": "a"}],
            [{"role": "tool", "content": "a", "tool_call_id": "x"}],
            [{"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f"}}]}],
            [{"role": "user", "content": "a"}] * 2,
            [{"role": "user", "content": "a", "name": "b" * 1000}],
            ["a"],
            [[{"role": "user", "content": "a"}]],
        ]
    )
    body["messages"] = messages
    return f"messages={short(messages)}"


def _both(rng: random.Random, body: Body) -> str:
    """Several sound parameters that do not go together, or seldom do."""
    changes: dict[str, Any] = rng.choice(
        [
            {"n": 3, "temperature": 0},
            {"n": 3, "temperature": 1.0},
            {"n": 40, "temperature": 1.0, "max_tokens": 2},
            {"n": 2**40},
            {"best_of": 4},
            {"use_beam_search": True, "n": 2},
            {"stream": True, "use_beam_search": True},
            {"stream": True, "n": 2, "temperature": 0.5},
            {"stream": False, "stream_options": {"include_usage": True}},
            {"echo": True, "max_tokens": 0},
            {"echo": True, "logprobs": 1},
            {"logprobs": 10**6},
            {"logprobs": True, "top_logprobs": 50},
            {"logprobs": False, "top_logprobs": 5},
            {"top_logprobs": -1},
            {"continue_final_message": True, "add_generation_prompt": True},
            {"response_format": {"type": "json_object"}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
            {"structured_outputs": {"regex": "(" * 500}},
            {"guided_json": "{"},
            {"truncate_prompt_tokens": 5},
            {"truncate_prompt_tokens": -1},
            {"prompt": ""},
            {"prompt": []},
            {"prompt": [[]]},
            {"prompt": [-1]},
            {"prompt": [126336]},
            {"prompt": [10**9]},
            {"prompt": [2**70]},
            {"prompt_embeds": "AAAA"},
            {"stop_token_ids": [126336]},
            {"stop_token_ids": [-1]},
            {"stop_token_ids": [2**40]},
            {"stop": [""]},
            {"temperature": 1e-9},
            {"temperature": 1e30},
            {"seed": -5},
            {"seed": 2**64},
            {"model": MODEL + "x"},
            {"previous_response_id": "resp_none"},
            {"background": True, "store": True},
            {"chat_template": "{{ 1 / 0 }}"},
            {"chat_template": "{% for x in range(10) %}{{ messages }}{% endfor %}"},
            {"request_id": "same"},
            {"priority": 7},
            {"return_token_ids": True},
            {"return_tokens_as_token_ids": True},
            {"kv_transfer_params": {"do_remote_prefill": True}},
            {"cache_salt": "a"},
        ]
    )
    body.update(changes)
    return short(changes)


def break_json(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """No longer a JSON object, or hardly."""
    return rng.choice(
        [
            (data[: len(data) // 2], "body cut short"),
            (b"", "empty body"),
            (b"null", "body null"),
            (b"[]", "body a list"),
            (b'"text"', "body a text"),
            (b"[" * 3000, "body of brackets"),
            (b'{"a":' * 900 + b"1" + b"}" * 900, "body nested deeply"),
            (data + b"}", "body with a bracket too many"),
            (b"\xff\xfe" + data, "body that is not UTF-8"),
            (data.replace(b'"model"', b'"model": "x", "model"', 1), "a key twice"),
        ]
    )


MUTATIONS = (
    *(_option, _option, _option, _parameter, _parameter, _parameter, _any_value, _length, _unicode, _huge_list),
    *(_image, _image, _structure, _both, _both),
)
