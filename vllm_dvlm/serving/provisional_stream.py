"""Streams that show the canvas while it fills (`diffusion_stream: provisional`), and the report at every stream's end.

``delta.content`` stays what it is: committed text. A snapshot stands in the same chunk as ``delta.diffusion`` (of a
completion: ``choices[0].diffusion``), or in a chunk of its own where a step commits nothing; the last chunk carries the
request's report, as an unstreamed reply does.

vLLM's stream generators drop what an output carries beside text, so it is taken out of the outputs before they see it
and put into the chunks behind them. Both happen in the task that serves the request, one after the other: a client that
reads slowly holds back its own chunks, meanwhile vLLM merges outputs, of which the newest canvas stays.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from vllm_dvlm.options import STREAM_ALIASES

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

KEY = "dvlm_canvas"  # of canvas_events, which imports the engine
PATHS = ("/v1/chat/completions", "/v1/completions")
MASKED_TEXT = "▒"
BROKEN = "\ufffd"  # half a character
_EVENT = b"data: "
_MARK = "__dvlm_shows_canvases__"


@dataclass
class Channel:
    """One streamed request, between vLLM's outputs and its chunks. A completion may have several prompts.

    waiting: (prompt, event) for chunks to come. reports: of finished prompts, for the chunks that say so. about: what
    every chunk of this stream says (id, model, ...). num_prompts: so far. num_choices: of each prompt.
    stream_interval: the server's.
    """

    send: Send
    is_chat: bool
    waiting: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    about: dict[str, Any] | None = None
    decode: _Decoder | None = None
    mask_token_id: int = -1
    model_name: str = ""
    have_shown_pruned: set[int] = field(default_factory=set)
    num_prompts: int = 0
    num_choices: int = 1
    stream_interval: int = 1

    def follow(
        self, outputs: AsyncGenerator[RequestOutput, None], num_choices: int
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of the next prompt as vLLM's generator wants them; what they show goes out between them."""
        prompt, self.num_choices = self.num_prompts, num_choices
        self.num_prompts += 1
        return self._follow(outputs, prompt)

    async def _follow(
        self, outputs: AsyncGenerator[RequestOutput, None], prompt: int
    ) -> AsyncGenerator[RequestOutput, None]:
        is_first = True
        try:
            async for output in outputs:
                shows = self._take(output, prompt)
                # The generator says hello at the first output, whatever it brings.
                if is_first or not shows or output.finished or any(each.token_ids for each in output.outputs):
                    if self.about is None and not self.is_chat:
                        self.about = self._about_completion(output)
                    yield output
                is_first = False
                # What no chunk of the generator's has taken along.
                while self.waiting and self.about is not None:
                    await self._send_alone(*self.waiting.pop(0))
        finally:
            await outputs.aclose()

    def _about_completion(self, output: RequestOutput) -> dict[str, Any]:
        """What vLLM's completions say of every chunk; its generator says nothing before the first text."""
        name = output.request_id.rsplit("-", 1)[0]
        return {"id": name, "object": "text_completion", "created": int(time.time()), "model": self.model_name}

    def _take(self, output: RequestOutput, prompt: int) -> bool:
        """Take what an output shows; True if it shows a canvas."""
        carried = output.kv_transfer_params or {}
        if output.finished and "dvlm" in carried:
            self.reports[prompt] = carried["dvlm"]
        shown = carried.get(KEY)
        if shown is None:
            return False
        if "pruned" in shown and prompt not in self.have_shown_pruned:
            self.have_shown_pruned.add(prompt)
            self.waiting.append((prompt, {"event": "pruned"} | shown["pruned"]))
        if "snapshot" in shown:
            self.waiting.append((prompt, self._snapshot(dict(shown["snapshot"]))))
        return True

    def _snapshot(self, shown: dict[str, Any]) -> dict[str, Any]:
        """A snapshot as the client sees it: text, and the text of every position (None: masked)."""
        ids, confidence = shown.pop("token_ids"), shown.pop("confidence")
        mask, decode = self.mask_token_id, self.decode or str
        cells = [None if token_id == mask else decode(token_id) for token_id in ids]
        text = "".join(MASKED_TEXT if cell is None else cell for cell in cells)
        if BROKEN in text and self.decode is not None:  # characters of several tokens
            runs = groupby(ids, lambda token_id: token_id == mask)
            text = "".join(MASKED_TEXT * len(list(run)) if m else self.decode.together(list(run)) for m, run in runs)
        pairs = zip(confidence, cells, strict=True)
        sure = [None if cell is None or value != value else round(value, 4) for value, cell in pairs]
        return {"event": "snapshot", **shown, "text": text, "tokens": cells, "confidence": sure}

    async def _send_alone(self, prompt: int, event: dict[str, Any]) -> None:
        body = {"delta": {"content": "", "diffusion": event}} if self.is_chat else {"text": "", "diffusion": event}
        choice = {"index": prompt, **body, "logprobs": None, "finish_reason": None}
        data = json.dumps({**(self.about or {}), "choices": [choice]}, ensure_ascii=False)
        await self.send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

    async def pass_on(self, message: Message) -> None:
        """Send a message of vLLM's; a chunk takes along what waits for one."""
        body = message.get("body", b"") if message["type"] == "http.response.body" else b""
        if body.startswith(_EVENT + b"{") and (self.waiting or self.reports or self.about is None):
            message = {**message, "body": self._with_events(bytes(body))}
        await self.send(message)

    def _with_events(self, body: bytes) -> bytes:
        try:
            chunk = json.loads(body[len(_EVENT) :])
        except ValueError:  # more than one event at once: not vLLM's way today
            return body
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if not choices:
            return body
        self.about = {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}
        choice, is_changed = choices[0], False
        prompt = choice.get("index", 0) // self.num_choices
        own = next((place for place, (number, _) in enumerate(self.waiting) if number == prompt), None)
        if own is not None and not choice.get("delta", {}).get("role"):
            place = choice.get("delta", choice) if self.is_chat else choice
            place["diffusion"], is_changed = self.waiting.pop(own)[1], True
        if prompt in self.reports and choice.get("finish_reason") is not None:
            chunk["kv_transfer_params"], is_changed = {"dvlm": self.reports.pop(prompt)}, True
        return _EVENT + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n" if is_changed else body


