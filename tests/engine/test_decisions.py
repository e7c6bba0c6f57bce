"""Decisions about pictures: `/v1/systemone` on the demo model, and the log-probabilities that they are read from."""

import math

import pytest

from tests.engine.server import MODEL, Server
from vllm_dvlm import placement
from vllm_dvlm.bench import decisions as bench
from vllm_dvlm.bench.question_job import model_of
from vllm_dvlm.families import FAMILIES
from vllm_dvlm.options import parse
from vllm_dvlm.serving.decisions import CanvasStrategy, Slots
from vllm_dvlm.settings import ServerSettings


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    served = Server(model_of(None), log, {}, "--kv-cache-memory-bytes", str(2**27), "--max-num-seqs", "8")
    yield served
    served.stop()


@pytest.fixture(scope="module")
def asked():
    return bench.questions(40, 3)


def decide(server, body, status=200):
    reply = server.http.post("/v1/systemone", json={"model": MODEL, "state": None} | body)
    assert reply.status_code == status, reply.text
    return reply.json()


def choice(each):
    return {"type": "choice", "instructions": each.question, "criteria": dict.fromkeys(bench.OPTIONS[each.kind])}


WORDS = {"chat_template_kwargs": {"decision_labels": "words"}}


def test_answers_and_probabilities(server, asked):
    right = 0
    for each in asked:
        found = decide(server, {"images": [each.picture], "questions": {"q": choice(each)}} | WORDS)
        answer = found["answers"]["q"]
        assert answer["choice"] == max(answer["probabilities"], key=answer["probabilities"].get)
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert set(answer["probabilities"]) == set(bench.OPTIONS[each.kind])
        assert 0 <= found["diagnostics"]["q"]["label_mass"] <= 1
        right += answer["choice"] == each.answer
    assert right >= 35


def test_several_questions_at_once_are_those_alone(server, asked):
    """One request, more of them than are in the engine at a time: the same probabilities as asked one by one."""
    pair = bench.groups(2, 5)[0][:2]
    ask = lambda q: decide(server, {"images": [q.picture], "questions": {"q": choice(q)}} | WORDS)  # noqa: E731
    alone = [ask(each)["answers"]["q"] for each in pair]
    body = {"images": [pair[0].picture], "questions": {str(i): choice(pair[i % 2]) for i in range(40)}}
    together = decide(server, body | WORDS)
    assert list(together["answers"]) == [str(i) for i in range(40)]
    for number, own in together["answers"].items():
        each = alone[int(number) % 2]
        assert own["choice"] == each["choice"]
        assert own["probabilities"] == pytest.approx(each["probabilities"], rel=1e-3, abs=1e-6)


def test_jointly_read(server):
    """A slot for each in one canvas: answers of both, one prompt."""
    pair = bench.groups(2, 5)[0][:2]
    body = {"images": [pair[0].picture], "questions": {str(i): choice(q) for i, q in enumerate(pair)}}
    joint = decide(server, body | {"chat_template_kwargs": {"decision_labels": "words", "decision_reading": "joint"}})
    apart = decide(server, body | WORDS)
    assert set(joint["answers"]) == {"0", "1"}
    assert joint["usage"]["input_tokens"] < apart["usage"]["input_tokens"]


@pytest.mark.parametrize("labels", ["letters", "words"])
def test_every_type(server, asked, labels):
    questions = {
        "yes": {"type": "noul", "instructions": "is there a 3?"},
        "level": {"type": "score", "instructions": "how many?", "criteria": ["none", "few", "many"]},
        "pick": {"type": "choice", "instructions": "which?", "criteria": {"red": "as blood", "blue": None}},
    }
    body = {"images": [asked[0].picture], "questions": questions, "state": "Look.", "instructions": "Answer briefly."}
    found = decide(server, body | {"chat_template_kwargs": {"decision_labels": labels}})["answers"]
    assert 0 <= found["yes"]["noul"] <= 1 and found["pick"]["choice"] in ("red", "blue")
    assert 0 <= found["level"]["score"] <= 2 and set(found["level"]["probabilities"]) == {"0", "1", "2"}


