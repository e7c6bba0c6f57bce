"""What goes wrong with one request is that request's alone: refused in the engine core, or forgotten by the worker."""

import logging

import pytest
import torch

from tests.golden import cases

TEXT, IMAGE, BLOCKS = "a1_text_single_block", "b1_image_steps_eq_gen", "d2_blocks2_k1"
SUFFIX, CACHED, CACHED_THRESHOLD = "h3_suffix_fast", "g12_fast_k2_r8_none", "g8_fast_blocks_r4_thr1"
PRUNED, SUFFIX_AND_STOP = "f1_redvtp_keep25", "h4_suffix_stop"
MASK_ID, EOT_ID = 126336, 126348


def request(name, **changes):
    from tests.engine.engines import case_params, case_prompt

    case = cases.load(name)
    return case_prompt(case), case_params(case, **changes)


def tokens_of(output):
    return list(output.outputs[0].token_ids)


def assert_conserved(engine):
    assert engine.num_free_blocks + engine.num_held_blocks == engine.num_idle_blocks, "lost or freed twice"


# -- refused in the engine core ----------------------------------------------------------------------------------

# The front end lets none of these through; another version of it, or a plugin, may. The last one throws when the
# request has already been prepared.
BROKEN = {
    "ValueError": {"extra_args": {"diffusion_canvas_length": "16"}},
    "TypeError": {"extra_args": {5: 1}},
    "TypeError, late": {"stop_token_ids": 5},
}


def past_the_front_end(engine, name, **broken):
    """A request of which these parameters were not checked."""
    prompt, params = request(TEXT)
    made = engine.engine.input_processor.process_inputs(name, prompt, params, supported_tasks=("generate",))
    for field, value in broken.items():
        setattr(made.params, field, value)
    return made


def send_broken(engine, name, kind):
    """The request's internal id."""
    made = past_the_front_end(engine, name, **BROKEN[kind])
    return engine.engine.add_request(name, made, made.params)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_request_refused_in_the_engine_core_ends_alone(engine, caplog, kind):
    """Beside good ones, before and after it, and with nobody else."""
    engine.use({"seed": 0})
    good = {name: request(name) for name in (TEXT, IMAGE, CACHED)}
    with caplog.at_level(logging.WARNING):
        for name in (TEXT, IMAGE):
            engine.add(name, *good[name])
        engine.engine.step()
        send_broken(engine, "broken", kind)
        engine.add(CACHED, *good[CACHED])
        done = engine.finish(lambda: assert_conserved(engine))
        engine.assert_idle()
        send_broken(engine, "alone", kind)
        done |= engine.finish()
        engine.assert_idle()
    for name in ("broken", "alone"):
        assert done[name].outputs[0].finish_reason == "error" and tokens_of(done[name]) == []
    for name in good:
        assert tokens_of(done[name]) == cases.load(name).final_ids


def test_a_refused_request_may_be_aborted_first(engine):
    """An id that is free again may be used again, by a request that is not refused."""
    engine.use({"seed": 0})
    for steps in (0, 1):
        internal = send_broken(engine, "broken", "TypeError")
        for _ in range(steps):
            engine.scheduler.schedule()  # refused, not yet reported
        engine.engine.abort_request([internal], internal=True)
        assert internal not in engine.scheduler.requests
        made = past_the_front_end(engine, "again")
        made.request_id, made.external_req_id = internal, "again"
        engine.engine.output_processor.add_request(made, None, None, 0)
        engine.core.add_request(*engine.core.preprocess_add_request(made))
        done = engine.finish()
        engine.assert_idle()
        assert tokens_of(done["again"]) == cases.load(TEXT).final_ids


def test_an_id_that_is_in_use_harms_nobody(engine):
    """Another API server's request of the same id, which vLLM's switch for random endings makes possible."""
    engine.use({"seed": 0})
    first = past_the_front_end(engine, "same")
    internal = engine.engine.add_request("same", first, first.params)
    engine.engine.step()
    for client_index in (1, 0):
        second = past_the_front_end(engine, "same")
        second.request_id, second.client_index = internal, client_index
        engine.core.add_request(*engine.core.preprocess_add_request(second))
    outputs, _ = engine.core.step()
    assert [(o.request_id, str(o.finish_reason)) for o in outputs[1].outputs] == [(internal, "error")]
    assert all(o.finish_reason is None for o in outputs[0].outputs)
    engine.engine.output_processor.process_outputs(outputs[0].outputs)
    done = engine.finish()
    engine.assert_idle()
    assert tokens_of(done["same"]) == cases.load(TEXT).final_ids


# -- forgotten by the worker -------------------------------------------------------------------------------------


