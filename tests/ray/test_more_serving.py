"""`vllm-dvlm serve`: the number of replicas follows the load; one whose memory runs out is replaced."""

import os
import resource
import signal
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.ray.served import CHAT, REPLICA, Load, check, picture_questions, processes, serving, text_of, wait_until


@pytest.fixture(scope="module")
def questions():
    pytest.importorskip("sklearn")
    return picture_questions(16)


def answers_of(served, questions):
    return [text_of(served.ask(CHAT, body)[2], False) for body in questions]


def test_the_number_of_replicas_follows_the_load(cluster, questions, tmp_path):
    bounds = ["--min-replicas", "1", "--max-replicas", "2", "--target-ongoing-requests", "4"]
    with serving(tmp_path, *bounds, "--upscale-delay", "1", "--downscale-delay", "1") as served:
        answers = answers_of(served, questions)
        served.wait(1)
        load = Load(served, questions)
        served.wait(2)
        load.wait(64)
        check(load.stop(), answers)
        load = Load(served, questions, num_at_once=2)
        wait_until(lambda: len(processes(REPLICA)) == 1)
        load.wait(16)
        check(load.stop(), answers)


def test_a_replica_without_memory_is_replaced(cluster, questions, tmp_path):
    with serving(tmp_path, "--replicas", "2") as served:
        answers = answers_of(served, questions)
        load = Load(served, questions, share_of_streams=0.5)
        load.wait(64)
        starved = processes(REPLICA)[0]
        held = int(Path(f"/proc/{starved}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.prlimit(starved, resource.RLIMIT_AS, (held, held))  # nothing more can be allocated
        wait_until(lambda: starved not in processes(REPLICA))
        load.wait(64)
        check(load.stop(), answers, num_lost=8)
        served.wait(2)


def test_a_request_that_loses_two_replicas_is_told(cluster, questions, tmp_path):
    long = questions[0] | {"max_tokens": 256, "ignore_eos": True}
    long["vllm_xargs"] = {"diffusion_canvas_length": 256, "diffusion_block_length": 8}
    with serving(tmp_path, "--replicas", "1") as served:
        load = Load(served, [long], num_at_once=1)
        for _ in range(2):
            served.wait_until_running(1)
            os.kill(processes(REPLICA)[0], signal.SIGKILL)
            served.wait_until_idle()
        load.wait(1)
        *_, status, text, _ = load.done[0]
        assert status == 500 and "so was a second one" in text


def test_encrypted(cluster, questions, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    with serving(tmp_path, "--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)) as served:
        assert "at https://127.0.0.1:" in served.log.read_text()
        url = served.url.replace("http:", "https:")
        reply = httpx.post(f"{url}{CHAT}", json=questions[0], verify=ssl.create_default_context(cafile=certificate))
        assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"]
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{served.url}{CHAT}", json=questions[0])


def test_a_command_that_comes_while_another_one_ends(cluster, questions, tmp_path):
    """What the first one has accepted is answered; the second one serves, and nobody ends what is its own."""
    long = questions[0] | {"max_tokens": 512, "ignore_eos": True}
    long["vllm_xargs"] = {"diffusion_canvas_length": 512, "diffusion_block_length": 8}
    with serving(tmp_path, "--replicas", "1", '--additional-config={"dvlm": {"max_canvas_length": 512}}') as first:
        port = int(first.url.rpartition(":")[2])
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(first.ask, CHAT, long) for _ in range(4)]
            first.wait_until_running(4)
            first.process.send_signal(signal.SIGTERM)
            with serving(tmp_path, "--replicas", "1", port=port) as second:
                assert [each.result()[0] for each in waiting] == [200] * 4
                assert first.process.wait(60) == 0
                second.wait(1)
                assert second.ask(CHAT, questions[0])[0] == 200 and second.process.poll() is None