_channel: ContextVar[Channel | None] = ContextVar("dvlm_channel", default=None)


def channel() -> Channel | None:
    """That of the streamed chat or completion that is served here; None elsewhere."""
    return _channel.get()


class ProvisionalStream:
    """ASGI middleware; see the module. Requests that stream nothing pass untouched, and so do other endpoints."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Callable[..., Any], send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope.get("method") != "POST" or not scope["path"].endswith(PATHS):
            await self.app(scope, receive, send)
            return
        own = Channel(send, scope["path"].endswith(PATHS[0]))
        state = scope["app"].state
        _connect(state.engine_client, own)
        own.model_name = state.openai_serving_models.model_name()
        token = _channel.set(own)
        try:
            await self.app(scope, _Renamed(receive), own.pass_on)
        finally:
            _channel.reset(token)


def _connect(client: Any, own: Channel) -> None:
    """Let the engine's outputs pass the channels of their requests; give this one what it needs to write text."""
    if not hasattr(client, _MARK):
        generate, tokenizer = client.generate, _tokenizer(client.model_config)

        def followed(
            prompt: Any, sampling_params: SamplingParams, *args: Any, **kwargs: Any
        ) -> AsyncGenerator[RequestOutput, None]:
            outputs = generate(prompt, sampling_params, *args, **kwargs)
            found = _channel.get()
            return outputs if found is None else found.follow(outputs, sampling_params.n)

        client.generate = followed
        setattr(client, _MARK, _Decoder(tokenizer))
    own.decode = getattr(client, _MARK)
    own.stream_interval = client.vllm_config.scheduler_config.stream_interval
    own.mask_token_id = client.model_config.hf_config.mask_token_id


def _tokenizer(model_config: Any) -> Any:
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(model_config)


class _Decoder:
    """Text of token ids; single ones are remembered, since every snapshot repeats them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._tokenizer.decode([token_id])
        return found

    def together(self, ids: list[int]) -> str:
        """Of tokens that follow each other."""
        return self._tokenizer.decode(ids)


@dataclass
class _Renamed:
    """``receive`` of a request whose body may spell options as other servers do, at its top level."""

    receive: Callable[..., Any]
    is_read: bool = False

    async def __call__(self) -> Message:
        if self.is_read:
            return await self.receive()
        pieces: list[bytes] = []
        while True:
            message = await self.receive()
            if message["type"] != "http.request":
                return message
            pieces.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        self.is_read = True
        body = b"".join(pieces)
        if any(f'"{name}"'.encode() in body for name in STREAM_ALIASES):
            body = _moved(body)
        return {"type": "http.request", "body": body, "more_body": False}


def _moved(body: bytes) -> bytes:
    """The body with other servers' names for the stream moved to where options stand."""
    try:
        found = json.loads(body)
    except ValueError:
        return body
    names = [name for name in STREAM_ALIASES if isinstance(found, dict) and name in found]
    options = found.get("vllm_xargs") or {} if names else None
    if not isinstance(options, dict):
        return body
    moved = {name: found.pop(name) for name in names}
    return json.dumps(found | {"vllm_xargs": options | moved}).encode()
