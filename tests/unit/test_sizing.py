"""`vllm-dvlm size`: operations against the engine's own counts, tables, bad arguments. What it says of memory is held
against a real engine in tests/engine/test_sizing.py."""

from pathlib import Path

import pytest

from vllm_dvlm.checkpoint.configuration import published_config
from vllm_dvlm.cli import build_parser, main
from vllm_dvlm.families import FAMILIES
from vllm_dvlm.steps import forward_flops
from vllm_dvlm.tools.sizing import arithmetic as sizes
from vllm_dvlm.tools.sizing import command

NAMES = [family.published_name for family in FAMILIES.values()]
WORK = sizes.Work(text=100, visual=1000, canvas=64, block=32, steps=32)


def config(name):
    (family,) = (family for family in FAMILIES.values() if family.published_name == name)
    return published_config(family)


@pytest.mark.parametrize(
    "name, billions, kv_kib", [("LLaDA-V 8B", 8.4, 512), ("LaViDa-LLaDA 8B", 8.4, 512), ("LaViDa-Dream 7B", 8.0, 56)]
)
def test_published_checkpoints(name, billions, kv_kib):
    found = config(name)
    total = sizes.text_parameters(found) + sizes.vision_parameters(found)
    assert total / 1e9 == pytest.approx(billions, abs=0.05)
    assert sizes.kv_bytes_per_token(found) == kv_kib * 1024


def test_courses():
    """(tokens computed, rows of logits) of each step."""

    def steps(recipe):
        return [(step.query_len, rows) for _, step, rows, _ in sizes.course(WORK, recipe)]

    rows = [*range(32, 0, -2)] * 2
    assert steps(sizes.Recipe("exact")) == [(1164, n) for n in rows]
    assert steps(sizes.Recipe("pruned", keep=0.25)) == [(1164, 32), *((414, n) for n in rows[1:])]
    cached = steps(sizes.Recipe("cached", refresh=8))
    assert [query for query, _ in cached] == [1164, *[64] * 7, 1164, *[64] * 7, 1164, *[32] * 7, 1164, *[32] * 7]
    assert steps(sizes.Recipe("prefix", caches_prompt=True)) == [(1164, 32), *((64, n) for n in rows[1:])]


def test_operations_are_the_engines_and_the_vocabulary():
    found = config("LLaDA-V 8B")
    cost = sizes.cost(found, WORK, sizes.Recipe("exact"))
    rows = sum(rows for _, _, rows, _ in sizes.course(WORK, sizes.Recipe("exact")))
    adds = 32 * forward_flops(found, 1164, 1164) + rows * 4096 * 126464
    assert cost.tflop == pytest.approx(2 * adds / 1e12)
    pruned = sizes.cost(found, WORK, sizes.Recipe("pruned", keep=0.25))
    assert 0.36 < pruned.tflop / cost.tflop < 0.38


def test_roofline():
    """A long step is bound by arithmetic, a short one by reading the weights; of many requests by arithmetic again."""
    found, card = config("LLaDA-V 8B"), sizes.Card("x", 80, 1000, 500)
    long, short = sizes.Cost(0, ((5e13, 1000, 1000),)), sizes.Cost(0, ((1e9, 1000, 1),))
    assert sizes.roofline_ms(found, long, card) == pytest.approx(100)
    weights = 2 * sizes.text_parameters(found)
    assert sizes.roofline_ms(found, short, card) == pytest.approx((weights + 1000 * 524288) / 1e9)
    assert sizes.roofline_ms(found, long, card, num=8) == pytest.approx(800)
    assert sizes.roofline_ms(found, long, card, ranks=2) == pytest.approx(50)


def test_requests_in_flight_follow_what_is_kept():
    found = config("LLaDA-V 8B")
    pool = 50 * 2**30
    whole, quarter = (sizes.in_flight(found, WORK, keep, pool) for keep in (1.0, 0.25))
    per_request = 1168 * 524288 + 1100 * 8192  # 1,164 tokens fill 73 blocks
    assert whole == pool // per_request
    assert quarter == pool // (416 * 524288 + 350 * 8192)
    assert sizes.in_flight(found, WORK, 1.0, -5) == 0


@pytest.mark.parametrize("name", NAMES)
def test_command(name, capsys):
    assert main(["size", name, "--gpu-gib", "80"]) == 0
    text = capsys.readouterr().out
    assert name in text and "requests in flight" in text and "redvtp 0.25" in text and "not measured" in text
    assert ("prefix" in text) == ("prefix" in config(name).family.attentions)


@pytest.mark.parametrize(
    "words, message",
    [
        (["nobody/nothing"], "is no checkpoint folder"),
        (["LLaDA-V 8B", "--gpu-gib", "16"], "leave no room for KV"),
        (["LLaDA-V 8B", "-tp", "3"], "does not divide"),
        (["LLaDA-V 8B", "--keep-ratios", "1.5"], "lie in"),
        (["LLaDA-V 8B", "--image", "wide"], "WIDTHxHEIGHT"),
        (["LLaDA-V 8B", "--canvas", "64", "--block", "48"], "whole blocks"),
        (["LLaDA-V 8B", "--canvas", "0"], "at least 1"),
    ],
)
def test_bad_arguments_name_the_remedy(words, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["size", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_the_readmes_table(name):
    """What the README prints for 80 GiB is what the command says."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in readme.splitlines() if line.startswith(f"| {name} |") and "GiB" in line)
    found = command.numbers(build_parser().parse_args(["size", name, "--gpu-gib", "80"]))
    memory, picture = found["memory"][0], found["pictures"][-1]
    counts = " / ".join(str(each["requests in flight"]) for each in found["in flight"])
    cells = [name, f"{memory['weights GiB']:g} GiB", f"{memory['KV KiB/token']:g} KiB"]
    cells += [f"{picture['visual tokens']:,} tokens", counts]
    assert row == f"| {' | '.join(cells)} |"
