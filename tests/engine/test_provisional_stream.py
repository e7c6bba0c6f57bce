"""Streams that show the canvas, over HTTP: committed text stays what it is, snapshots and pruning stand beside it."""

import base64
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.engine.server import MODEL, Server
from vllm_dvlm.bench.questions import load_items

DEMO = Path(__file__).parents[2] / "examples" / "demo_lavida"  # takes every step of its canvas
CANVAS = 24
PRUNED = {"prune_method": "redvtp", "prune_keep_ratio": 0.25}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    served = Server(DEMO, log, {}, "--kv-cache-memory-bytes", str(2**27), "--max-num-seqs", "8")
    yield served
    served.stop()


@pytest.fixture(scope="module")
def chats():
    """Bodies of chats about pictures."""
    items, _ = load_items(None, 6, 0)
    return [body(item) for item in items]


def body(item):
    data = io.BytesIO()
    item.open_images()[0].save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": item.question}]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": CANVAS, "temperature": 0}


def streamed(server, request, path="/v1/chat/completions", **options):
    """Chunks of a stream; `options` are ours."""
    sent = request | {"stream": True, "vllm_xargs": options}
    with server.http.stream("POST", path, json=sent) as reply:
        assert reply.status_code == 200, reply.read()
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def every_shown(server, request, steps, path="/v1/chat/completions", **options):
    """Chunks of a stream that shows these steps, and these steps.

    Asked again where the server was too busy to show each: vLLM merges what waits, and the newest canvas stays.
    """
    for _ in range(20):
        chunks = streamed(server, request, path, diffusion_stream="provisional", **options)
        shown = events(chunks, "snapshot")
        found = [event["step"] for event in shown]
        assert set(found) <= set(steps) and found == sorted(set(found))
        if found == list(steps):
            return chunks, shown
    raise AssertionError(f"steps {found} of {list(steps)} shown")


def content(chunks):
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice.get("text", choice.get("delta", {}).get("content")) or "" for choice in choices)


def events(chunks, kind):
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    found = [choice.get("delta", choice).get("diffusion") for choice in choices]
    return [event for event in found if event and event["event"] == kind]


def answer(server, request, **options):
    reply = server.http.post("/v1/chat/completions", json=request | {"vllm_xargs": options})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_snapshots(server, chats):
    """One for each step but the last; positions only ever get written; what is committed is in no snapshot any more."""
    plain = answer(server, chats[0])
    chunks, shown = every_shown(server, chats[0], range(1, plain["kv_transfer_params"]["dvlm"]["denoise_steps"]))
    assert content(chunks) == plain["choices"][0]["message"]["content"]
    assert all(event["step"] == event["nfe"] for event in shown)
    assert {event["total_steps"] for event in shown} == {CANVAS} and {event["block"] for event in shown} == {0}
    cells = [None] * CANVAS
    for event in shown:
        now = cells[: event["token_offset"]] + event["tokens"]
        assert len(now) == CANVAS and event["masked"] == event["tokens"].count(None)
        assert all(before in (None, after) for before, after in zip(cells, now, strict=True))
        assert [c is None for c in event["confidence"]] == [t is None for t in event["tokens"]]
        assert all(0 <= c <= 1 for c in event["confidence"] if c is not None)
        assert event["text"].count("▒") == event["masked"]
        cells = now
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]} and {chunk["model"] for chunk in chunks} == {MODEL}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_the_report_ends_every_stream(server, chats):
    """As an unstreamed reply has it, with and without snapshots."""
    expected = answer(server, chats[1])["kv_transfer_params"]["dvlm"]
    for options in ({}, {"diffusion_stream": "committed"}, {"diffusion_stream": "provisional"}):
        chunks = streamed(server, chats[1] | {"stream_options": {"include_usage": True}}, **options)
        (last,) = [chunk for chunk in chunks if "kv_transfer_params" in chunk]
        assert last["choices"][0]["finish_reason"] in ("stop", "length")
        assert last["kv_transfer_params"]["dvlm"] == expected
        assert chunks[-1]["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("stream", ["committed", "provisional"])
def test_prompts_of_one_completion(server, stream):
    """Each has its own report, and the canvas of each stands under its own index."""
    prompts = ["How many?", "What is to be seen in a picture that nobody has sent?"]
    request = {"model": MODEL, "max_tokens": CANVAS, "temperature": 0, "ignore_eos": True}
    alone = [
        server.http.post("/v1/completions", json=request | {"prompt": prompt}).json()["kv_transfer_params"]["dvlm"]
        for prompt in prompts
    ]
    assert alone[0] != alone[1]
    shown = [[], []]
    for _ in range(10):  # a busy server shows fewer canvases
        chunks = streamed(server, request | {"prompt": prompts}, "/v1/completions", diffusion_stream=stream)
        ends = [chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0]["finish_reason"]]
        assert {c["choices"][0]["index"]: c["kv_transfer_params"]["dvlm"] for c in ends} == dict(enumerate(alone))
        for index in range(2):
            own = [chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0]["index"] == index]
            shown[index] = [event["step"] for event in events(own, "snapshot")]
            assert shown[index] == sorted(set(shown[index]))
        assert len({chunk["id"] for chunk in chunks}) == 1
        if stream == "committed" or all(len(each) > 2 for each in shown):
            break
    assert all(shown) == (stream == "provisional")


