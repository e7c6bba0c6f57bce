"""Requests that nobody sends twice but somebody sends once: each is answered, and the engine lives on."""

import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.golden import cases

TEXT = "a1_text_single_block"
MASK_TOKEN_PREDICTED = "k1_mask_token_predicted"
SUFFIX_AND_STOP = "h4_suffix_stop"
SUFFIX_TEXT = cases.load("h1_suffix").settings["generation_suffix"]


def request(name, **changes):
    from tests.engine.engines import case_params, case_prompt

    case = cases.load(name)
    return case_prompt(case), case_params(case, **changes)


def reply(engine, name, **changes):
    """The completion, on the case's own checkpoint."""
    engine.use(cases.load(name).build_args)
    return engine.run({"one": request(name, **changes)})["one"].outputs[0]


# -- steps -----------------------------------------------------------------------------------------------------


def test_steps_without_number_do_not_stall_a_predicted_mask_token(engine):
    case = cases.load(MASK_TOKEN_PREDICTED)
    found = reply(engine, MASK_TOKEN_PREDICTED, extra_args={"diffusion_max_steps": 10**9})
    assert list(found.token_ids) == case.final_ids
    assert engine.trace("one")["num_forward_passes"] <= case.settings["gen_length"]


# -- suffix ----------------------------------------------------------------------------------------------------


def test_stop_tokens_count_in_the_canvas_alone(engine):
    """Point 30: stops are looked for in the canvas; the suffix follows whole."""
    engine.use(cases.load(TEXT).build_args)
    suffix_ids = engine.scheduler._encode(SUFFIX_TEXT)
    options = {"diffusion_suffix": SUFFIX_TEXT}
    whole = list(reply(engine, TEXT, ignore_eos=True, extra_args=options).token_ids)
    assert whole[-len(suffix_ids) :] == suffix_ids
    for stop in {suffix_ids[0], suffix_ids[-1]} - set(whole[: -len(suffix_ids)]):
        found = reply(engine, TEXT, ignore_eos=True, stop_token_ids=[stop], extra_args=options)
        assert list(found.token_ids) == whole and found.finish_reason == "length"


def test_no_suffix_where_max_tokens_ends_the_reply(engine):
    case = cases.load(SUFFIX_AND_STOP)
    assert case.stopped_at == 7
    found = reply(engine, SUFFIX_AND_STOP, max_tokens=10, extra_args={"diffusion_canvas_length": 16})
    canvas = case.final_ids[: case.stopped_at]
    assert list(found.token_ids[:-1]) == canvas and found.finish_reason == "stop"
    found = reply(engine, SUFFIX_AND_STOP, max_tokens=5, extra_args={"diffusion_canvas_length": 16})
    assert list(found.token_ids) == canvas[:5] and found.finish_reason == "length"


def test_where_the_suffix_lies_in_the_last_step():
    """Every way a canvas of few words can end, with suffixes of the same words."""
    from vllm_dvlm.request import DiffusionRequest
    from vllm_dvlm.steps import Plan, Position

    rng = random.Random(0)
    seen = set()
    for _ in range(5000):
        canvas = [rng.choice("abc") for _ in range(rng.randint(1, 4))]
        suffix = [rng.choice("abc") for _ in range(rng.randint(0, 3))]
        stops = rng.choice([set(), {"a"}, {"a", "b"}])
        stop = next((i for i, token in enumerate(canvas) if token in stops), None)
        limit = len(canvas) if stop is None else stop
        emitted = rng.randint(0, limit)
        last = canvas[emitted:limit] + suffix + ([] if stop is None else [canvas[stop]])
        request = SimpleNamespace(
            suffix_ids=suffix,
            stop_ids=stops,
            plan=Plan(9, len(canvas), len(suffix), len(canvas), 1, 1),
            position=Position(0, 0, emitted),
        )
        first, end = DiffusionRequest.suffix_of(request, last)
        if suffix:
            assert (first, end) == (limit - emitted, limit - emitted + len(suffix)), (canvas, suffix, stops, emitted)
        else:
            assert first == end
        # An earlier step hands out a part of the canvas.
        some = canvas[emitted : rng.randint(emitted, limit)]
        if len(some) < limit - emitted:
            assert DiffusionRequest.suffix_of(request, some) == (0, 0)
        seen.add((stop is None, bool(suffix), bool(stops & {*suffix[-1:]}), emitted == limit))
    assert len(seen) >= 12


# -- max_tokens left open ----------------------------------------------------------------------------------------


def test_an_open_canvas_leaves_room_for_the_suffix(engine):
    from tests.engine.engines import MAX_CANVAS_LENGTH

    options = {"diffusion_canvas_length": None, "diffusion_block_length": None, "diffusion_max_steps": 1}
    found = reply(engine, TEXT, max_tokens=None, extra_args=options | {"diffusion_suffix": SUFFIX_TEXT})
    assert len(found.token_ids) == MAX_CANVAS_LENGTH and found.finish_reason == "length"