class Losing:
    """For ``Engine.run``: preempts all running requests after these steps and lets the worker keep ``kept`` of them.

    emitted: tokens that each request had shown when it was preempted, by its id without the random ending.
    """

    def __init__(self, engine, monkeypatch, at_steps, kept=0):
        self.engine, self.at_steps, self.num_steps = engine, at_steps, 0
        self.num_preempted, self.emitted = 0, []
        monkeypatch.setattr(engine.model_state.stash, "max_entries", kept)

    def __call__(self):
        self.num_steps += 1
        assert_conserved(self.engine)
        if self.num_steps in self.at_steps:
            shown = {r.request_id.rsplit("-", 1)[0]: list(r.output_token_ids) for r in self.engine.scheduler.running}
            self.emitted.append(shown)
            self.num_preempted += self.engine.preempt_all()


BY_BLOCKS = {"diffusion_block_length": 4}
OPTIONS = {
    "exact": (TEXT, {}),
    "image": (IMAGE, {}),
    "blocks": (BLOCKS, {}),
    "cut": (TEXT, {"max_tokens": 10, "extra_args": {"diffusion_canvas_length": 16, **BY_BLOCKS}}),
    "suffix": (SUFFIX, {}),
    "cached": (CACHED, {}),
    "threshold": (CACHED_THRESHOLD, {}),
    "logprobs": (TEXT, {"logprobs": 2, "extra_args": BY_BLOCKS}),
    "noise": (TEXT, {"temperature": 0.8, "seed": 4, "extra_args": {"diffusion_remasking": "random"}}),
    "redvtp": (PRUNED, {"extra_args": BY_BLOCKS}),
    "redvtp-cached": (PRUNED, {"extra_args": BY_BLOCKS | {"diffusion_refresh_interval": 32}}),
    "keeps-angles": (PRUNED, {"extra_args": {"prune_positions": "keep", "diffusion_refresh_interval": 4}}),
    "fastv": (PRUNED, {"extra_args": {"prune_method": "fastv", "diffusion_refresh_interval": 4, **BY_BLOCKS}}),
}


@pytest.mark.parametrize("at_steps", [{1}, {2, 5}, {3, 4, 6, 9}], ids=str)
def test_forgotten_requests_restart_from_what_was_shown(engine, monkeypatch, at_steps):
    engine.use({"seed": 0})
    work = {name: request(case, **changes) for name, (case, changes) in OPTIONS.items()}
    losing = Losing(engine, monkeypatch, at_steps)
    outputs = engine.run(work, on_step=losing)
    assert losing.num_preempted >= 8 and not engine.model_state.stash.entries
    shown_before = 0
    for name, output in outputs.items():
        case, found = cases.load(OPTIONS[name][0]), tokens_of(output)
        suffix = case.raw["suffix_ids"]
        assert output.outputs[0].finish_reason == "length"
        size = OPTIONS[name][1].get("max_tokens") or case.settings["gen_length"] + len(suffix)
        assert len(found) == size and MASK_ID not in found, name
        assert found[len(found) - len(suffix) :] == suffix
        for shown in losing.emitted:
            assert found[: len(shown.get(name, ()))] == shown.get(name, []), "a token that the user has was taken back"
            shown_before += len(shown.get(name, ()))
        assert engine.trace(name)["final_ids"][: len(found)] == found, name
    assert shown_before > 0 or at_steps == {1}
    assert len(outputs["logprobs"].outputs[0].logprobs) == len(tokens_of(outputs["logprobs"]))
    for name in ("redvtp", "redvtp-cached", "keeps-angles", "fastv"):
        keep_count = cases.load(PRUNED).raw["pruning"]["keep_count"]
        assert engine.trace(name)["pruning"]["keep_count"] == keep_count
        report = outputs[name].kv_transfer_params["dvlm"]
        assert report["visual_tokens_after"] == keep_count < report["visual_tokens_before"]


@pytest.mark.parametrize("at_steps", [{1}, {3, 6}, {9}], ids=str)
def test_forgotten_stops_are_found_again(engine, monkeypatch, at_steps):
    """The stop and what follows it were not shown; wherever the canvas is stopped now, the reply ends properly."""
    case = cases.load(SUFFIX_AND_STOP)
    engine.use(case.build_args)
    output = engine.run({"one": request(case.name)}, on_step=Losing(engine, monkeypatch, at_steps))["one"]
    found, suffix = tokens_of(output), case.raw["suffix_ids"]
    if output.outputs[0].finish_reason == "stop":
        assert found[-1] == EOT_ID and found[-1 - len(suffix) : -1] == suffix
        assert EOT_ID not in found[:-1] and engine.trace("one")["stopped_at"] == len(found) - 1 - len(suffix)
    else:
        assert len(found) == case.settings["gen_length"] + len(suffix) and EOT_ID not in found
    assert MASK_ID not in found


