"""`vllm-dvlm batch` on the demo model: alone, and on two replicas that are killed while rows are with them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "demo_model"
ENGINE = ["--model", str(MODEL), "--kv-cache-memory-bytes", str(2**27), "--max-num-seqs", "8"]
NUM, NUM_BAD = 240, 3


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Input file: every fourth row in OpenAI's format, three bad ones among them. Ids and right answers."""
    pytest.importorskip("sklearn")
    from vllm_dvlm.synthetic.digit_questions import held_out

    folder, lines, right = tmp_path_factory.mktemp("questions"), [], {}
    for i, asked in enumerate(held_out(NUM, seed=7)):
        Image.fromarray(asked.image).save(folder / f"{i}.png")
        row = {"id": f"q{i}", "image": f"{i}.png", "question": asked.question, "max_tokens": 8}
        lines.append(json.dumps(row | {"prune_method": "redvtp", "prune_keep_ratio": 0.25}))
        right[f"q{i}"] = asked.answer
    lines[50:50] = ["oops", json.dumps({"id": "no picture", "image": "none.png", "question": "x"})]
    lines.append(json.dumps({"id": "no such ratio", "question": "x", "prune_method": "redvtp", "prune_keep_ratio": 7}))
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "in.jsonl", right


def start(source, out, *options):
    command = [sys.executable, "-m", "vllm_dvlm.cli", "batch", "--input", str(source), "--output", str(out)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    log = out.with_suffix(".log").open("ab")
    return subprocess.Popen([*command, *ENGINE, *options], stdout=log, stderr=log, cwd=ROOT, env=environment)


def wait_for_lines(process, out, num, limit_s=300):
    deadline = time.monotonic() + limit_s
    while not out.exists() or out.read_bytes().count(b"\n") < num:
        assert process.poll() is None and time.monotonic() < deadline, out.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.05)


def texts(out):
    """Answers by id; None for an error line. Every line is whole, no id is there twice."""
    found = {}
    for line in out.read_text().splitlines():
        row = json.loads(line)
        assert row["custom_id"] not in found
        body = row["response"]["body"]
        found[row["custom_id"]] = body and body["choices"][0]["message"]["content"].strip()
        if body:
            report = body["kv_transfer_params"]["dvlm"]
            assert report["kv_blocks_after"] < report["kv_blocks_before"]
    return found


@pytest.fixture(scope="module")
def alone(questions, tmp_path_factory):
    """The answers of one engine, without Ray; it was interrupted and a line torn."""
    source, _ = questions
    out = tmp_path_factory.mktemp("alone") / "out.jsonl"
    process = start(source, out, "--keep-order", "--in-flight", "1")
    wait_for_lines(process, out, 10)  # a fast host would answer the rest while it hears of it
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 1
    log = out.with_suffix(".log").read_text()
    assert "stopped; the same command goes on where it was" in log, log[-3000:]
    before = out.read_text()
    assert before.endswith("\n") and before.count("\n") < NUM
    out.write_text(before + '{"id": "vllm-1", "custom_')
    assert start(source, out, "--keep-order").wait(300) == 0
    assert out.read_text().startswith(before)
    return out


def test_one_engine_answers_in_order_and_goes_on_after_an_interrupt(alone, questions):
    _, right = questions
    found = texts(alone)
    names = [f"q{i}" for i in range(50)] + ["line-51", "no picture"] + [f"q{i}" for i in range(50, NUM)]
    assert list(found) == [*names, "no such ratio"]
    assert [name for name, text in found.items() if text is None] == ["line-51", "no picture", "no such ratio"]
    assert sum(found[name] == answer for name, answer in right.items()) > 0.9 * NUM
    # A third time there is nothing to do.
    before = alone.read_bytes()
    assert start(questions[0], alone).wait(120) == 0
    assert alone.read_bytes() == before


def engine_processes():
    """Process ids of the actors with an engine."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "ray::EngineActor" in line]


def test_two_replicas_one_of_them_killed_twice(cluster, questions, alone, tmp_path):
    source, _ = questions
    out = tmp_path / "out.jsonl"
    process = start(source, out, "--replicas", "2", "--in-flight", "8")
    wait_for_lines(process, out, 40)
    for _ in range(2):
        before = out.read_bytes().count(b"\n")
        os.kill(engine_processes()[0], signal.SIGKILL)
        wait_for_lines(process, out, min(before + 30, NUM))
    assert process.wait(300) == 0, out.with_suffix(".log").read_text()[-3000:]
    assert texts(out) == texts(alone)
    assert "engines lost          2" in out.with_suffix(".log").read_text()


def test_a_cluster_that_is_too_small(cluster, questions, tmp_path):
    process = start(questions[0], tmp_path / "out.jsonl", "--replicas", "9")
    assert process.wait(120) == 2
    log = (tmp_path / "out.log").read_text()
    assert "9 replicas need 9 CPUs and the Ray cluster has 2" in log