@pytest.mark.parametrize(("room", "canvas"), [(45, 40), (8, 8)])
def test_an_open_canvas_is_cut_to_whole_blocks(engine, room, canvas):
    from vllm import SamplingParams

    from tests.engine.engines import MAX_MODEL_LEN

    engine.use({"seed": 0})
    prompt = {"prompt_token_ids": [300 + i % 500 for i in range(MAX_MODEL_LEN - room)]}
    options = {"diffusion_block_length": 8, "diffusion_max_steps": canvas // 8, "diffusion_refresh_interval": 32}
    output = engine.run_one(prompt, SamplingParams(temperature=0, max_tokens=None, extra_args=options))
    assert len(output.outputs[0].token_ids) == canvas


# -- traces ----------------------------------------------------------------------------------------------------


def test_a_long_id_gets_a_trace(engine):
    from vllm_dvlm.worker.trace import file_name

    engine.use(cases.load(TEXT).build_args)
    name = "x" * 300
    engine.run({name: request(TEXT)})
    assert engine.trace(file_name(name))["request_id"] == name
    assert file_name(name) != file_name(name + "x") and len(file_name(name)) <= 200


def test_a_full_disk_costs_the_trace_alone(engine, monkeypatch):
    from pathlib import Path

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert list(reply(engine, TEXT).token_ids) == cases.load(TEXT).final_ids
    monkeypatch.undo()
    assert list(reply(engine, TEXT).token_ids) == cases.load(TEXT).final_ids


def test_a_folder_that_takes_no_traces_is_refused(tmp_path):
    from vllm_dvlm.worker.trace import check_folder

    check_folder(str(tmp_path / "new" / "folder"))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="trace_dir.*name another folder"):
        check_folder(str(file / "traces"))


def test_a_worker_that_cannot_write_traces_does_not_start(engine, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    state, config = engine.model_state, copy.copy(engine.runner.vllm_config)
    config.additional_config = {"dvlm": config.additional_config["dvlm"] | {"trace_dir": str(file / "traces")}}
    try:
        with pytest.raises(ValueError, match="trace_dir.*name another folder"):
            type(state)(config, engine.model, engine.runner.encoder_cache, engine.runner.device)
    finally:
        engine.model.model.set_forward_plan(state.forward_plan)
    assert list(reply(engine, TEXT).token_ids) == cases.load(TEXT).final_ids


# -- tokenizers without an end of turn ---------------------------------------------------------------------------


@pytest.mark.parametrize("stop_token_ids", [[], [271]])
def test_without_an_end_of_turn_token(engine, monkeypatch, stop_token_ids):
    engine.use(cases.load(TEXT).build_args)
    before = engine.model_state.token_ids
    monkeypatch.setattr(engine.model_state, "token_ids", replace(before, end_of_turn_token_id=None))
    monkeypatch.setattr(engine.scheduler.hf_config, "end_of_turn_token_id", None)
    found = reply(engine, TEXT, stop_token_ids=stop_token_ids)
    assert list(found.token_ids) == cases.load(TEXT).final_ids


# -- streamed inputs ---------------------------------------------------------------------------------------------


def test_a_streamed_input_ends_in_an_error_of_its_own(engine):
    """Pieces and end of an ``AsyncLLM`` input stream, as it sends them, beside a request that must not notice."""
    engine.use(cases.load(TEXT).build_args)
    prompt, params = request(TEXT)
    (rendered,) = engine.engine.renderer.render_cmpl([prompt])

    def send(resumable):
        piece = engine.engine.input_processor.process_inputs(
            "session", rendered, params, ("generate",), resumable=resumable
        )
        piece.external_req_id = "session"
        sent, _ = engine.core.preprocess_add_request(piece)
        engine.scheduler.add_request(sent)

    engine.add("good", prompt, params)
    send(resumable=True)
    send(resumable=True)  # before the first one's refusal has left the engine
    first = engine.core.step()[0][0].outputs
    assert [(out.request_id, out.finish_reason.name) for out in first if out.request_id == "session"] == [
        ("session", "ERROR")
    ]
    send(resumable=False)  # the end of the stream, after it
    done = engine.finish()
    engine.assert_idle()
    assert list(done) == ["good"] and tokens_of(done["good"]) == cases.load(TEXT).final_ids


def test_a_second_request_of_an_id_leaves_the_first_alone(engine):
    engine.use(cases.load(TEXT).build_args)
    prompt, params = request(TEXT)
    (rendered,) = engine.engine.renderer.render_cmpl([prompt])
    engine.add("twin", prompt, params)
    (request_id,) = engine.scheduler.requests
    twin = engine.engine.input_processor.process_inputs(request_id, rendered, params, ("generate",))
    engine.scheduler.add_request(engine.core.preprocess_add_request(twin)[0])
    assert tokens_of(engine.finish()["twin"]) == cases.load(TEXT).final_ids
    engine.assert_idle()


def tokens_of(output):
    return list(output.outputs[0].token_ids)
