"""The programs in examples/, as a newcomer runs them: on the demo model, without a flag."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.engine.server import START_UP_S, STOP_S, poll
from vllm_dvlm.bench.questions import load_items

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = [path for path in sorted(EXAMPLES.iterdir()) if path.suffix in (".py", ".sh") and path.name != "demo.py"]


@pytest.fixture(scope="module")
def item(tmp_path_factory):
    """A question about a held-out picture, and the picture as a file."""
    (item,), _ = load_items(None, 1, 0)
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    item.open_images()[0].save(path)
    return item, path


def ran(name, *words):
    """What an example prints."""
    command = [sys.executable, EXAMPLES / name, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_UP_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_all_are_short():
    assert {path.name for path in SHORT} >= {"offline.py", "client.py", "serve.sh", "compare_pruners.py"}
    for path in SHORT:
        assert len(path.read_text().splitlines()) < 60, path


def test_offline(item):
    question, picture = item
    shown = ran("offline.py", EXAMPLES / "demo_model", picture, "--question", question.question, "--max-tokens", "8")
    answers = [line for line in shown.splitlines() if line.startswith(f"{picture}, ")]
    assert [line.endswith(f"{question.answers[0]!r}") for line in answers] == [True, True], shown
    figures = [line.split() for line in shown.splitlines() if "GFLOP" in line]
    (whole, pruned) = [(float(words[2]), int(words[4])) for words in figures]
    assert whole[1] == 0 < pruned[1] and pruned[0] < whole[0]


def test_compare_pruners():
    shown = ran("compare_pruners.py", "--num", "20", "--keep", "0.25")
    rows = {line[:16].strip(): line[16:].split() for line in shown.splitlines() if "%" in line}
    right = {name: float(words[0].rstrip("%")) for name, words in rows.items()}
    assert len(rows) == 6 and right["none"] >= 80, shown
    assert right["redvtp 0.25"] > right["random 0.25"] + 20
    assert float(rows["redvtp 0.25"][1]) < 0.8 * float(rows["none"][1])
    assert int(rows["none"][2]) == 0 < int(rows["redvtp 0.25"][2])


def test_serve_and_client(item, tmp_path):
    """The served default prunes; the client sees the canvas and the answer."""
    question, picture = item
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # "vllm" is that of the environment that the newcomer has activated.
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = (tmp_path / "log.txt").open("wb")
    command = ["bash", EXAMPLES / "serve.sh", EXAMPLES / "demo_model", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=env)
    url = f"http://127.0.0.1:{port}"

    def is_ready():
        assert server.poll() is None, (tmp_path / "log.txt").read_text(errors="replace")[-4000:]
        try:
            return httpx.get(f"{url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    try:
        poll(is_ready, START_UP_S, "the server is ready")
        shown = ran("client.py", picture, question.question, "--url", url, "--max-tokens", "8")
        assert f"answer    {question.answers[0]!r}" in shown and "KV blocks given back" in shown, shown
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
        report = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["kv_transfer_params"]["dvlm"]
        assert report["forward_tokens_cached"] > 0
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(STOP_S)
