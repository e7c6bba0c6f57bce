"""`bench scale`: the simulation against the real router with sleeping engines, and a short run with real ones."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dvlm.bench import scale_check
from vllm_dvlm.bench.question_job import model_of
from vllm_dvlm.bench.scale_run import Client
from vllm_dvlm.bench.scale_simulation import Service

ROOT = Path(__file__).parents[2]
SLOTS, LIMIT, AT_ONCE = 8, 64, 16
# As a demo engine's: most requests alike, some longer.
SERVICE = Service(tuple((0.2 + 0.01 * i, 0.4 + 0.02 * i) for i in range(20)) + ((0.9, 1.5),) * 2)


@pytest.fixture(scope="module")
def client(cluster):
    return Client(model_of(None), 16, 8, 1, (64, 64), (), 0)


@pytest.fixture(scope="module")
def router(client):
    """The real one's times; bounds that any machine keeps."""
    found = scale_check.measure_router(client, LIMIT)
    assert 0 < found.empty < found.alone < 1 and found.many_per_s > 10
    return found


@pytest.mark.parametrize("replicas", [1, 2, 8])
def test_the_simulation_against_the_real_router(replicas, client, router):
    row = scale_check.check(client, SERVICE, router, replicas, SLOTS, LIMIT, AT_ONCE)
    assert abs(row["off"]) < 0.05 and abs(row["p95_off"]) < 0.15, row


def test_a_short_run_with_real_engines(cluster, tmp_path):
    options = (
        "--replicas 2 --num 16 --pairs 1 --settings refresh32_redvtp_25 --simulate 4 --no-check --goodput e2el:60000"
    )
    command = [sys.executable, "-m", "vllm_dvlm.cli", "bench", "scale", *options.split()]
    files = {name: tmp_path / f"scale.{name}" for name in ("csv", "json", "png")}
    command += [word for name, path in files.items() for word in (f"--{name}", str(path))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "load average" in ran.stderr and "The simulation assumes:" in ran.stdout
    with files["csv"].open() as file:
        rows = [row for row in csv.DictReader(file)]
    named = [(row["kind"], row["replicas"], row["replica"]) for row in rows]
    several = [("served", "2", name) for name in ("all", "0", "1")]
    assert named == [("engine", "1", "all"), ("served", "1", "all"), *several, ("simulated", "4", "all")]
    for row in rows:
        assert float(row["requests/s"]) > 0 and float(row["kv_blocks/s"]) > 0, row
        assert float(row["tokens/s"]) == pytest.approx(16 * float(row["requests/s"]), rel=0.01)
        assert 0 < float(row["p50_ms"]) <= float(row["p99_ms"])
        if row["replica"] == "all":  # those of a replica are as coarse as vLLM's histograms
            assert 0 < float(row["first_p50_ms"]) <= float(row["p50_ms"])
    assert float(rows[0]["good/s"]) == pytest.approx(float(rows[0]["requests/s"]))
    both = [float(row["requests/s"]) for row in rows[2:5]]
    assert both[1] + both[2] == pytest.approx(both[0])
    figures = json.loads(files["json"].read_text())
    assert "S2_refresh32_redvtp_25_tp1_router_overhead" in figures
    assert figures["S5_refresh32_redvtp_25_tp1_1_replicas_throughput_off"] > -1
    assert files["png"].stat().st_size > 10_000
