"""`vllm-dvlm serve` as a user starts it, and a load of picture questions on it."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from tests.ray.conftest import free_port

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "demo_model"
START_S, REQUEST_S = 300, 90
OPTIONS = {"diffusion_canvas_length": 8, "prune_method": "redvtp", "prune_keep_ratio": 0.25}
ENGINE = ["--served-model-name", "demo", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(2**27)]
CHAT = "/v1/chat/completions"


class Served:
    """A server's address and process."""

    def __init__(self, url, process, log):
        self.url, self.process, self.log = url, process, log

    def ask(self, path, body=None, timeout=REQUEST_S, headers=None):
        """(status, headers, text)."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | (headers or {})
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return reply.status, reply.headers, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def lines(self, path, body):
        """The lines of a reply as they come."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=REQUEST_S) as reply:
            for line in reply:
                yield line.decode()

    def answered(self):
        """Requests answered so far, by replica."""
        page = self.ask("/metrics")[2]
        found = re.findall(r'^vllm:request_success_total\{.*?replica="(\w+)".*?\} (\S+)$', page, re.M)
        return {name: sum(float(n) for other, n in found if other == name) for name, _ in found}

    def running(self):
        """Requests in the engines."""
        found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*?\} (\S+)$", self.ask("/metrics")[2], re.M)
        return sum(map(float, found))

    def wait_until_running(self, num):
        deadline = time.monotonic() + REQUEST_S
        while self.running() != num:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def wait_until_idle(self):
        self.wait_until_running(0)

    def wait_until_up(self):
        """Until a replica says that it is well."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                if self.ask("/health")[0] == 200:
                    return
            except OSError:
                pass
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def wait(self, num_replicas):
        """Until so many replicas show their metrics."""
        deadline = time.monotonic() + START_S
        while len(self.answered()) != num_replicas:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)


def command(model, *options):
    """The command line, and the environment without what tests set for vLLM."""
    words = [sys.executable, "-m", "vllm_dvlm.cli", "serve", str(model), "--host", "127.0.0.1", *options]
    return words, {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}


def serve_once(*options, model=MODEL):
    """A command that ends by itself."""
    words, environment = command(model, *ENGINE, *options)
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=START_S)


@contextmanager
def serving(folder, *options, port=None, model=MODEL, engine=ENGINE, **environment):
    """A server whose replicas answer."""
    port, log = port or free_port(), folder / f"server{time.monotonic_ns()}.log"
    words, kept = command(model, "--port", str(port), *options, *engine)
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, cwd=ROOT, env=kept | environment)
    try:
        deadline = time.monotonic() + START_S
        while "replicas of" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield Served(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def picture_questions(num, seed=3):
    """Bodies of chat requests."""
    from vllm_dvlm.synthetic.digit_questions import held_out

    bodies = []
    for asked in held_out(num, seed=seed):
        buffer = io.BytesIO()
        Image.fromarray(asked.image).save(buffer, format="PNG")
        link = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": link}}, {"type": "text", "text": asked.question}]
        body = {"model": "demo", "messages": [{"role": "user", "content": content}], "temperature": 0}
        bodies.append(body | {"max_tokens": 8, "vllm_xargs": OPTIONS})
    return bodies


class Load:
    """Questions in turn, `num_at_once` of them at a time, until `stop`. Entries of `done`: (index, stream or not,
    status or error, answer, seconds)."""

    def __init__(self, served, bodies, num_at_once=16, share_of_streams=0.0):
        self._served, self._bodies, self._share = served, bodies, share_of_streams
        self.done, self._next = [], 0
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._pool = ThreadPoolExecutor(num_at_once)
        self._tasks = [self._pool.submit(self._run) for _ in range(num_at_once)]

    def _run(self):
        while not self._stopped.is_set():
            with self._lock:
                i, self._next = self._next, self._next + 1
            is_stream = (i * self._share) % 1 + self._share >= 1 - 1e-9
            body = self._bodies[i % len(self._bodies)] | {"stream": is_stream}
            begin = time.monotonic()
            try:
                status, _, text = self._served.ask(CHAT, body)
                answer = text_of(text, is_stream) if status == 200 else text
            except OSError as error:
                status, answer = repr(error), ""
            self.done.append((i, is_stream, status, answer, time.monotonic() - begin))

    def wait(self, num, limit_s=START_S):
        """Until so many more were answered."""
        aim, deadline = len(self.done) + num, time.monotonic() + limit_s
        while len(self.done) < aim:
            assert time.monotonic() < deadline, f"{len(self.done)} answers"
            time.sleep(0.01)

    def stop(self):
        """Wait for what is on its way; everything that was answered."""
        self._stopped.set()
        self._pool.shutdown()
        for task in self._tasks:
            task.result()
        return self.done


LOST = "the replica that answered this request was lost"


def check(done, answers, num_lost=0):
    """Every answer came, and is that of its question; so many streams at most were told that theirs is lost."""
    lost = 0
    for i, is_stream, status, answer, _ in done:
        if is_stream and isinstance(answer, dict) and answer["error"]["message"] == LOST:
            lost += 1
        else:
            assert (status, answer) == (200, answers[i % len(answers)]), i
    assert lost <= num_lost


def text_of(text, is_stream):
    """The answer in a reply, or the error that ends a stream."""
    if not is_stream:
        return json.loads(text)["choices"][0]["message"]["content"].strip()
    assert text.endswith("data: [DONE]\n\n"), text[-300:]
    found = ""
    for line in text.splitlines():
        if line.startswith("data: {"):
            part = json.loads(line.removeprefix("data: "))
            if "error" in part:
                return part
            found += "".join(choice["delta"].get("content") or "" for choice in part["choices"])
    return found.strip()


def processes(pattern):
    """Ids of the processes whose command line has this."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if re.search(pattern, line)]


def wait_until(holds, limit_s=REQUEST_S):
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


REPLICA = r"ray::ServeReplica\S*:engine"
