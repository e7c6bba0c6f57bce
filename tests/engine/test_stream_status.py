"""The middleware that gives refused streams the answer of the same request without a stream, on small applications."""

import asyncio
import json

import pytest

from vllm_dvlm.serving.stream_status import StreamStatus, note_admission

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-request-id", b"7")]
JSON = [(b"content-type", b"application/json")]
BODY = {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}, "background": True}
REASON = b'{"error": {"message": "no such option", "code": 400}}'


def endpoint():
    """What routing finds."""


def served(stream, body=BODY, module="vllm.entrypoints.somewhere", method="POST", messages=()):
    """What reaches the client, and the bodies that the application was asked with.

    ``stream``: what the application does for a stream: bytes are events, True and False admit and refuse, an exception
    breaks off.
    """
    sent, asked = [], []
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    incoming = [{"type": "http.request", "body": raw[i : i + 9], "more_body": True} for i in range(0, len(raw), 9)]
    incoming += [{"type": "http.request", "body": b"", "more_body": False}, *messages]

    async def app(scope, receive, send):
        chunks = []
        while True:
            message = await receive()
            chunks.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        asked.append(b"".join(chunks))
        if messages:
            await receive()
        endpoint.__module__ = module
        scope["endpoint"] = endpoint
        if len(asked) > 1 or not stream:
            await send({"type": "http.response.start", "status": 400, "headers": JSON})
            await send({"type": "http.response.body", "body": REASON})
            return
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        for step in stream:
            if isinstance(step, bool):
                # As in vLLM, in a task of its own.
                await asyncio.create_task(noting(step))
            elif isinstance(step, Exception):
                raise step
            else:
                await send({"type": "http.response.body", "body": step, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def noting(is_admitted):
        note_admission(is_admitted)

    async def receive():
        return incoming.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/"}
    asyncio.run(StreamStatus(app)(scope, receive, send))
    return sent, asked


REFUSED = {
    "as its first event": [False, b'data: {"error": {"code": 400}}\n\n', b"data: [DONE]\n\n"],
    "after other events": [b"event: created\n\n", b"event: in_progress\n\n", False, b"event: error\n\n"],
    "by breaking off": [b"event: created\n\n", False, RuntimeError("response already started")],
    "by something that admission has not seen": [b"event: created\n\n", ValueError("vLLM's own")],
    "in words of another kind": [False, b'data: {"type": "error"}\n\n'],
    "one of several prompts": [True, False, b'data: {"error": {"code": 400}}\n\n'],
    "after an event between two prompts": [False, b"event: error\n\n", True, b"event: error\n\n"],
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_refusal_is_answered_as_without_a_stream(how):
    (start, body), asked = served(REFUSED[how])
    assert start["status"] == 400 and start["headers"] == JSON and body["body"] == REASON
    assert [json.loads(x) for x in asked] == [BODY, {"prompt": "hi", "stream": False}]


def test_a_good_stream_is_sent_as_it_is():
    events = [b"event: created\n\n", b"event: token\n\n", b"event: token\n\n"]
    sent, asked = served([events[0], True, *events[1:]])
    assert len(asked) == 1
    assert sent[0] == {"type": "http.response.start", "status": 200, "headers": EVENTS}
    assert [m["body"] for m in sent[1:]] == [*events, b""]


def test_a_stream_that_breaks_off_after_its_admission_does_so():
    with pytest.raises(RuntimeError, match="engine is dead"):
        served([True, b"event: token\n\n", RuntimeError("engine is dead")])
    with pytest.raises(RuntimeError, match="engine is dead"):
        served([True, RuntimeError("engine is dead")])


@pytest.mark.parametrize(
    "changes",
    [
        {"module": "another_plugin.routes"},
        {"method": "GET"},
        {"body": BODY | {"stream": False}},
        {"body": b"no JSON"},
        {"body": [1]},
    ],
    ids=str,
)
def test_streams_of_others_are_never_asked_for_twice(changes):
    events = [b"event: one\n\n", b"event: two\n\n"]
    sent, asked = served(events, **changes)
    assert len(asked) == 1 and [m["body"] for m in sent[1:]] == [*events, b""]


def test_a_long_stream_without_admission_is_not_kept_in_memory():
    events = [b"x" * 2**19] * 4
    sent, asked = served(events)
    assert len(asked) == 1 and [m["body"] for m in sent[1:]] == [*events, b""]


def test_nobody_is_asked_again_for_a_client_that_has_gone():
    sent, asked = served([False, b"event: error\n\n"], messages=[{"type": "http.disconnect"}])
    assert len(asked) == 1 and not sent


def test_other_answers_pass():
    sent, asked = served([])
    assert len(asked) == 1 and [m["type"] for m in sent] == ["http.response.start", "http.response.body"]


def test_a_stream_that_never_says_anything_still_starts():
    """Other scopes pass untouched."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "websocket.accept"})

    async def send(message):
        sent.append(message["type"])

    asyncio.run(StreamStatus(app)({"type": "websocket"}, None, send))
    assert sent == ["websocket.accept"]
