"""`vllm-dvlm bench engine` without an engine: arguments, ratios, batches of goldens, figures and files."""

import csv
import json
import subprocess
import sys

import pytest

from vllm_dvlm import cli
from vllm_dvlm.bench import child, common, engine, engine_job
from vllm_dvlm.bench.result import Result


def parse(*options):
    return cli.build_parser().parse_args(["bench", "engine", *options])


def test_parser_imports_nothing_heavy():
    code = "import sys; from vllm_dvlm import cli; cli.build_parser(); print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("options", [["--threads", "0"], ["--repeats", "0"], ["--goldens", "nowhere"]])
def test_impossible_arguments_end_with_code_2(options, capsys, monkeypatch):
    monkeypatch.setattr(engine.engine_env, "prepare", lambda num_threads: None)
    assert cli.main(["bench", "engine", *options]) == 2
    assert options[0] in capsys.readouterr().err


def test_goldens_are_found_in_the_repository_only(monkeypatch, tmp_path):
    assert engine_job.default_goldens().name == "llada_v"
    engine_job.check_goldens(engine_job.default_goldens())
    monkeypatch.chdir(tmp_path)
    assert engine_job.default_goldens() is None


def test_ratio_is_the_median_of_paired_repeats():
    result = Result()
    result.ratio(
        "N3_x", "tiny", ours=[(1.0, 1.0), (2.0, 1.0), (4.0, 1.0)], theirs=[(2.0, 3.0)] * 3, against="loop", target=1.1
    )
    assert result.figures == {"N3_x": 1.0, "N3_x_cpu_time": 3.0}
    row = result.rows[0]
    assert (row["figure"], row["low"], row["high"], row["met"]) == ("N3", 0.5, 2.0, "NO")
    assert (row["engine_ms"], row["other_ms"]) == (2000.0, 2000.0)


def test_value_without_target_is_neither_met_nor_missed():
    result = Result()
    result.value("N10_peak", "tiny", 5)
    result.value("N2_overhead", "tiny", 4.0, "<= 5 ms", True)
    assert [row["met"] for row in result.rows] == ["", "yes"]


def fake_result(name, growth):
    result = Result(peak_rss_bytes=2**30, description={"threads": 1, f"model_{name}": "small"})
    result.ratio(f"N3_{name}", name, [(1.0, 1.0)], [(2.0, 2.0)], "loop", 1.1)
    result.value(f"N10_{name}", name, 1)
    result.growth = growth
    return result


def test_command_joins_all_models(monkeypatch, tmp_path, capsys):
    growth = [
        {"grows": what, what: value, "step_ms": 1.5 * value}
        for what in ("canvas", "prompt", "batch")
        for value in (1, 2, 4)
    ]
    jobs = {}

    def run(module, function, job):
        name = function.removeprefix("measure_")
        jobs[name] = job
        return fake_result(name, growth if name == "tiny" else [])

    monkeypatch.setattr(child, "run", run)
    monkeypatch.setattr(engine.engine_env, "prepare", lambda num_threads: None)
    monkeypatch.chdir(tmp_path)
    files = [f"--{kind}={tmp_path}/out.{kind}" for kind in ("json", "csv", "png")]
    assert cli.main(["bench", "engine", "--quick", "--threads", "1", *files]) == 0
    printed = capsys.readouterr().out
    assert "ms_per" not in printed and "N3_mid: 2" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["N3_tiny"] == written["N3_mid"] == written["N3_8b"] == 2.0
    assert written["N1_token_equality"].startswith("not run")
    assert written["peak_rss_gib"] == 1.0 and written["model_mid"] == "small"
    with (tmp_path / "out.csv").open() as file:
        figures = [row["figure"] for row in csv.DictReader(file)]
    assert figures == [*["N3"] * 3, *["N10"] * 3, *["growth"] * 9]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert jobs["tiny"].quick and jobs["tiny"].goldens is None and jobs["tiny"].repeats == 2


def test_only_one_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(child, "run", lambda module, function, job: fake_result(function.removeprefix("measure_"), []))
    monkeypatch.setattr(engine.engine_env, "prepare", lambda num_threads: None)
    assert cli.main(["bench", "engine", "--only", "mid"]) == 0
    assert "N3_tiny" not in capsys.readouterr().out


def test_resident_memory_sees_small_growth():
    """In a process of its own: what earlier tests used goes back to the system at times of its own."""
    code = """if True:
        from vllm_dvlm.bench.common import rss_bytes
        rss_bytes()
        before = rss_bytes()
        held = bytearray(b"x" * 2**20)
        print(rss_bytes() - before)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**20 <= int(done.stdout) < 2**23


def test_threads_that_cannot_be_set_are_an_error(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with common.fixed_threads(torch.get_num_threads()):
        pass
    with pytest.raises(RuntimeError, match="OMP_NUM_THREADS"), common.fixed_threads(torch.get_num_threads() + 1):
        pass
