"""The middleware that copies a reply's report into a header, on small ASGI applications."""

import json

import pytest

from tests.unit.asgi import sent_by
from vllm_dvlm.serving.report_header import NAME, ReportHeader, report_in

JSON = [(b"content-type", b"application/json"), (b"x-request-id", b"7")]
REPORT = {"visual_tokens_before": 869, "prune_ms": 1.5}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_report_becomes_a_header(separators):
    said = 'a text with "dvlm": {"x": 1} in it'
    content = {"choices": [said], "kv_transfer_params": {"dvlm": REPORT}, "after": said}
    body = json.dumps(content, separators=separators).encode()
    start, message = sent_by(ReportHeader, JSON, [body])
    headers = dict(start["headers"])
    assert json.loads(headers[NAME]) == REPORT and headers[b"x-request-id"] == b"7"
    assert message == {"type": "http.response.body", "body": body, "more_body": False}


@pytest.mark.parametrize(
    "headers, bodies",
    [
        (JSON, [b'{"choices": []}']),
        (JSON, [json.dumps({"text": '"dvlm": {"x": 1}'}).encode()]),
        (JSON, [b'{"dvlm": 3}']),
        (JSON, [b'{"dvlm": {"cut']),
        (JSON, [b""]),
        ([(b"content-type", b"text/event-stream")], [b'data: {"dvlm": {"x": 1}}\n\n', b"data: [DONE]\n\n"]),
    ],
)
def test_everything_else_passes(headers, bodies):
    sent = sent_by(ReportHeader, headers, bodies)
    assert sent[0] == {"type": "http.response.start", "status": 200, "headers": headers}
    assert [message["body"] for message in sent[1:]] == bodies


def test_web_sockets_pass():
    assert sent_by(ReportHeader, JSON, [b'{"dvlm": {"x": 1}}'], "websocket")[0]["headers"] == JSON


def test_report_is_ascii():
    assert report_in('{"dvlm": {"a": "é"}}'.encode()) == b'{"a":"\\u00e9"}'
