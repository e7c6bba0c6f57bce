"""`vllm-dvlm bench lavida`: every figure once on the smallest sizes, then the report of it."""

import dataclasses
import json

import pytest

from vllm_dvlm.bench import child, lavida
from vllm_dvlm.cli import build_parser, main

OPTIONS = ["--quick", "--models", "tiny", "--repeats", "1", "--threads", "1"]


def parse(*options):
    return build_parser().parse_args(["bench", "lavida", *OPTIONS, *options])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results of all parts by module and function; each ran in a process of its own, with one engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        for name in ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND"):
            patch.setenv(name, "1")  # put back after the parts have set them
        parts = lavida.parts_of(parse("--keep-ratios", "0.5"), str(tmp_path_factory.mktemp("bench")))
        return {part[:2]: child.run(*part[:2], shortened(part[2])) for part in parts}


def shortened(job):
    """Of requests with pruning: a quarter of the steps, and only several at once."""
    if not hasattr(job, "concurrency"):
        return job
    return dataclasses.replace(job, canvas=16, num_steps=4, concurrency=(4,))


def test_figures_are_sane(measured):
    """How fast anything is depends on the machine's other work; that it was measured, and of what, does not."""
    result = lavida.merged(list(measured.values()))
    figures = result.figures
    assert {row["figure"] for row in result.rows} == {"L2", "L3", "L4", "L6"}
    assert figures["L2_tokens_equal_tiny"] and figures["L2_distinct_tokens_tiny"] > 4
    ratios = [row for row in result.rows if "against" in row]
    assert all(0 < row["low"] <= row["value"] <= row["high"] for row in ratios)
    # Three of L2, one of L3, one of L4, three of L6.
    assert len(ratios) == 8 and all(row["cpu_time"] > 0 for row in ratios)
    assert figures["L2_overhead_ms_tiny"] > 0
    # 406 visual tokens of 466, and 16 positions of canvas.
    assert result.description["prompt"] - result.description["visual_tokens"] == 60
    assert figures["L3_flop_ideal_keep50"] > 482 / (482 - 203)
    for key in ("L3_prune_cost_percent_keep50", "L4_prune_cost_percent_4_at_once_keep50"):
        assert 0 < figures[key] < 100
    # Every request that could get in has got in.
    assert figures["L4_in_flight_keep50"] == figures["L4_in_flight_possible_keep50"] > figures["L4_in_flight_keep100"]
    assert 0 < figures["L4_in_flight_share_of_token_ratio_keep50"] <= 1


def test_report(measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(child, "run", lambda *part: measured[part[:2]])
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}
    lavida.run(parse(*(f"--{kind}={path}" for kind, path in files.items())))
    figures = json.loads(files["json"].read_text())
    assert {"machine", "threads", "dtype", "seed", "commit", "date", "load_average_before"} <= set(figures)
    assert (figures["mode"], figures["threads"], figures["repeats"]) == ("quick", 1, 1)
    assert files["png"].read_bytes().startswith(b"\x89PNG") and files["csv"].stat().st_size > 0
    assert "L6_batch8_vs_sequential_tiny" in capsys.readouterr().out


def test_parts_follow_the_figures_asked_for():
    def parts(*options):
        return [(function, job.figures) for _, function, job in lavida.parts_of(parse(*options), "nowhere")]

    assert parts("--only", "L3") == [("measure_pruned", ("L3",))]
    assert parts("--only", "L4") == [("measure_pruned", ("L4",)), ("measure_pool", ("L4",))]
    assert parts("--only", "L6") == [("measure_model", ("L6",))]
    assert parts("--only", "L2", "--models", "mid", "8b") == [("measure_model", ("L2",))] * 2


@pytest.mark.parametrize(
    ("options", "text"),
    [(["--keep-ratios", "1"], "keep-ratios"), (["--repeats", "0"], "--repeats"), (["--threads", "0"], "--threads")],
)
def test_wrong_arguments(options, text, capsys):
    assert main(["bench", "lavida", *options]) == 2
    assert text in capsys.readouterr().err
