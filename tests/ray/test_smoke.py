"""One replica of the demo model behind Ray Serve, and a batch on it: the only test with Ray that `make test` runs."""

import json
import os
import subprocess
import sys

from tests.ray.served import CHAT, ENGINE, MODEL, ROOT, serving, text_of

QUESTION = {
    "model": "demo",
    "messages": [{"role": "user", "content": "the 7"}],
    "max_tokens": 8,
    "temperature": 0,
    "vllm_xargs": {"diffusion_canvas_length": 8},
}


def test_a_replica_and_a_batch_say_the_same(cluster, tmp_path):
    with serving(tmp_path, "--replicas", "1") as served:
        status, headers, text = served.ask(CHAT, QUESTION)
        assert status == 200 and headers["x-vllm-dvlm"]
        answer = text_of(text, False)
        assert answer and text_of(served.ask(CHAT, QUESTION | {"stream": True})[2], True) == answer
        assert len(served.answered()) == 1
    row = {"custom_id": "a", "method": "POST", "url": CHAT, "body": QUESTION}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    command = [sys.executable, "-m", "vllm_dvlm.cli", "batch", "--replicas", "1", "--model", str(MODEL), *ENGINE]
    command += ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    written = json.loads((tmp_path / "out.jsonl").read_text())
    assert written["response"]["body"]["choices"][0]["message"]["content"].strip() == answer
