"""`vllm-dvlm bench engine` with a real engine, at its smallest settings."""

import os

import pytest

from vllm_dvlm.bench import child, engine, engine_env, engine_job
from vllm_dvlm.bench.engine_job import Job


@pytest.fixture
def bench_environment(monkeypatch):
    """What `engine_env.prepare` sets is taken back after the test."""
    for name in (*engine_env.PROCESS_ENV, "OMP_NUM_THREADS", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("VLLM_LOGGING_LEVEL")
    engine_env.prepare(1)


def test_every_figure_of_the_tiny_model(bench_environment, tmp_path):
    job = Job(
        workdir=str(tmp_path),
        threads=1,
        seed=0,
        repeats=1,
        num_requests=16,
        official_steps=1,
        canvas_length=8,
        mid_sizes=engine.MID_QUICK,
        sizes_8b=engine.SIZES_8B_QUICK,
        logit_std=3.6,
        threshold=1.0,
        goldens=str(engine_job.default_goldens()),
        quick=True,
    )
    result = child.run("vllm_dvlm.bench.engine_measure", "measure_tiny", job)
    figures = result.figures
    assert figures["N1_token_equality"] == 1, figures["N1_unequal"]
    # Eleven text cases alone, and one batch of eight or more per checkpoint.
    assert figures["N1_num_runs"] >= 11 + 8
    assert figures["N3_tokens_equal_lean_loop"]
    assert figures["N10_kv_blocks_lost"] == 0
    assert figures["N10_logits_bytes_max"] > 0
    assert result.description["threads"] == 1
    assert result.peak_rss_bytes >= figures["N10_peak_rss_bytes"] > 2**26
    # The step is more than its overhead. How fast the engine is depends on the machine's other work.
    for row in result.growth:
        assert 0 < row["overhead_ms"] < row["step_ms"]
    assert {row["figure"] for row in result.rows} == {"N1", "N2", "N3", "N4", "N10"}
    assert figures["N3_exact_batch1_vs_official_loop"] > 0
