"""`vllm-dvlm serve`: the number of replicas follows the load; one whose memory runs out is replaced."""

import os
import resource
import signal
from pathlib import Path

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
