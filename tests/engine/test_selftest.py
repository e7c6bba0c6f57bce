"""`vllm-dvlm selftest`: passes on this host, and says what is broken where something is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import selftest_goldens
from vllm_dvlm.tools.selftest import command, report
from vllm_dvlm.tools.selftest.engine_checks import goldens

ROOT = Path(__file__).parents[2]


def test_the_recorded_runs_are_those_of_the_tests():
    """Else: python -m tests.selftest_goldens."""
    assert (selftest_goldens.FOLDER / "goldens.json").read_text(encoding="utf-8") == selftest_goldens.text()
    sources = selftest_goldens.sources()
    assert {path.name for path in (selftest_goldens.FOLDER / "images").iterdir()} == set(sources)
    for name, source in sources.items():
        assert (selftest_goldens.FOLDER / "images" / name).read_bytes() == source.read_bytes()


def test_on_this_host(tmp_path):
    """As a user calls it: no variable of vLLM is set, nothing is asked for."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    run = [sys.executable, "-m", "vllm_dvlm.cli", "selftest", "--json", str(tmp_path / "report.json")]
    ran = subprocess.run(run, capture_output=True, text=True, env=inherited, cwd=tmp_path, timeout=600)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    found = json.loads((tmp_path / "report.json").read_text())
    statuses = {row["check"]: row["status"] for row in found["rows"]}
    planned = command.engines(found["gpus"], command.GPU_BACKENDS)
    assert list(statuses) == ["versions", "patches", *(name for engine in planned for name in engine.names)]
    not_here = [name for name, status in statuses.items() if status == report.NOT_HERE]
    assert not_here == ["LLaDA-V, float32: sync", "LLaDA-V, 2 ranks: tokens"]
    details = {row["check"]: row["detail"] for row in found["rows"]}
    num = sum(len(row["token_ids"]) for row in goldens("llada_v"))
    assert details["LLaDA-V, float32: tokens"] == f"5 recorded runs in one batch, {num} tokens equal"
    assert "of prompts alone" in details["LaViDa-LLaDA, float32: attention"]
    assert found["versions"]["torch"] and str(Path.home()) not in json.dumps(found)
    for name in statuses:
        assert name in ran.stdout
    assert f"{len(statuses) - 2} passed, 0 failed, 2 not here" in ran.stdout


def test_what_is_broken_is_found(tmp_path):
    """A backend that ignores `causal=False`, a wrong KV layout, a wrong factor, blocks that stay: each is named."""
    breaks = {
        "causal": ("attention", "tokens"),
        "layout": ("compaction",),
        "factor": ("scoring",),
        "release": ("release",),
    }
    (engine,) = (e for e in command.engines(0, ()) if e.label == "LLaDA-V, float32: ")
    job = {key: value for key, value in vars(engine).items() if key != "why_not"}
    job |= {"folder": str(command.checkpoint("llada_v", tmp_path)), "out": str(tmp_path / "rows.jsonl")}
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.engine.broken_selftest", *breaks, json.dumps(job)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = [report.Row(**json.loads(line)) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    failed = {row.check.removeprefix(engine.label) for row in rows if row.status == report.FAIL}
    assert failed == {check for checks in breaks.values() for check in checks}, rows
    assert all(row.remedy for row in rows if row.status == report.FAIL)


def test_an_engine_that_dies_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "checkpoint", lambda name, folder: tmp_path / "nothing")
    rows = command.engine_rows(command.Engine("x: ", "llada_v", ("tokens", "attention"), "float32"), tmp_path)
    assert [(row.check, row.status) for row in rows] == [("x: tokens", report.FAIL), ("x: attention", report.FAIL)]
    assert "Error" in rows[0].detail and rows[0].remedy


def test_report_names_nobody():
    detail, remedy = "File /srv/some.one/my project/engine.py: no", "look into ~/x/y or D:\\people\\me\\z"
    text = report.as_json([report.Row("a", report.FAIL, detail, remedy)], {"device": "an x86/64 machine"})
    assert "File engine.py: no" in text and "an x86/64 machine" in text
    assert not any(word in text for word in ("srv", "some.one", "people", "me\\"))


def test_only_refuses_what_is_no_check(capsys):
    from vllm_dvlm.cli import main

    assert main(["selftest", "--only", "nonsense"]) == 2
    assert "the checks are versions, patches, LLaDA-V" in capsys.readouterr().err


def test_backends_of_gpus():
    planned = command.engines(2, ("A", "B"))
    assert [engine.backend for engine in planned] == [*["TRITON_ATTN"] * 3, "A", "B", "TRITON_ATTN"]
    assert planned[-1].ranks == 2 and not planned[-1].why_not


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    """Every check of a GPU host: as many passes as the self-test has rows, but for what it says is not here."""
    file = tmp_path / "report.json"
    ran = subprocess.run([sys.executable, "-m", "vllm_dvlm.cli", "selftest", "--json", str(file)], timeout=1800)
    found = json.loads(file.read_text())
    assert ran.returncode == 0 and found["gpus"] > 0
    assert {row["check"] for row in found["rows"] if row["status"] == report.PASS} >= {"LLaDA-V, float32: sync"}
