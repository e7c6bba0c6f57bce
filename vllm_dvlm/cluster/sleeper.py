"""An engine that sleeps: answers in the words of vLLM's chat endpoint after a time drawn from measured ones.

It costs next to no processor time, so many of them fit behind a real router on a few cores. Imports no Ray and no vLLM.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

Message = dict[str, Any]


def _event(choices: list[Message], **more: Any) -> bytes:
    chunk = {"id": "sleeper", "object": "chat.completion.chunk", "created": 0, "model": "model", "choices": choices}
    return b"data: " + json.dumps(chunk | more).encode() + b"\n\n"


_ROLE = _event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
_WORD = _event([{"index": 0, "delta": {"content": "word"}, "finish_reason": None}])
_LAST = _event([{"index": 0, "delta": {"content": " word"}, "finish_reason": "length"}])
_USAGE = _event([], usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}) + b"data: [DONE]\n\n"


def _part(body: bytes, is_last: bool = False) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": not is_last}


def _start(kind: bytes) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}


class Sleeper:
    """samples: pairs (seconds to the first token, seconds of the whole answer); one is drawn for each request.

    slots: requests that sleep at once; others wait for one of them, first come first served.
    """

    def __init__(self, samples: Sequence[Sequence[float]], slots: int, seed: int) -> None:
        self._samples, self._slots = samples, asyncio.Semaphore(slots)
        self._random = random.Random(seed)

    async def respond(self, scope: Message, body: bytes) -> AsyncIterator[list[Message]]:
        """As a replica's: lists of ASGI messages."""
        if scope["method"] != "POST":  # whether it is there
            yield [_start(b"application/json"), _part(b"{}", is_last=True)]
            return
        async with self._slots:
            first, whole = self._random.choice(self._samples)
            await asyncio.sleep(first)
            yield [_start(b"text/event-stream; charset=utf-8"), _part(_ROLE + _WORD)]
            await asyncio.sleep(whole - first)
        yield [_part(_LAST + _USAGE, is_last=True)]

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """The same as an ASGI application, for a web server without a router."""
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        async for messages in self.respond(scope, body):
            for message in messages:
                await send(message)