def test_an_interval_of_vllms_own_is_refused(server, chats):
    """It would hide canvases silently."""
    sent = chats[0] | {"stream": True, "stream_interval": 4, "vllm_xargs": {"diffusion_stream": "provisional"}}
    reply = server.http.post("/v1/chat/completions", json=sent)
    assert reply.status_code == 400 and "use diffusion_stream_every" in reply.text


def test_off_is_as_absent(server, chats):
    """Not one event more, not one other word."""

    def plain(chunks):
        return [{key: chunk[key] for key in chunk if key not in ("id", "created")} for chunk in chunks]

    absent, off = streamed(server, chats[0]), streamed(server, chats[0], diffusion_stream="committed")
    assert plain(absent) == plain(off) and not events(off, "snapshot")


def test_pruning_is_told_once(server, chats):
    chunks = streamed(server, chats[2], diffusion_stream="provisional", **PRUNED)
    (pruned,) = events(chunks, "pruned")
    (report,) = [chunk["kv_transfer_params"]["dvlm"] for chunk in chunks if "kv_transfer_params" in chunk]
    assert pruned["visual_tokens"] == [report["visual_tokens_before"], report["visual_tokens_after"]]
    assert pruned["kv_blocks_freed"] == report["kv_blocks_freed"] > 0
    kept = pruned["kept"]
    assert len(kept) == report["visual_tokens_after"] and kept == sorted(set(kept))
    assert sum(image["visual_tokens"] for image in pruned["images"]) == report["visual_tokens_before"] > kept[-1]
    assert pruned["images"][0]["overview"]
    assert content(chunks) == answer(server, chats[2], **PRUNED)["choices"][0]["message"]["content"]


def test_every_nth_step(server, chats):
    every_shown(server, chats[0], range(1, CANVAS, 5), diffusion_stream_every=5)


@pytest.mark.parametrize("place", ["body", "options"])
@pytest.mark.parametrize(
    "names, shows",
    [({"stream_mode": "denoise"}, True), ({"diffusing": True}, True), ({"stream_mode": "block_append"}, False)],
)
def test_names_of_other_servers(server, chats, names, shows, place):
    in_body, in_options = (names, {}) if place == "body" else ({}, names)
    chunks = streamed(server, chats[0] | in_body, **in_options)
    assert bool(events(chunks, "snapshot")) == shows


def test_completions(server):
    request = {"model": MODEL, "prompt": "what is it?", "max_tokens": 12, "temperature": 0}
    chunks, _ = every_shown(server, request, range(1, 12), "/v1/completions")
    assert {chunk["id"] for chunk in chunks} == {chunks[-1]["id"]} and {chunk["model"] for chunk in chunks} == {MODEL}
    plain = server.http.post("/v1/completions", json=request).json()
    assert content(chunks) == plain["choices"][0]["text"]