def test_text_alone(server):
    body = {"state": "The sky is blue.", "questions": {"q": {"type": "noul", "instructions": "Is it red?"}}}
    assert "noul" in decide(server, body)["answers"]["q"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"questions": {}}, "needs at least one question"),
        ({"chat_template_kwargs": {"decision_labels": "numbers"}}, "decision_labels must be one of letters, words"),
        ({"chat_template_kwargs": {"decision_reading": "both"}}, "decision_reading must be one of separate, joint"),
        ({"images": ["data:image/png;base64,AAAA"]}, "media"),
        ({"audio": ["data:audio/wav;base64,AAAA"]}, "does not take audio"),
        ({"questions": {"q": {"type": "rank", "instructions": "?"}}}, "unknown question type"),
    ],
)
def test_bad_requests(server, asked, change, message):
    body = {"images": [asked[0].picture], "questions": {"q": choice(asked[0])}} | change
    assert message in decide(server, body, 400)["error"]["message"]


def test_options_with_too_many_tokens():
    from vllm.entrypoints.generate.structured_decisions.question_types import StructuredDecisionError

    strategy = object.__new__(CanvasStrategy)  # the bound needs no server
    options = [[[number, number + 1]] for number in range(127)]
    assert len(strategy._params([Slots(0, options)], 8, None).logprob_token_ids) == 128
    with pytest.raises(StructuredDecisionError, match="129 different tokens; use at most 128"):
        strategy._params([Slots(0, [*options, [[128]]])], 8, None)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize(
    "defaults",
    [
        {"diffusion_block_length": 4},
        {"diffusion_threshold": 1.0},
        {"diffusion_step_ratio": 0.5},
        {"diffusion_schedule": "shift", "diffusion_schedule_shift": 0.33},
        {"diffusion_draft": "no"},
        {"diffusion_suffix": "no"},
        {"diffusion_refresh_interval": 8},
    ],
    ids=lambda defaults: next(iter(defaults)),
)
def test_defaults_of_the_server_are_none_of_a_decision(architecture, defaults):
    """One step over a canvas that is all masked, whatever other requests are made of."""
    strategy = object.__new__(CanvasStrategy)
    options = strategy._params([Slots(0, [[[300]]])], 8, None).extra_args
    plans = []
    for server_defaults in ({}, defaults):
        settings = ServerSettings(architecture=architecture, defaults=parse(server_defaults))
        resolved = placement.resolve(options, 8, settings)
        plans.append((resolved.plan(100), resolved.options.diffusion_draft, resolved.options.diffusion_schedule))
    assert plans[0] == plans[1] and plans[0][1:] == ("", "uniform") and plans[0][0].block_len == 8


def test_bench_measures(server, asked):
    """Rows and figures of the command; what they say, examples/results tells."""
    import argparse

    arguments = argparse.Namespace(at_once=4, canvas=8, alone=8)
    rows, figures, (error, bins) = bench.measure(bench.Server(server.port, MODEL), asked, bench.groups(2, 1), arguments)
    num = sum(map(len, bench.groups(2, 1)))
    assert [row["questions"] for row in rows] == [40, 40, 40, num, num, num, num]
    assert rows[1]["right"] == rows[2]["right"] >= 0.85 and figures["C3_same_answer_one_at_a_time"] == 1
    assert 0 <= error <= 1 and sum(num for _, _, num in bins) == 40
    assert figures["C3_times_generating"] > 0  # how much, depends on the machine's other work


def test_calibration():
    sure = [bench.Decided("a", 0.95)] * 10 + [bench.Decided("a", 0.55)] * 10
    error, bins = bench.calibration(sure, [True] * 9 + [False] + [True] * 5 + [False] * 5)
    assert error == pytest.approx(0.05) and [num for _, _, num in bins] == [10, 10]
    assert bench.calibration([bench.Decided("a", 1.0)], [False])[0] == 1


def test_logprobs_of_chosen_ids(engine):
    """`logprob_token_ids`: at each position, the numbers that `logprobs=N` has for the same ids."""
    from tests.engine.engines import case_params, case_prompt
    from tests.golden import cases

    case = cases.load("a1_text_single_block")
    engine.use(case.build_args)
    best = engine.run_one(case_prompt(case), case_params(case, logprobs=5)).outputs[0]
    ids = sorted({i for row in best.logprobs for i in row})[:20]
    chosen = engine.run_one(case_prompt(case), case_params(case, logprob_token_ids=ids)).outputs[0]
    assert list(chosen.token_ids) == list(best.token_ids)
    compared = 0
    for token, wanted, found in zip(best.token_ids, best.logprobs, chosen.logprobs, strict=True):
        assert set(found) == {*ids, token}
        for token_id in wanted.keys() & found.keys():
            assert math.isclose(found[token_id].logprob, wanted[token_id].logprob, abs_tol=1e-6)
            compared += 1
    assert compared > 20
