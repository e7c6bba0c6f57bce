"""A real ``vllm serve`` in a process group of its own, for tests over HTTP."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.golden import cases

VLLM = Path(sys.executable).with_name("vllm")
MODEL = "tiny"
# The golden checkpoint whose end-of-turn token took the place of word 714. Cases recorded on the plain checkpoint
# never commit that word, so this one repeats them, too.
BUILD_ARGS = {"seed": 0, "eot_like": 714}
START_UP_S = 400
STOP_S = 20
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$")


def poll(check: Any, seconds: float, what: str) -> Any:
    """The first true value of ``check()``; AssertionError naming ``what`` when the time is up."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return value


class Server:
    """``vllm serve`` on a free port, ready when constructed; ``stop`` ends it and everything that it started."""

    def __init__(self, checkpoint: Path, log: Path, additional_config: dict[str, Any], *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [VLLM, "serve", checkpoint, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--served-model-name", MODEL, "--additional-config", json.dumps(additional_config), *flags]
        begin = time.monotonic()
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            poll(self._is_ready, START_UP_S, "the server is ready")
        except BaseException:
            self.stop()
            print(self.log_text()[-8000:])
            raise
        self.start_up_s = time.monotonic() - begin
        self.http = httpx.Client(base_url=self.url, timeout=120)
        # The clients of the tests must see what the server answers, not a repetition of their own.
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}"
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """Ask the whole process group to end, then make it."""
        for number, seconds in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(seconds)
                poll(self._is_gone, seconds, "no process of the server is left")
                return
            except ProcessLookupError:
                return
            except (subprocess.TimeoutExpired, AssertionError):
                continue

    def _is_gone(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def send(self, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
        """The reply to a chat or completion request; AssertionError for another status."""
        path = "chat/completions" if "messages" in body else "completions"
        response = self.http.post(f"/v1/{path}", json=body)
        assert response.status_code == status, response.text
        return response.json()

    # -- metrics -----------------------------------------------------------------------------------------------

    def metrics(self, prefix: str = "vllm") -> dict[str, float]:
        """Samples of ``/metrics`` summed over engines: name, with ``{kind}`` where there is one -> value."""
        totals: dict[str, float] = {}
        for line in self.http.get("/metrics").text.splitlines():
            match = _SAMPLE.match(line)
            if match is None or not match[1].startswith(prefix):
                continue
            kind = re.search(r'kind="(\w+)"', match[2] or "")
            name = match[1] + (f"{{{kind[1]}}}" if kind else "")
            totals[name] = totals.get(name, 0) + float(match[3])
        return totals

    def is_idle(self) -> bool:
        """No request runs or waits and no KV block is in use."""
        found = self.metrics("vllm:")
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return not any(found.get(f"vllm:{name}") for name in names)  # absent until the first step

    def wait_idle(self, seconds: float = 120) -> None:
        poll(self.is_idle, seconds, "no request and no KV block left")


# -- requests that repeat golden cases ---------------------------------------------------------------------------------


def load(name: str) -> cases.Case:
    """A golden case that the server's checkpoint repeats."""
    case = cases.load(name)
    committed = {token for step in case.steps for token in step["ids"]}
    assert case.build_args == BUILD_ARGS or (case.build_args == {"seed": 0} and BUILD_ARGS["eot_like"] not in committed)
    return case


def image_part(data: bytes) -> dict[str, Any]:
    """An image of a chat message, as a data URL."""
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def chat_of(name: str, **changes: Any) -> dict[str, Any]:
    """Body of a chat request that repeats a golden case; ``xargs`` among the changes adds options."""
    case = load(name)
    parts = [image_part((cases.IMAGE_FOLDER / record["file"]).read_bytes()) for record in case.image_records]
    parts.append({"type": "text", "text": cases.question(case)})
    messages = [{"role": "user", "content": parts}]
    xargs = cases.extra_args(case) | changes.pop("xargs", {})
    length = case.settings["gen_length"]
    return {"model": MODEL, "messages": messages, "max_tokens": length, "vllm_xargs": xargs} | changes


def completion_of(name: str, **changes: Any) -> dict[str, Any]:
    """Body of a completion request that repeats a golden case without images, by its token ids."""
    case = load(name)
    xargs = cases.extra_args(case) | changes.pop("xargs", {})
    length = case.settings["gen_length"]
    return {"model": MODEL, "prompt": case.prompt_ids, "max_tokens": length, "vllm_xargs": xargs} | changes


def text_of(reply: dict[str, Any], index: int = 0) -> str:
    """Text of one choice of either kind of reply."""
    choice = reply["choices"][index]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def openai_args(body: dict[str, Any]) -> dict[str, Any]:
    """The same request for the openai package, which takes vLLM's own fields as extra_body."""
    ours = {key: body[key] for key in ("vllm_xargs", "ignore_eos", "stop_token_ids") if key in body}
    return {key: value for key, value in body.items() if key not in ours} | {"extra_body": ours}
