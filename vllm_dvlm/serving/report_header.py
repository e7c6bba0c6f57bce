"""What a request cost and gave back, as a header of its reply: ``x-vllm-dvlm``, the JSON of the body's report.

Clients that only know the fields of the OpenAI API, and proxies that log headers, see it there. A stream's headers are
sent before anything is known, so only unstreamed replies have it.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

NAME = b"x-vllm-dvlm"
# Inside a JSON string the quotes would be escaped, so this is found as a key only.
_KEY = b'"dvlm":'


class ReportHeader:
    """ASGI middleware; see the module. Bodies pass untouched."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Callable[..., Any], send: Send) -> None:
        """Serve one connection."""
        start: Message | None = None

        async def send_later(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and _is_json(message):
                start = message
                return
            if start is not None:
                held, start = start, None
                report = report_in(message.get("body", b""))
                await send(held if report is None else {**held, "headers": [*held["headers"], (NAME, report)]})
            await send(message)

        await self.app(scope, receive, send_later if scope["type"] == "http" else send)


def _is_json(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"application/json")
        for name, value in start.get("headers", ())
    )


def report_in(body: bytes) -> bytes | None:
    """The report in the body of a reply, as compact JSON in ASCII; None if there is none."""
    place = body.rfind(_KEY)
    if place < 0:
        return None
    try:
        report, _ = json.JSONDecoder().raw_decode(body[place + len(_KEY) :].decode().lstrip())
    except ValueError:
        return None
    return json.dumps(report, separators=(",", ":")).encode() if isinstance(report, dict) else None
