"""A server with a small KV pool: pruning puts more requests in flight, and /metrics says what was freed."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import tiny_checkpoint
from tests.engine.server import BUILD_ARGS, MODEL, Server, chat_of

# One request of case b1 with a canvas of 32 has 961 tokens, 31 KV blocks of 32; at keep ratio 0.1 it has 178, 6 blocks.
NUM_BLOCKS = 64
BLOCKS_FULL, BLOCKS_PRUNED = 31, 6
NUM_REQUESTS = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    checkpoint = tiny_checkpoint.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints", **BUILD_ARGS)
    log = tmp_path_factory.mktemp("server") / "small_pool.log"
    flags = ("--max-model-len", "1536", "--num-gpu-blocks-override", str(NUM_BLOCKS))
    running = Server(checkpoint, log, {"dvlm": {"diffusion_refresh_interval": 32}}, *flags)
    yield running
    running.stop()


def most_in_flight(server, **options):
    """Send the same request ``NUM_REQUESTS`` times at once; most requests that ran at a time, and the replies."""
    body = chat_of("b1_image_steps_eq_gen", max_tokens=32, ignore_eos=True)
    body["vllm_xargs"] = {"diffusion_canvas_length": 32} | options
    most, done = 0, threading.Event()

    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, int(server.metrics("vllm:num_requests_running")["vllm:num_requests_running"]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            replies = list(pool.map(lambda _: server.send(body), range(NUM_REQUESTS)))
    finally:
        done.set()
        watcher.join()
    server.wait_idle()
    return most, replies


def test_pruning_frees_blocks_for_waiting_requests(server):
    before = server.metrics("vllm_dvlm:")
    unpruned, _ = most_in_flight(server)
    # The null block is not for requests: 63 blocks hold two whole requests.
    assert 1 <= unpruned <= (NUM_BLOCKS - 1) // BLOCKS_FULL
    assert server.metrics("vllm_dvlm:")["vllm_dvlm:kv_blocks_freed_total"] == before["vllm_dvlm:kv_blocks_freed_total"]

    pruned, replies = most_in_flight(server, prune_method="redvtp", prune_keep_ratio=0.1)
    assert pruned > 2 * unpruned
    after = server.metrics("vllm_dvlm:")
    freed = after["vllm_dvlm:kv_blocks_freed_total"] - before["vllm_dvlm:kv_blocks_freed_total"]
    assert freed == NUM_REQUESTS * (BLOCKS_FULL - BLOCKS_PRUNED)
    assert after["vllm_dvlm:requests_pruned_total"] - before["vllm_dvlm:requests_pruned_total"] == NUM_REQUESTS
    report = replies[0]["kv_transfer_params"]["dvlm"]
    assert (report["kv_blocks_before"], report["kv_blocks_after"]) == (BLOCKS_FULL, BLOCKS_PRUNED)
    assert report["visual_tokens_before"] == 869
    assert report["visual_tokens_after"] == 86
    spent = after["vllm_dvlm:prune_seconds_total"] - before["vllm_dvlm:prune_seconds_total"]
    assert spent == pytest.approx(sum(r["kv_transfer_params"]["dvlm"]["prune_ms"] for r in replies) / 1000)
    assert len({reply["choices"][0]["message"]["content"] for reply in replies}) == 1


@pytest.mark.parametrize("options", [{}, {"prune_method": "redvtp", "prune_keep_ratio": 0.25}], ids=["none", "pruned"])
def test_report_in_a_header(server, options):
    """Also for clients that know no other fields than OpenAI's; a stream's headers are sent before it is known."""
    body = chat_of("b1_image_steps_eq_gen", max_tokens=8, ignore_eos=True)
    body["vllm_xargs"] = {"diffusion_canvas_length": 8} | options
    reply = server.http.post("/v1/chat/completions", json=body)
    report = json.loads(reply.headers["x-vllm-dvlm"])
    assert report == reply.json()["kv_transfer_params"]["dvlm"]
    assert report["denoise_steps"] > 1 and bool(report.get("prune_ms")) == bool(options)
    streamed = server.http.post("/v1/chat/completions", json=body | {"stream": True})
    assert streamed.status_code == 200 and "x-vllm-dvlm" not in streamed.headers
    server.wait_idle()


def test_no_named_length_is_the_familys_default_canvas(server):
    """Not all that fits: the official demo's 128 tokens, in one block with a step per position."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
    reply = server.send(body)
    assert reply["usage"]["completion_tokens"] == 128
    assert reply["kv_transfer_params"]["dvlm"]["denoise_steps"] == 128
    picture = chat_of("b1_image_steps_eq_gen", ignore_eos=True, vllm_xargs={})
    del picture["max_tokens"]
    assert server.send(picture)["usage"]["completion_tokens"] == 128
    response = {"model": MODEL, "input": "hi", "ignore_eos": True}
    assert server.http.post("/v1/responses", json=response).json()["usage"]["output_tokens"] == 128
    # What is named is untouched.
    assert server.send(body | {"max_tokens": 140})["usage"]["completion_tokens"] == 140
    named = server.send(body | {"vllm_xargs": {"diffusion_canvas_length": 160, "diffusion_max_steps": 8}})
    assert named["usage"]["completion_tokens"] == 160
