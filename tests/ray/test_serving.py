"""`vllm-dvlm serve`: two replicas of the demo model behind one address; they are killed and replaced under load."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.ray.served import (
    CHAT,
    LOST,
    REPLICA,
    Load,
    check,
    picture_questions,
    processes,
    serve_once,
    serving,
    text_of,
)


@pytest.fixture(scope="module")
def questions():
    pytest.importorskip("sklearn")
    return picture_questions(16)


@pytest.fixture(scope="module")
def served(cluster, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served"), "--replicas", "2") as found:
        yield found


def test_the_server_is_vllms_own(served, questions):
    status, headers, text = served.ask("/v1/chat/completions", questions[0])
    assert status == 200 and headers["x-vllm-dvlm"]
    report = json.loads(text)["kv_transfer_params"]["dvlm"]
    assert report["kv_blocks_after"] < report["kv_blocks_before"]
    for stream in (False, True):
        wrong = questions[0] | {"vllm_xargs": {"prune_keep_ratio": 7}, "stream": stream}
        status, _, text = served.ask("/v1/chat/completions", wrong)
        assert status == 400 and "prune_keep_ratio must be" in json.loads(text)["error"]["message"]
    assert served.ask("/health")[0] == 200
    assert json.loads(served.ask("/v1/models")[2])["data"][0]["id"] == "demo"
    assert json.loads(served.ask("/tokenize", {"model": "demo", "prompt": "the 7"})[2])["count"] == 2


def test_page_canvases_and_decisions_pass_the_router(served, questions):
    status, headers, text = served.ask("/dvlm")
    assert status == 200 and headers["content-type"].startswith("text/html") and "page.js" in text
    body = questions[0] | {"stream": True, "max_tokens": 64}
    body |= {"vllm_xargs": body["vllm_xargs"] | {"diffusion_canvas_length": 64, "diffusion_stream": "provisional"}}
    text = served.ask(CHAT, body)[2]
    assert '"event": "pruned"' in text and '"event": "snapshot"' in text and '"kv_transfer_params"' in text
    question = {"type": "choice", "instructions": "how many 7 are there?", "criteria": dict.fromkeys("0123456789")}
    picture = questions[0]["messages"][0]["content"][0]["image_url"]["url"]
    asked = {"model": "demo", "state": None, "images": [picture], "questions": {"sevens": question}}
    status, _, text = served.ask("/v1/systemone", asked | {"chat_template_kwargs": {"decision_labels": "words"}})
    assert status == 200, text
    shares = json.loads(text)["answers"]["sevens"]["probabilities"]
    assert len(shares) == 10 and abs(sum(shares.values()) - 1) < 1e-6


def test_replicas_share_the_load_and_the_metrics_page_shows_both(served, questions):
    before = served.answered()
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda body: served.ask("/v1/chat/completions", body), questions * 4))
    assert {status for status, _, _ in texts} == {200}
    answers = [json.loads(text)["choices"][0]["message"]["content"] for _, _, text in texts]
    assert answers == answers[:16] * 4
    done = {name: count - before.get(name, 0) for name, count in served.answered().items()}
    assert len(done) == 2 and sum(done.values()) == 64 and min(done.values()) > 0
    assert "vllm_dvlm:requests_pruned_total{" in served.ask("/metrics")[2]


@pytest.fixture(scope="module")
def answers(served, questions):
    return [text_of(served.ask(CHAT, body)[2], False) for body in questions]


def test_streams_say_the_same(served, questions, answers):
    status, headers, text = served.ask(CHAT, questions[0] | {"stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert text_of(text, True) == answers[0]


def test_a_killed_replica_costs_at_most_the_streams_that_had_begun(served, questions, answers):
    load = Load(served, questions, share_of_streams=0.5)
    load.wait(64)
    os.kill(processes(REPLICA)[0], signal.SIGKILL)
    load.wait(200)
    done = load.stop()
    # Those that it held and that had begun: at most half of 16 are streams.
    check(done, answers, num_lost=8)
    assert max(seconds for *_, seconds in done) < 10
    served.wait(2)


def test_a_stream_that_had_begun_ends_with_an_error_event(served, questions):
    body = questions[0] | {"max_tokens": 256, "ignore_eos": True, "stream": True}
    body["vllm_xargs"] = {"diffusion_canvas_length": 256, "diffusion_block_length": 8}
    lines = served.lines(CHAT, body)
    begun = [next(lines) for _ in range(8)]
    for replica in processes(REPLICA):
        os.kill(replica, signal.SIGKILL)
    found = text_of("".join([*begun, *lines]), True)
    assert found["error"]["message"] == LOST
    served.wait(2)


def test_a_frozen_replica_is_replaced_and_its_requests_repeated(served, questions, answers):
    load = Load(served, questions, share_of_streams=0.5)
    load.wait(64)
    frozen = processes(REPLICA)[0]
    os.kill(frozen, signal.SIGSTOP)
    # Three checks of --health-timeout seconds, and what lies between them.
    deadline = time.monotonic() + 60
    while frozen in processes(REPLICA):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    check(load.stop(), answers, num_lost=8)
    served.wait(2)


def test_a_client_that_hangs_up_ends_its_request(served, questions):
    body = questions[0] | {"max_tokens": 256, "ignore_eos": True}
    body["vllm_xargs"] = {"diffusion_canvas_length": 256, "diffusion_block_length": 8}  # seconds
    before = sum(served.answered().values())
    with pytest.raises(OSError):
        served.ask(CHAT, body, timeout=1)
    served.wait_until_idle()
    lines = served.lines(CHAT, body | {"stream": True})
    assert next(lines)
    lines.close()
    served.wait_until_idle()
    assert sum(served.answered().values()) == before
    assert served.ask(CHAT, questions[0])[0] == 200
    assert sum(served.answered().values()) == before + 1


def test_requests_may_bear_the_same_id(served, questions, answers):
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda body: served.ask(CHAT, body, headers={"X-Request-Id": "same"}), questions))
    assert [text_of(text, False) for *_, text in replies] == answers
    assert {json.loads(text)["id"] for *_, text in replies} == {"chatcmpl-same"}


def test_a_command_that_cannot_serve_leaves_the_earlier_one(served, questions, answers):
    port = served.url.rpartition(":")[2]
    load = Load(served, questions, num_at_once=4)
    for wrong, reason in (
        (["--max-model-len", "99999999"], "greater than the derived max_model_len"),
        (["--kv-cache-memory-bytes", "1000"], "the replicas do not start: ValueError: No available memory"),
    ):
        ended = serve_once("--replicas", "1", *wrong, "--port", port)
        assert ended.returncode == 2 and reason in ended.stderr, ended.stderr[-2000:]
    # Once the earlier command has its own replicas again, the load is answered by both.
    deadline = time.monotonic() + 120
    while "could not serve in place of this one" not in served.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    served.wait(2)
    check(load.stop(), answers)
    assert served.process.poll() is None


def test_another_command_takes_over_without_an_error(served, questions, answers, tmp_path):
    load = Load(served, questions)
    load.wait(32)
    port = int(served.url.rpartition(":")[2])
    with serving(tmp_path, "--replicas", "1", port=port) as later:
        assert served.process.wait(60) == 0
        assert "another command serves now" in served.log.read_text()
        later.wait(1)
        load.wait(32)
        check(load.stop(), answers)
        long = questions[0] | {"vllm_xargs": {"diffusion_canvas_length": 256}, "max_tokens": 256, "ignore_eos": True}
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(later.ask, CHAT, long) for _ in range(4)]
            later.wait_until_running(4)
            later.process.send_signal(signal.SIGTERM)
            assert [each.result()[0] for each in waiting] == [200] * 4
        assert later.process.wait(60) == 0, later.log.read_text()[-2000:]