def test_who_was_not_forgotten_notices_nothing(engine, monkeypatch):
    """One of four is kept, and two come later."""
    engine.use({"seed": 0})
    names = [TEXT, IMAGE, BLOCKS, "c1_steps_lt_gen"]
    late = {"late": request(TEXT), "late image": request(IMAGE)}
    losing = Losing(engine, monkeypatch, {2}, kept=1)

    def on_step():
        losing()
        if losing.num_steps == 6:
            for name, (prompt, params) in late.items():
                engine.add(name, prompt, params)

    for name in names:
        engine.add(name, *request(name))
    done = engine.finish(on_step)
    engine.assert_idle()
    same = [name for name in names if tokens_of(done[name]) == cases.load(name).final_ids]
    kept = [name for name in names if "restarted_at" not in engine.trace(name)]
    assert len(kept) == 1 and set(kept) <= set(same)
    assert tokens_of(done["late"]) == cases.load(TEXT).final_ids
    assert tokens_of(done["late image"]) == cases.load(IMAGE).final_ids


@pytest.mark.parametrize("at_step", [1, 3, 4, 7])
def test_a_restarted_request_follows_the_plain_loop(engine, reference, monkeypatch, at_step):
    """From the shown tokens on, all the steps of the open block and of those behind it."""
    case = cases.load("d1_blocks4_k2")
    settings, model = case.settings, reference(**case.build_args)
    engine.use(case.build_args)
    losing = Losing(engine, monkeypatch, {at_step})
    found = tokens_of(engine.run({"one": request(case.name)}, on_step=losing)["one"])
    shown = losing.emitted[0]["one"]
    trace = engine.trace("one")
    assert trace["restarted_at"] == len(shown) and shown == case.final_ids[: len(shown)]
    canvas = shown + [MASK_ID] * (settings["gen_length"] - len(shown))
    block = settings["block_length"]
    num_steps = settings["steps"] // (settings["gen_length"] // block)
    merged = model.merge(case.prompt_ids, model.image_features(cases.images(case)))
    steps = []
    for start in range(len(shown) // block * block, len(canvas), block):
        num_masked = canvas[start : start + block].count(MASK_ID)
        for step in range(num_steps):
            masked = [i for i in range(start, start + block) if canvas[i] == MASK_ID]
            if not masked:
                break
            said, confidence = propose(model, merged, canvas)
            count = num_masked // num_steps + (step < num_masked % num_steps)
            chosen = sorted(sorted(masked, key=lambda i: (-confidence[i], i))[:count])
            for i in chosen:
                canvas[i] = said[i]
            steps.append(chosen)
    assert [step["pos"] for step in trace["steps"] if step["pos"]] == [step for step in steps if step]
    assert found == canvas


def propose(model, merged, canvas):
    """Greedy token and its probability at every canvas position, from a whole forward pass."""
    with torch.inference_mode():
        embeds = torch.cat([merged.embeddings, model.embed(canvas)])
        logits = model.text.logits(model.text.forward(embeds[None])[0][-len(canvas) :]).double()
        logits[:, [126080, 126081, 126346, 126347, *range(126349, logits.shape[1])]] = -torch.inf
        best = logits.softmax(-1).max(-1)
    return best.indices.tolist(), best.values.tolist()


def test_samples_of_one_prompt_are_told_apart(engine, monkeypatch):
    """They share their parameters: that one has been preempted says nothing of those that still wait."""
    from vllm.sampling_params import RequestOutputKind

    engine.use({"seed": 0})
    prompt, params = request(TEXT, n=4, temperature=0.5, output_kind=RequestOutputKind.FINAL_ONLY)
    monkeypatch.setattr(engine.scheduler, "max_num_active_reqs", 2)
    losing, restarted = Losing(engine, monkeypatch, {3, 6}), []
    restart = engine.scheduler._restart
    monkeypatch.setattr(engine.scheduler, "_restart", lambda r: restarted.append(r.request_id) or restart(r))
    engine.add("samples", prompt, params)
    done = engine.finish(losing)
    engine.assert_idle()
    assert [len(sample.token_ids) for sample in done["samples"].outputs] == [16] * 4
    assert losing.num_preempted == 4 == len(restarted) and len(set(restarted)) == 2


def test_the_bound_follows_the_number_of_requests():
    from vllm_dvlm.worker.stash import Stash

    assert Stash(16).max_entries == 1024 and Stash(4096).max_entries == 8192
