"""A refused request that asked for a stream gets the same answer as without one: HTTP 400 and the reason.

vLLM answers a streamed request with 200 before it validates the parameters; the refusal then comes as an event, after
other events, or breaks the stream off, each endpoint in its own way. So nothing of an event is read here: the
middleware holds a stream back until ``admission`` has let the request pass, which takes no longer than the stream's
first token. If it never does, the request is served once more without ``stream``, and that answer, in the endpoint's
own words, is sent instead. Good streams lose nothing.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_EVENT_STREAM = b"text/event-stream"
# Fields of a body that mean nothing, or another answer, without a stream.
_ONLY_STREAMED = ("stream_options", "background")
# Where vLLM's endpoints come from; the second wraps /invocations.
_PACKAGES = ("vllm", "model_hosting_container_standards")
# A stream that says so much before a request of it is admitted is none of those that are refused.
_MAX_HELD_BYTES = 2**20


@dataclass
class Gate:
    """What ``admission`` said of the requests of one connection; shared by the tasks that serve it."""

    is_admitted: bool = False
    is_refused: bool = False


_gate: ContextVar[Gate | None] = ContextVar("dvlm_gate", default=None)


def note_admission(is_admitted: bool) -> None:
    """Say that a request of this connection was let pass or refused. Nothing happens where no client streams."""
    gate = _gate.get()
    if gate is not None:
        gate.is_admitted |= is_admitted
        gate.is_refused |= not is_admitted


def is_http() -> bool:
    """True while a POST over HTTP is served."""
    return _gate.get() is not None


class StreamStatus:
    """ASGI middleware; see the module. Answers other than event streams of vLLM's endpoints pass untouched."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope.get("method") != "POST":
            await self.app(scope, receive, send)
            return
        again = dict(scope)  # routing writes into the scope
        gate = Gate()
        request = _KeptRequest(receive)
        answer = _HeldStream(send, gate, scope)
        token = _gate.set(gate)
        error: Exception | None = None
        try:
            await self.app(scope, request, answer)
        except Exception as raised:
            if not answer.is_held:
                raise
            error = raised
        finally:
            _gate.reset(token)
        if not answer.is_held or request.is_disconnected:
            return
        if gate.is_refused or not gate.is_admitted:
            body = request.without_stream()
            if body is not None:
                token = _gate.set(Gate())
                try:
                    await self.app(again, _Replay(body, receive), send)
                finally:
                    _gate.reset(token)
                return
        await answer.release()
        if error is not None:
            raise error


@dataclass
class _KeptRequest:
    """``receive`` of one request that remembers the body."""

    receive: Receive
    chunks: list[bytes] = field(default_factory=list)
    is_disconnected: bool = False

    async def __call__(self) -> Message:
        message = await self.receive()
        if message["type"] == "http.request":
            self.chunks.append(message.get("body", b""))
        elif message["type"] == "http.disconnect":
            self.is_disconnected = True
        return message

    def without_stream(self) -> bytes | None:
        """The body of the same request without a stream; None for a body that does not ask for one."""
        try:
            body = json.loads(b"".join(self.chunks))
        except ValueError:
            return None
        if not isinstance(body, dict) or not body.get("stream"):
            return None
        kept = {name: value for name, value in body.items() if name not in _ONLY_STREAMED}
        return json.dumps(kept | {"stream": False}).encode()


@dataclass
class _Replay:
    """``receive`` that gives a body, then what the client really does (disconnect)."""

    body: bytes | None
    receive: Receive

    async def __call__(self) -> Message:
        if self.body is None:
            return await self.receive()
        body, self.body = self.body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _HeldStream:
    """`send` of one response; keeps an event stream back until its request is admitted."""

    def __init__(self, send: Send, gate: Gate, scope: MutableMapping[str, Any]) -> None:
        self.send = send
        self.gate = gate
        self.scope = scope
        self.held: list[Message] = []
        self.num_bytes = 0

    @property
    def is_held(self) -> bool:
        """True while nothing of a stream that began has been sent."""
        return bool(self.held)

    async def __call__(self, message: Message) -> None:
        if not self.held and not (message["type"] == "http.response.start" and self._is_ours(message)):
            await self.send(message)
            return
        self.held.append(message)
        self.num_bytes += len(message.get("body", b""))
        # Events behind the start only: those of a refusal come right after the admission of the request before it.
        is_open = self.gate.is_admitted and len(self.held) > 1 and not self.gate.is_refused
        if is_open or (self.num_bytes > _MAX_HELD_BYTES and not self.gate.is_refused):
            await self.release()

    async def release(self) -> None:
        """Send what was held; everything later passes."""
        held, self.held = self.held, []
        for message in held:
            await self.send(message)

    def _is_ours(self, start: Message) -> bool:
        """True for an event stream of an endpoint of vLLM; other plugins' are none of our business."""
        module = getattr(self.scope.get("endpoint"), "__module__", None) or ""
        return module.partition(".")[0] in _PACKAGES and any(
            name.lower() == b"content-type" and value.startswith(_EVENT_STREAM)
            for name, value in start.get("headers", ())
        )
