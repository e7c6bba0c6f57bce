"""`vllm-dvlm bench abuse` in small: one real server and one real engine, every kind of abuse."""

import pytest

from vllm_dvlm.bench import child
from vllm_dvlm.bench.abuse import aborts, command, engine_parts, fuzz, kills, served, soak
from vllm_dvlm.bench.abuse.job import PARTS, Counts, Job
from vllm_dvlm.bench.result import Result

COUNTS = Counts(
    fuzzed=24, aborts=6, batches=4, distinct=8, operations=100, clients=4, requests=40, warm_up=40, window=20
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("abuse")
    checkpoint = command.write_checkpoint(folder / "checkpoint", 0)
    return Job(folder=checkpoint, workdir=folder, seed=0, threads=1, counts=COUNTS, parts=PARTS)


def missed(result):
    return [row for row in result.rows if row["met"] == "NO"]


def test_server(job):
    """Fuzzed requests, clients that leave, many requests; then the engine core is killed while clients wait."""
    result = Result()
    with served.start(job, "server") as server:
        fuzz.measure(job, server, result)
        aborts.measure(job, server, result)
        soak.measure(job, server, result)
        kills.strike(job, server, kills.CORE, "core", result)
    assert missed(result) == []
    figures = result.figures
    assert figures["R1_requests"] == 24 and figures["R6_failed"] == 0
    assert figures["R1_status_200"] >= 6 and figures["R1_status_4xx"] >= 6, "the draw is one-sided"
    assert figures["R2_http_waiting"] and figures["R2_http_in_stream"]
    assert figures["R2_http_good"] >= aborts.LEAST_GOOD, "compared, however slow this machine is"
    assert figures["R5_core_seen"] and figures["R5_core_exit_code"] == 1


def test_engine(job):
    """Aborts at named moments, mixed batches against alone, random operations; in a process of its own."""
    result = child.run(engine_parts.__name__, "measure_one_group", job)
    assert missed(result) == []
    figures = result.figures
    assert figures["R2_api_aborts"] >= 6 and figures["R2_api_good"] >= 4
    assert figures["R3_runs"] >= 8 and figures["R3_distinct_tokens"] > 8
    assert figures["R4_one_group_blocks_pruned"] > 0 and figures["R4_one_group_preempted"] > 0
