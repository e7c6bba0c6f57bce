"""The middleware that lets refused streams have HTTP 400, on small ASGI applications."""

import asyncio
import json

import pytest

from tests.unit.asgi import sent_by
from vllm_dvlm.stream_status import StreamStatus

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-request-id", b"7")]
ERROR = {"message": "no such option", "type": "BadRequestError", "param": "x", "code": 400}


def event(content):
    return b"data: " + json.dumps(content).encode() + b"\n\n"


@pytest.mark.parametrize("done", [[b"data: [DONE]\n\n", b""], []], ids=["done", "alone"])
@pytest.mark.parametrize("empty_first", [False, True])
def test_refusal_gets_its_own_status(done, empty_first):
    start, body = sent_by(StreamStatus, EVENTS, [b""] * empty_first + [event({"error": ERROR})] + done)
    assert start["status"] == 400
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"application/json" and headers[b"x-request-id"] == b"7"
    assert int(headers[b"content-length"]) == len(body["body"]) and not body["more_body"]
    assert json.loads(body["body"]) == {"error": ERROR}


@pytest.mark.parametrize(
    "bodies",
    [
        [event({"choices": []}), b"data: [DONE]\n\n"],
        [event({"choices": []}), event({"error": ERROR})],  # too late for another status
        [b"data: [DONE]\n\n"],
        [event({"error": {"message": "odd", "code": "none"}})],
        [event([1, 2])],
        [b": comment\n\n", event({"error": ERROR})],
        [b""],
    ],
)
def test_everything_else_passes(bodies):
    sent = sent_by(StreamStatus, EVENTS, bodies)
    assert [m["body"] for m in sent[1:]] == bodies
    assert sent[0] == {"type": "http.response.start", "status": 200, "headers": EVENTS}


def test_other_answers_are_not_looked_at():
    body = event({"error": ERROR})
    sent = sent_by(StreamStatus, [(b"content-type", b"text/plain")], [body])
    assert sent[0]["status"] == 200 and sent[1]["body"] == body


def test_a_stream_that_never_says_anything_still_starts():
    """Sockets and other scopes pass untouched, and a trailer after the start does not lose it."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await send({"type": "http.response.trailers", "headers": []})

    async def send(message):
        sent.append(message["type"])

    asyncio.run(StreamStatus(app)({"type": "http"}, None, send))
    assert sent == ["http.response.start", "http.response.trailers"]
