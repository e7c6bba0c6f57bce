"""`bench scale` without engines: the simulation against formulas of queues, pages and results read, bad arguments."""

import argparse
import json
import math
import statistics
import sys

import pytest

from vllm_dvlm.bench import scale, scale_numbers, scale_plan, scale_run, scale_simulation
from vllm_dvlm.bench.scale_numbers import Counts, bucket_percentile, percentile, read_page, read_result, since
from vllm_dvlm.bench.scale_run import Client, Engine
from vllm_dvlm.bench.scale_simulation import Load, Router, Service, System, play, router_of
from vllm_dvlm.cluster.sleeper import Sleeper

pytest.importorskip("simpy")
ENDLESS = 10**9  # requests that a replica may hold


def exponential(mean, num=4001):
    """Quantiles of an exponential distribution as measured times."""
    times = [-math.log(1 - (i + 0.5) / num) for i in range(num)]
    scale = mean / statistics.mean(times)
    return Service(tuple((0.0, time * scale) for time in times))


def waits(system, load, seed=1):
    """Mean wait for a slot, without the first tenth of the requests."""
    found = play(system, load, seed).waits
    return statistics.mean(found[len(found) // 10 :])


# -- the simulation against theory ---------------------------------------------------------------------------------


def erlang_c_wait(servers, rate, mean):
    """Mean wait in M/M/c."""
    load = rate * mean
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    chance = last / (sum(load**k / math.factorial(k) for k in range(servers)) + last)
    return chance * mean / (servers - load)


@pytest.mark.parametrize(("slots", "rate"), [(1, 0.6), (4, 3.0), (8, 6.4)])
def test_exponential_times_wait_as_in_m_m_c(slots, rate):
    found = waits(System(1, slots, exponential(1.0), limit=ENDLESS), Load(60_000, rate=rate))
    assert found == pytest.approx(erlang_c_wait(slots, rate, 1.0), rel=0.1)


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_equal_times_wait_as_in_m_d_1(rate):
    found = waits(System(1, 1, Service(((0.0, 1.0),)), limit=ENDLESS), Load(60_000, rate=rate))
    assert found == pytest.approx(rate / (2 * (1 - rate)), rel=0.07)


def test_the_router_is_a_queue_of_its_own():
    """Two passes of fixed time through one server; the engine costs nothing and has room for all."""
    system = System(1, ENDLESS, Service(((0.0, 0.0),)), Router(station=1.0, delay=0.25), ENDLESS)
    alone = play(system, Load(1, 1))
    assert alone.latencies == [pytest.approx(1.25)] and alone.to_first == [pytest.approx(1.25)]
    assert play(system, Load(400, 16)).requests_per_s == pytest.approx(1.0, rel=0.02)


def test_a_closed_loop_with_equal_times_is_exact():
    played = play(System(2, 2, Service(((1.0, 4.0),))), Load(40, 4))
    assert played.requests_per_s == pytest.approx(1.0) and set(played.counts) == {20}
    assert played.latencies == pytest.approx([4.0] * 40) and played.to_first == pytest.approx([1.0] * 40)
    # Little's law, with a line before the slots.
    busy = play(System(2, 2, exponential(1.0)), Load(4000, 12))
    assert busy.requests_per_s * statistics.mean(busy.latencies) == pytest.approx(12, rel=0.01)


def test_two_choices_leave_shorter_lines_than_one():
    """With one replica drawn at random each would be an M/M/1 of its own."""
    found = waits(System(16, 1, exponential(1.0), limit=ENDLESS), Load(40_000, rate=16 * 0.9))
    assert 0.5 < found < erlang_c_wait(1, 0.9, 1.0) / 3  # 9.0 / 3; the mean field of two choices is 1.6


def test_replicas_hold_so_many_and_no_more():
    """Others wait in the router, and none is forgotten."""
    played = play(System(2, 1, Service(((1.0, 1.0),)), limit=1), Load(30, 10))
    assert len(played.end) == 30 and max(played.waits) == 0 and played.requests_per_s == pytest.approx(2.0)


def test_replicas_take_requests_once_they_are_up():
    played = play(System(3, 1, Service(((1.0, 1.0),)), start_up=(5.0,)), Load(6, 3))
    assert played.ready == 5.0 and min(played.end) == 6.0 and len(played.end) == 6


def test_the_same_seed_plays_the_same():
    system = System(4, 2, exponential(1.0), Router(0.01, 0.02))
    assert play(system, Load(200, 16), 3) == play(system, Load(200, 16), 3) != play(system, Load(200, 16), 4)


def test_a_router_from_its_measurements():
    assert router_of(alone=0.02, most_per_s=100, empty=0.003) == Router(0.01, pytest.approx(0.007))
    assert router_of(alone=0.005, most_per_s=100, empty=0).delay == 0
    with pytest.raises(ValueError, match="positive"):
        router_of(0.02, 0, 0)


def test_impossible_systems_and_a_missing_simpy(monkeypatch):
    with pytest.raises(ValueError, match="at least one replica"):
        System(0, 1, exponential(1.0))
    with pytest.raises(ValueError, match="either clients or a rate"):
        Load(5, clients=2, rate=1.0)
    with pytest.raises(ValueError, match="at least one pair"):
        Service(())
    with pytest.raises(ValueError, match="first <= whole"):
        Service(((2.0, 1.0),))
    monkeypatch.setitem(sys.modules, "simpy", None)
    with pytest.raises(ValueError, match=r"pip install 'vllm-dvlm\[ray\]'"):
        scale_simulation.simpy_module()


# -- pages of metrics, results of the client -----------------------------------------------------------------------

PAGE = """# HELP vllm:request_success_total Requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m",replica="b"} 2.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m",replica="b"} 8.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m",replica="a"} 30.0
vllm_dvlm:committed_tokens_total{engine="0",replica="a"} 240.0
vllm_dvlm:committed_tokens_total{engine="0",replica="b"} 1e2
vllm_dvlm:committed_tokens_created{engine="0",replica="b"} 1.7e9
vllm_dvlm:kv_blocks_freed_total{engine="0",replica="a"} 60.0
vllm:e2e_request_latency_seconds_bucket{le="0.5",replica="a"} 10.0
vllm:e2e_request_latency_seconds_bucket{le="1.0",replica="a"} 30.0
vllm:e2e_request_latency_seconds_bucket{le="+Inf",replica="a"} 30.0
"""


def test_a_page_is_read_by_replica():
    found = read_page(PAGE)
    assert found["b"] == Counts(requests=10, tokens=100)
    assert found["a"] == Counts(30, 240, 60, {0.5: 10, 1.0: 30, math.inf: 30})
    assert read_page(PAGE.replace(',replica="a"', "").replace(',replica="b"', ""))[scale_numbers.ALONE].requests == 40


def test_what_replicas_did_in_between():
    before, now = read_page(PAGE), read_page(PAGE.replace("} 30.0", "} 50.0"))
    assert since(now, before)["a"] == Counts(20, 0, 0, {0.5: 0, 1.0: 20, math.inf: 20})
    assert since(now, {})["b"] == now["b"]
    with pytest.raises(ValueError, match="replica a was lost"):
        since({"b": now["b"]}, before)


def test_percentiles():
    assert [percentile([4, 1, 3, 2], p) for p in (0, 50, 95, 100)] == [1, 2.5, pytest.approx(3.85), 4]
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    buckets = {0.5: 10, 1.0: 30, math.inf: 40}
    assert bucket_percentile(buckets, 25) == 0.5
    assert bucket_percentile(buckets, 50) == pytest.approx(0.75)
    assert bucket_percentile(buckets, 99) == 1.0  # beyond the last bound nothing is known
    assert bucket_percentile({1.0: 0, math.inf: 0}, 50) is None and bucket_percentile({}, 50) is None


RESULT = {"completed": 2, "request_throughput": 20.0, "request_goodput": 5.0, "ttfts": [0.1, 0.2]}
RESULT |= {"latencies": [0.2, 0.4], "errors": ["", ""]}


def test_rows_of_a_load():
    load = read_result(RESULT, 2)
    total = scale_numbers.total_row(load, read_page(PAGE), images=2)
    assert total["requests/s"] == 20 and total["images/s"] == 40 and total["good/s"] == 5
    assert total["tokens/s"] == pytest.approx(20 * 340 / 40) and total["kv_blocks/s"] == pytest.approx(20 * 60 / 40)
    assert total["p50_ms"] == pytest.approx(300) and total["first_p95_ms"] == pytest.approx(195)
    first, second = scale_numbers.replica_rows(load, read_page(PAGE), images=2)
    assert {first["requests/s"], second["requests/s"]} == {15, 5}
    for column in ("requests/s", "images/s", "tokens/s", "kv_blocks/s"):
        assert first[column] + second[column] == pytest.approx(total[column])


def test_a_result_with_failures_says_why():
    with pytest.raises(RuntimeError, match="2 of 3 requests were answered: Refused"):
        read_result(RESULT | {"errors": ["", "Traceback\nRefused\n"]}, 3)
    with pytest.raises(ValueError, match="counts no requests"):
        scale_numbers.total_row(read_result(RESULT, 2), {}, 1)


def test_repeated_loads_are_one():
    load = read_result(RESULT, 2)
    both = scale_numbers.joined([load, read_result(RESULT | {"request_throughput": 30.0}, 2)])
    assert both.requests_per_s == 25 and both.good_per_s == 5 and len(both.pairs) == 4


# -- arguments -----------------------------------------------------------------------------------------------------


def plan(*words, gpus=0, cores=2):
    parser = argparse.ArgumentParser()
    scale.add_arguments(parser)
    arguments, arguments.rest = parser.parse_known_args(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_plan, "num_gpus", lambda: gpus)
        patch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
        patch.delenv("RAY_ADDRESS", raising=False)
        return scale_plan.plan_of(arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--replicas", "0"], "--replicas '0': every number must be at least 1"),
        (["--replicas", "one"], "write numbers with commas"),
        (["--simulate", "8;16"], "--simulate '8;16': write numbers"),
        (["--replicas", "3"], "needs 3 cores and this machine has 2: measure fewer and add --simulate 3"),
        (["--tp", "3"], "--tp 3 needs 3 cores"),
        (["--model", "/no/such"], "name a folder or hub name with --model"),
        (["--goodput", "tpot:5"], "write e2el:MS"),
        (["--goodput", "e2el"], "write e2el:MS"),
        (["--image", "168"], "write HEIGHTxWIDTH"),
        (["--num", "0", "--pairs", "0"], "--num, --pairs must be at least 1"),
        (["--keep-ratios", "1"], "unpruned is measured anyway"),
        (["--refresh", "1"], "exact mode, which is measured anyway"),
        (["--block-length", "5"], "must divide --output-len 16"),
        (["--settings", "nonsense_*"], "fits no setting"),
        (["--simulate", "8", "--check", "0"], "--check '0'"),
    ],
)
def test_bad_arguments_name_the_remedy(words, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        plan(*words)


def test_gpus_are_counted_and_heads_divided():
    with pytest.raises(ValueError, match="needs 4 GPUs and this machine has 2"):
        plan("--replicas", "2", "--tp", "2", gpus=2)
    with pytest.raises(ValueError, match="vision tower of this checkpoint has 3 heads, which 2 ranks cannot share"):
        plan("--replicas", "1", "--tp", "2")
    assert plan(gpus=4).replicas == (1, 4) and plan(cores=3).replicas == (1, 3)


def test_what_is_measured_by_default():
    found = plan("--replicas", "2", "--simulate", "8,64,16", "--enforce-eager")
    assert found.replicas == (1, 2) and found.simulate == (8, 16, 64) and found.check == (1, 2, 8)
    names = ["unpruned", "redvtp_50", "redvtp_25"]
    assert [s.name for s in found.settings] == [*names, *(f"refresh32_{name}" for name in names)]
    assert found.num_runs == 6 * (2 * 2 + 1 + 1)
    assert found.request_options(found.settings[2])["prune_keep_ratio"] == 0.25
    command = found.engine.served(8000, 1, 1, 64)
    # One replica has no more cores than each of two.
    assert command[command.index("--max-replicas") + 1] == "2" and "--enforce-eager" in command
    assert "--max-replicas" not in found.engine.served(8000, 1, 2, 64)
    assert found.engine.plain(8000, 1)[2:4] == ["vllm_dvlm.bench.plain_server", "2"]
    assert plan("--kv-cache-memory-bytes", "5").engine.options == ("--kv-cache-memory-bytes", "5")


def test_the_clients_command(tmp_path):
    client = Client("m", 16, 8, 2, (10, 20), ("e2el:500",), 3)
    command = client.command(80, 5, 4, {"prune_method": "redvtp"}, tmp_path / "r.json")
    after = dict(zip(command, command[1:], strict=False))
    assert after["--goodput"] == "e2el:500" and after["--random-mm-bucket-config"] == "{(10, 20, 1): 1.0}"
    assert json.loads(after["--extra-body"])["vllm_xargs"] == {"prune_method": "redvtp"}
    other = Client("m", 16, 8, 2, (10, 20), (), 3, ("--dataset-name", "hf")).command(80, 5, 4, {}, tmp_path / "r.json")
    assert "--goodput" not in other and "random-mm" not in other and "hf" in other


def test_gpus_leave_cores_alone():
    assert "--max-replicas" not in Engine("m", 8, share=4, has_gpus=True).served(80, 1, 1, 64)


# -- the machine, sleeping engines ---------------------------------------------------------------------------------


def test_a_busy_machine_never_gets_quiet(monkeypatch):
    seen = iter([1.0, 0.4, 0.1])
    monkeypatch.setattr(scale_run, "cores_busy", lambda: next(seen))
    assert not scale_run.is_busy(3)
    monkeypatch.setattr(scale_run, "cores_busy", lambda: 1.0)
    assert scale_run.is_busy(3)


async def reply(sleeper, method="POST"):
    return [message async for messages in sleeper.respond({"method": method}, b"") for message in messages]


def test_a_sleeping_engine_answers_as_a_stream():
    import asyncio

    async def both():
        sleeper = Sleeper([(0.1, 0.5)], slots=1, seed=0)
        loop = asyncio.get_running_loop()
        begin = loop.time()
        answers = await asyncio.gather(reply(sleeper), reply(sleeper), reply(sleeper, "GET"))
        return loop.time() - begin, answers

    seconds, (first, second, health) = asyncio.run(both())
    assert seconds >= 1 and first == second and health[0]["status"] == 200
    events = b"".join(message.get("body", b"") for message in first).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(c["delta"]["content"] for chunk in chunks for c in chunk["choices"]) == "word word"
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert [m.get("more_body") for m in first] == [None, True, False]
