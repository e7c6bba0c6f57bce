"""`vllm-dvlm bench latency|throughput|capacity|pruning`: every part once on the tiny sizes, then every report of it."""

import argparse
import json

import pytest

from vllm_dvlm.bench import capacity, latency, pruning_job, pruning_report, throughput
from vllm_dvlm.cli import build_parser, main

# Which of the measured parts a command reports.
COMMANDS = {
    "latency": (latency, slice(0, 2)),
    "throughput": (throughput, slice(2, 3)),
    "capacity": (capacity, slice(3, 4)),
    "pruning": (pruning_report, slice(0, 4)),
}
OPTIONS = ["--quick", "--repeats", "1", "--canvas-length", "8", "--steps", "4", "--threads", "1", "--pool-prompts", "4"]
RATIOS = ["--keep-ratios", "0.25"]


@pytest.fixture(scope="module")
def measured():
    """Job and results of all parts; each ran in a process of its own, with one engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        for name in ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND"):
            patch.setenv(name, "1")  # put back after the parts have set them
        return pruning_job.measure(parse("pruning", *OPTIONS, *RATIOS), pruning_report.PARTS)


def parse(command: str, *options: str) -> argparse.Namespace:
    return build_parser().parse_args(["bench", command, *options])


@pytest.mark.parametrize("command", COMMANDS)
def test_report(command, measured, monkeypatch, tmp_path, capsys):
    job, results = measured
    module, parts = COMMANDS[command]
    monkeypatch.setattr(module, "measure", lambda arguments, names: (job, results[parts]))
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}
    module.run(parse(command, "--quick", *(f"--{kind}={path}" for kind, path in files.items())))
    figures = json.loads(files["json"].read_text())
    numbers = {"latency": "567", "throughput": "8", "capacity": "8", "pruning": "5678"}[command]
    assert {key[:2] for key in figures if key[0] == "N" and key[1].isdigit()} == {f"N{n}" for n in numbers}
    assert {"machine", "threads", "dtype", "seed", "commit", "date", "load_average_before"} <= set(figures)
    assert files["png"].read_bytes().startswith(b"\x89PNG") and files["csv"].stat().st_size > 0
    assert max(len(line.split()) for line in capsys.readouterr().out.splitlines()) > 4


def test_figures_are_sane(measured):
    _, results = measured
    _, figures, _ = pruning_job.merged(results)
    # How fast it is depends on the machine's other work; that it was measured does not.
    assert figures["N5_throughput_keep25_vs_unpruned"] > 0
    assert figures["N5_throughput_keep25_vs_unpruned_cpu_time"] > 0
    assert figures["N5_cache_and_pruning_keep25_vs_cache_alone"] > 0
    assert 0 < figures["N7_prune_cost_percent_of_first_step_keep25"] < 100
    assert figures["N8_in_flight_keep25_vs_unpruned"] > 1
    assert 0 < figures["N8_in_flight_share_of_token_ratio_keep25"] <= 1
    assert figures["N6_flops_saved_percent"] >= 65
    assert figures["N6_kv_cache_groups"] == 2
    assert figures["N6_first_step_kv_share_two_groups"] < 1
    assert figures["N8_requests_per_s_lowest_vs_unpruned"] > 0
    assert figures["N8_free_kv_blocks_1_requests_keep25"] > figures["N8_free_kv_blocks_1_requests_keep100"]


def test_pool_fills_up_to_what_is_possible(measured):
    """Every request that could get in has got in: nothing but the whole first step holds the next one back."""
    _, results = measured
    for row in results[3].rows:
        assert row["in_flight"] == row["possible"]


def test_most_in_flight():
    assert capacity.most_in_flight(100, 10, 10) == 10
    assert capacity.most_in_flight(100, 10, 3) == 31
    assert capacity.most_in_flight(9, 10, 3) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--keep-ratios", "0"], "keep-ratios"),
        (["--steps", "1"], "--steps"),
        (["--hidden", "100"], "--hidden"),
        (["--layers", "1"], "--layers"),
    ],
)
def test_wrong_arguments(options, text, capsys):
    assert main(["bench", "latency", *options]) == 2
    assert text in capsys.readouterr().err
