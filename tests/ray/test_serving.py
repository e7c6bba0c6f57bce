"""`vllm-dvlm serve`: two replicas of the demo model behind one address; one is killed under load."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from tests.ray.conftest import free_port

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "demo_model"
START_S, REQUEST_S = 300, 60
OPTIONS = {"diffusion_canvas_length": 8, "prune_method": "redvtp", "prune_keep_ratio": 0.25}


class Served:
    """A server's address and process."""

    def __init__(self, url, process, log):
        self.url, self.process, self.log = url, process, log

    def ask(self, path, body=None):
        """(status, headers, text)."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_S) as reply:
                return reply.status, reply.headers, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def answered(self):
        """Requests answered so far, by replica."""
        page = self.ask("/metrics")[2]
        found = re.findall(r'^vllm:request_success_total\{.*?replica="(\w+)".*?\} (\S+)$', page, re.M)
        return {name: sum(float(n) for other, n in found if other == name) for name, _ in found}


@pytest.fixture(scope="module")
def questions():
    pytest.importorskip("sklearn")
    from vllm_dvlm.bench.digit_questions import held_out

    bodies = []
    for asked in held_out(16, seed=3):
        buffer = io.BytesIO()
        Image.fromarray(asked.image).save(buffer, format="PNG")
        link = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": link}}, {"type": "text", "text": asked.question}]
        body = {"model": "demo", "messages": [{"role": "user", "content": content}], "temperature": 0}
        bodies.append(body | {"max_tokens": 8, "vllm_xargs": OPTIONS})
    return bodies


@pytest.fixture(scope="module")
def served(cluster, tmp_path_factory):
    port, log = free_port(), tmp_path_factory.mktemp("served") / "server.log"
    command = [sys.executable, "-m", "vllm_dvlm.cli", "serve", str(MODEL), "--replicas", "2", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "demo", "--max-num-seqs", "8"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--kv-cache-memory-bytes", str(2**27)], stdout=file, stderr=file, cwd=ROOT, env=environment
        )
    found = Served(f"http://127.0.0.1:{port}", process, log)
    try:
        deadline = time.monotonic() + START_S
        while "replicas of" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield found
    finally:
        process.kill()
        process.wait()


def replica_processes():
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if re.search(r"ray::ServeReplica\S*engine", line)]


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


def test_a_killed_replica_loses_what_it_held_at_most(served, questions):
    def ask(i):
        try:
            return served.ask("/v1/chat/completions", questions[i % 16])[0]
        except OSError as error:
            return str(error)

    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(ask, i) for i in range(320)]
        while sum(each.done() for each in waiting) < 60:
            time.sleep(0.01)
        os.kill(replica_processes()[0], signal.SIGKILL)
        found = [each.result() for each in waiting]
    lost = [status for status in found if status != 200]
    assert len(lost) <= 16 and set(lost) <= {500, 503}, lost
    deadline = time.monotonic() + START_S
    while len(served.answered()) < 2 or len(replica_processes()) < 2:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert ask(0) == 200


def test_shutdown_finishes_what_was_begun(served, questions):
    body = questions[0] | {"vllm_xargs": {"diffusion_canvas_length": 256}, "max_tokens": 256, "ignore_eos": True}
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(served.ask, "/v1/chat/completions", body) for _ in range(4)]
        time.sleep(1)
        served.process.send_signal(signal.SIGTERM)
        assert [each.result()[0] for each in waiting] == [200] * 4
    assert served.process.wait(60) == 0, served.log.read_text()[-2000:]
