"""`vllm-dvlm bench abuse` without an engine: arguments, draws that can be repeated, the judgement of answers."""

import json

import pytest

from vllm_dvlm import cli
from vllm_dvlm.bench.abuse import command, draws, fuzz, fuzz_bodies
from vllm_dvlm.bench.abuse.job import PARTS, QUICK, Counts, Job
from vllm_dvlm.placement import resolve
from vllm_dvlm.settings import ServerSettings


def parse(*options):
    return cli.build_parser().parse_args(["bench", "abuse", *options])


def test_counts():
    assert command.counts_of(parse()) == Counts()
    assert command.counts_of(parse("--quick", "--fuzzed", "7")).fuzzed == 7
    assert command.counts_of(parse("--quick")) == QUICK
    assert parse("--only", "R1", "R5").only == ["R1", "R5"]


@pytest.mark.parametrize(
    "options", [["--fuzzed", "0"], ["--requests", "10"], ["--threads", "0"], ["--png", "a.png", "--only", "R1"]]
)
def test_impossible_arguments_end_with_code_2(options, capsys):
    assert cli.main(["bench", "abuse", *options]) == 2
    assert options[0] in capsys.readouterr().err


def test_requests_can_be_repeated_by_their_number(tmp_path):
    job = Job(folder=tmp_path, workdir=tmp_path, seed=3, threads=1, counts=QUICK, parts=PARTS)
    requests = [fuzz_bodies.request(job.rng("R1", i)) for i in range(60)]
    assert [fuzz_bodies.request(job.rng("R1", i)) for i in range(60)] == requests
    assert len({r.data for r in requests}) > 50 and len({r.path for r in requests}) >= 6
    assert 5 < sum(r.streams for r in requests) < 40


def test_drawn_options_are_valid_and_of_every_kind(tmp_path):
    job = Job(folder=tmp_path, workdir=tmp_path, seed=0, threads=1, counts=QUICK, parts=PARTS)
    seen = set()
    for i in range(400):
        found = draws.options(job.rng("options", i), i % 2 == 0, 16)
        resolve(found, 16, ServerSettings(num_layers=4), 900)
        seen |= {(key, value) for key, value in found.items() if isinstance(value, str)} | set(found)
    assert {("prune_method", "fastv"), ("diffusion_remasking", "margin"), "diffusion_threshold"} <= seen
    assert {"diffusion_suffix", "diffusion_refresh_interval", "prune_rows", "prune_layer"} <= seen


def chunk(**choice):
    return "data: " + json.dumps({"choices": [{"index": 0, "finish_reason": None} | choice]}) + "\n\n"


CHAT, DONE = "/v1/chat/completions", "data: [DONE]\n\n"
END = chunk(finish_reason="stop")


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        (CHAT, chunk() + END + DONE, ""),
        (CHAT, chunk() + END, r"without \[DONE\]"),
        (CHAT, chunk() + DONE, "without finish_reason"),
        (CHAT, chunk() + 'data: {"error": {"message": "x", "code": 500}}\n\n' + DONE, "error after status 200"),
        (CHAT, "data: {broken\n\n", "no JSON"),
        (CHAT, "", "without events"),
        ("/v1/responses", 'data: {"type": "response.completed"}\n\n', ""),
        ("/v1/responses", 'data: {"type": "response.output_text.delta"}\n\n', "ends with"),
        ("/v1/messages", 'data: {"type": "message_stop"}\n\n' + DONE, ""),
        ("/v1/messages", 'data: {"type": "error", "error": {"message": "x"}}\n\n', "error after status 200"),
    ],
)
def test_faults_of_streams(path, text, fault):
    found = fuzz.stream_fault(path, text)
    assert (found == "") == (fault == "")
    assert fault.replace("\\", "") in found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"error": {"message": "too long", "code": 400}}', "too long"),
        ('{"error": {"message": ""}}', ""),
        ('{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]'),
        ("Internal Server Error", ""),
        ("{}", ""),
    ],
)
def test_reason_of_a_refusal(text, reason):
    assert fuzz.reason_of(text) == reason
