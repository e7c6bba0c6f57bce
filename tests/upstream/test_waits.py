"""Waiting on vLLM's shared-memory queue with our replacement: a reader sleeps, and every message arrives in order."""

import threading
import time

import pytest
from vllm.distributed.device_communicators import shm_broadcast

from vllm_dvlm.patches.vllm import p004_waits_that_sleep as p004

NUM = 300


@pytest.fixture
def queue():
    writer = shm_broadcast.MessageQueue(1, 1, max_chunks=2)
    reader = shm_broadcast.MessageQueue.create_from_handle(writer.export_handle(), 0)
    for side in (reader.wait_until_ready, writer.wait_until_ready):
        threading.Thread(target=side).start()
    yield writer, reader
    reader.shutdown()


@pytest.mark.parametrize("pause_s", [0, 2e-4, 3e-3])
def test_every_message_arrives_and_long_waits_are_slept_through(queue, monkeypatch, pause_s):
    writer, reader = queue
    slept = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", shm_broadcast.sched_yield)  # restored after the test
    monkeypatch.setattr(p004, "sleep", lambda seconds: (slept.append(seconds), time.sleep(seconds)))
    p004.install()

    def write():
        for i in range(NUM):
            time.sleep(pause_s)
            writer.enqueue(("message", i))

    thread = threading.Thread(target=write)
    thread.start()
    assert [reader.dequeue(timeout=60) for _ in range(NUM)] == [("message", i) for i in range(NUM)]
    thread.join()
    # Not for every message: on a busy machine the next one may be there already.
    assert pause_s < p004.SPIN_S or len(slept) > NUM / 10


def test_a_wait_begins_with_yields(monkeypatch):
    seen, now = [], [100.0]
    monkeypatch.setattr(p004, "monotonic", lambda: now[0])
    monkeypatch.setattr(p004, "sched_yield", lambda: seen.append("yield"))
    monkeypatch.setattr(p004, "sleep", seen.append)
    rest = p004.Rest()
    for step in (0, 1e-4, 1e-4, 2e-4, 5e-4, 2 * p004.GAP_S):
        now[0] += step
        rest()
    assert seen == ["yield"] * 3 + [p004.SLEEP_S] * 2 + ["yield"]
