"""A refused request that asked for a stream gets HTTP 400, like any other refused request.

vLLM answers a streamed request with 200 before it validates the parameters; the refusal then comes as the first event
of the stream. The middleware holds the status line back until that first event and, when it is an error, answers with
the error's own code and body instead. Good streams lose nothing: their first event is the first thing a client reads.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

_EVENT_STREAM = b"text/event-stream"
_EVENT_PREFIX = b"data: "


class StreamStatus:
    """ASGI middleware; see the module. Answers other than event streams pass untouched."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Callable[..., Any], send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http":
            send = _HeldStart(send)
        await self.app(scope, receive, send)


class _HeldStart:
    """`send` of one response; keeps the start of an event stream until its first event."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.start: Message | None = None
        self.is_refused = False

    async def __call__(self, message: Message) -> None:
        if self.is_refused:  # the rest of the stream, '[DONE]'
            return
        if message["type"] == "http.response.start" and _is_event_stream(message):
            self.start = message
            return
        start, self.start = self.start, None
        if start is None or message["type"] != "http.response.body":
            if start is not None:
                await self.send(start)
            await self.send(message)
            return
        if not message.get("body") and message.get("more_body"):
            self.start = start
            return
        error = refusal(message.get("body", b""))
        if error is None:
            await self.send(start)
            await self.send(message)
            return
        self.is_refused = True
        body = json.dumps({"error": error}).encode()
        kept = [(name, value) for name, value in start["headers"] if name.lower() not in (b"content-type",)]
        headers = [*kept, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({**start, "status": error["code"], "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


def _is_event_stream(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(_EVENT_STREAM) for name, value in start.get("headers", ())
    )


def refusal(event: bytes) -> dict[str, Any] | None:
    """The error that the first event of a stream carries, if it is one with a code of 400 to 599."""
    if not event.startswith(_EVENT_PREFIX):
        return None
    try:
        # One chunk may hold several events; the first one ends at an empty line.
        error = json.loads(event.removeprefix(_EVENT_PREFIX).split(b"\n\n")[0]).get("error")
    except (ValueError, AttributeError):
        return None
    is_error = isinstance(error, dict) and isinstance(error.get("code"), int) and 400 <= error["code"] <= 599
    return error if is_error else None