@pytest.mark.parametrize(
    "more, options, message",
    [
        ({}, {"diffusion_stream": "provisional"}, "set stream to true"),
        ({"stream": True, "n": 2, "temperature": 1}, {"diffusion_stream": "provisional"}, "leave n at 1"),
        ({"stream": True}, {"diffusion_stream": "canvas"}, "diffusion_stream must be one of committed, provisional"),
        ({"stream": True}, {"diffusion_stream_every": 3}, "diffusion_stream_every belongs to"),
        ({"stream": True}, {"diffusion_stream": "provisional", "diffusion_stream_every": 0}, "an integer ≥ 1"),
        ({"stream": True}, {"stream_mode": "all"}, "stream_mode must be one of denoise, block_append"),
        ({"stream": True, "diffusing": "yes"}, {}, "diffusing must be one of true, false"),
        ({"stream": True}, {"diffusing": True, "diffusion_stream": "committed"}, "contradicts diffusion_stream"),
    ],
)
def test_refusals(server, chats, more, options, message):
    reply = server.http.post("/v1/chat/completions", json=chats[0] | more | {"vllm_xargs": options})
    assert reply.status_code == 400 and message in reply.json()["error"]["message"], reply.text


def test_other_endpoints_refuse(server):
    request = {"model": MODEL, "input": "Hi", "stream": True, "vllm_xargs": {"diffusion_stream": "provisional"}}
    reply = server.http.post("/v1/responses", json=request)
    assert reply.status_code == 400 and "use one of them" in reply.json()["error"]["message"], reply.text


def test_side_by_side(server, chats):
    """Eight at once, shown and not, pruned and not: the same texts as alone."""
    work = [(chat, opts) for chat in chats for opts in ({}, PRUNED)]
    expected = [answer(server, chat, **opts)["choices"][0]["message"]["content"] for chat, opts in work]

    def ask(number):
        chat, opts = work[number // 2]
        shown = {"diffusion_stream": "provisional"} if number % 2 else {}
        return content(streamed(server, chat, **opts, **shown))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(2 * len(work))))
    assert found == [text for text in expected for _ in range(2)]


def is_idle(server):
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
    counts = [line for line in server.http.get("/metrics").text.splitlines() if line.startswith(names)]
    return counts and all(line.endswith(" 0.0") for line in counts)


def until_idle(server):
    deadline = time.monotonic() + 30
    while not is_idle(server):
        assert time.monotonic() < deadline, "a request stayed"
        time.sleep(0.1)


def test_a_client_that_leaves(server, chats):
    long = chats[0] | {"max_tokens": 256, "stream": True, "vllm_xargs": {"diffusion_stream": "provisional"}}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=long, timeout=60) as reply:
        lines = (line for line in reply.iter_lines() if line)
        for _ in range(4):
            next(lines)
    until_idle(server)


def test_a_client_that_reads_slowly(server, chats):
    """It sees fewer canvases and the whole answer; meanwhile others are answered, and nothing piles up."""
    long = chats[0] | {"max_tokens": 384, "stream": True, "vllm_xargs": {"diffusion_stream": "provisional"}}
    data = json.dumps(long).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        "Connection: close",
    )
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", server.port))
    slow.sendall("".join(f"{line}\r\n" for line in (*head, "")).encode() + data)
    begin = time.monotonic()
    others = [threading.Thread(target=answer, args=(server, chat)) for chat in chats[1:4]]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join(60)
        assert not thread.is_alive()
    until_idle(server)  # the engine has long finished what the client has not read
    assert time.monotonic() - begin < 60
    received = b""
    slow.settimeout(60)
    while piece := slow.recv(65536):
        received += piece
    slow.close()
    assert b"data: [DONE]" in received and b'"kv_transfer_params"' in received
    assert received.count(b'"event": "snapshot"') < 383
