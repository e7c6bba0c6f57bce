"""What one request may ask of decoding: stops, limits, logprobs, noise, remasking, threshold; against dense loops."""

import math

import pytest
import torch

from tests.golden import cases

CASE = cases.load("a1_text_single_block")
EOT_ID, MASK_ID, FIRST_UNKNOWN_ID = 126348, 126336, 126349
FORBIDDEN_IDS = [126080, 126081, 126346, 126347]
# Float32 sums over 126,464 vocabulary rows (golden README, 'Tolerance to expect').
LOGPROB_TOLERANCE = 1e-3


def params(**changes):
    """Sampling parameters of the text case with changes; ``extra_args`` are added to those of the case."""
    from tests.engine.engines import case_params

    return case_params(CASE, **changes)


def prompt(case=CASE):
    from tests.engine.engines import case_prompt

    return case_prompt(case)


def run(engine, sampling_params, case=CASE, name="one"):
    engine.use(case.build_args)
    (completion,) = engine.run({name: (prompt(case), sampling_params)})[name].outputs
    return completion


def dense(reference, case=CASE, **changes):
    """Tokens of the plain PyTorch loop for a text case; changes of bench.reference.loops.LoopOptions."""
    from vllm_dvlm.reference.loops import LoopOptions, lean_loop

    settings = case.settings
    options = {
        "canvas_length": settings["gen_length"],
        "max_steps": settings["steps"],
        "block_length": settings["block_length"],
        "suffix_ids": tuple(case.raw["suffix_ids"]),
    }
    model = reference(**case.build_args)
    return lean_loop(model, model.merge(case.prompt_ids), LoopOptions(**options | changes))


def dense_logits(model, prompt_ids, canvas):
    """[C, V] float64 logits of all canvas positions, from a whole forward pass; forbidden tokens at -inf."""
    with torch.inference_mode():
        hidden = model.text.forward(model.embed(list(prompt_ids) + list(canvas))[None])[0]
        logits = model.text.logits(hidden[len(prompt_ids) :]).double()
        logits[:, [*FORBIDDEN_IDS, *range(FIRST_UNKNOWN_ID, logits.shape[1])]] = -torch.inf
        return logits


# -- stops and limits ------------------------------------------------------------------------------------------


def test_end_of_turn_stops_unless_ignored(engine, reference):
    case = cases.load("e4_stop_text_k1")
    from tests.engine.engines import case_params

    stopped = run(engine, case_params(case), case)
    assert list(stopped.token_ids) == [*case.final_ids, EOT_ID]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", None)
    ignored = run(engine, case_params(case, ignore_eos=True), case)
    assert list(ignored.token_ids) == dense(reference, case, stop_ids=()).final_ids
    assert ignored.finish_reason == "length" and EOT_ID in ignored.token_ids


def test_stop_token_ids(engine, reference):
    recorded = dense(reference).final_ids
    token = recorded[5]
    assert recorded.index(token) > 0
    stopped = run(engine, params(stop_token_ids=[token, 5]))
    oracle = dense(reference, stop_ids=(EOT_ID, token, 5))
    assert list(stopped.token_ids) == [*oracle.final_ids, token]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
    assert engine.trace("one")["stopped_at"] == oracle.stopped_at
    assert engine.trace("one")["num_forward_passes"] == len(oracle.steps)


def test_many_stop_tokens_are_as_few(engine):
    """In one batch with requests that have one stop token or none."""
    engine.use(CASE.build_args)
    token = CASE.final_ids[5]
    work = {
        "few": (prompt(), params(stop_token_ids=[token])),
        "many": (prompt(), params(stop_token_ids=[*range(2000, 2060), token, *range(3000, 3060)])),
        "none": (prompt(), params()),
    }
    outputs = {name: output.outputs[0] for name, output in engine.run(work).items()}
    assert list(outputs["many"].token_ids) == list(outputs["few"].token_ids) != CASE.final_ids
    assert outputs["many"].stop_reason == outputs["few"].stop_reason == token
    assert list(outputs["none"].token_ids) == CASE.final_ids


def test_stop_string_ends_the_request(engine):
    words = CASE.raw["final_text"].split(" ")
    word = next(w for w in words[4:] if words.index(w) >= 3)
    stopped = run(engine, params(stop=[word]))
    assert stopped.text == CASE.raw["final_text"].split(word)[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", word)


@pytest.mark.parametrize("max_tokens", [1, 5, 15])
def test_max_tokens_below_the_canvas_cuts_the_reply(engine, max_tokens):
    cut = run(engine, params(max_tokens=max_tokens))
    assert list(cut.token_ids) == CASE.final_ids[:max_tokens]
    assert cut.finish_reason == "length"


def test_max_tokens_below_the_canvas_leaves_no_room_for_the_suffix(engine):
    from tests.engine.engines import case_params

    case = cases.load("h2_suffix_blocks_text")
    cut = run(engine, case_params(case, max_tokens=10), case)
    assert list(cut.token_ids) == case.final_ids[:10]
    # A limit equal to the canvas means the canvas; the suffix is not counted against it.
    whole = run(engine, case_params(case, max_tokens=16), case)
    assert list(whole.token_ids) == case.final_ids and len(case.raw["suffix_ids"]) == 9


def test_canvas_follows_max_tokens(engine, reference):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=10, extra_args={"diffusion_block_length": 4})
    reply = run(engine, sampling)
    assert list(reply.token_ids) == dense(reference, canvas_length=12, max_steps=12, block_length=4).final_ids[:10]


def test_streams_grow_and_end_with_the_whole_reply(engine):
    from vllm.sampling_params import RequestOutputKind

    from tests.engine.engines import case_params

    case = cases.load("a2_text_blocks_k2")
    engine.use(case.build_args)
    engine.add("delta", prompt(case), case_params(case, output_kind=RequestOutputKind.DELTA))
    engine.add("cumulative", prompt(case), case_params(case, output_kind=RequestOutputKind.CUMULATIVE))
    seen = {"delta": [], "cumulative": []}
    while engine.engine.has_unfinished_requests():
        for output in engine.engine.step():
            seen[output.request_id].append(list(output.outputs[0].token_ids))
    engine.finish()
    assert sum(seen["delta"], []) == case.final_ids
    # Tokens come as soon as everything before them is there: at the latest with their block.
    assert len(seen["delta"]) >= 4 and all(len(piece) <= 8 for piece in seen["delta"])
    for earlier, later in zip(seen["cumulative"], seen["cumulative"][1:], strict=False):
        assert later[: len(earlier)] == earlier
    assert seen["cumulative"][-1] == case.final_ids


# -- logprobs --------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_step_that_chose_the_token(engine, reference):
    completion = run(engine, params(logprobs=3))
    assert list(completion.token_ids) == CASE.final_ids
    assert len(completion.logprobs) == 16
    model, canvas = reference(**CASE.build_args), [MASK_ID] * 16
    for step in engine.trace("one")["steps"]:
        log_p = torch.log_softmax(dense_logits(model, CASE.prompt_ids, canvas), dim=-1)
        for position, token in zip(step["pos"], step["ids"], strict=True):
            entry = completion.logprobs[position]
            best = log_p[position].topk(3)
            assert set(entry) == {token, *best.indices.tolist()}
            for candidate, logprob in entry.items():
                assert logprob.logprob == pytest.approx(float(log_p[position, candidate]), abs=LOGPROB_TOLERANCE)
            assert [entry[i].rank for i in best.indices.tolist()] == [1, 2, 3]
            canvas[position] = token
    assert canvas == CASE.final_ids
    total = sum(entry[token].logprob for entry, token in zip(completion.logprobs, canvas, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)


def test_logprobs_of_stop_and_suffix(engine):
    """Only one of two requests in the batch wants them; emitted: seven tokens, the suffix, the stop token."""
    from tests.engine.engines import case_params

    case = cases.load("h4_suffix_stop")
    engine.use(case.build_args)
    work = {"with": (prompt(case), case_params(case, logprobs=0)), "without": (prompt(case), case_params(case))}
    outputs = engine.run(work)
    completion = outputs["with"].outputs[0]
    assert list(completion.token_ids) == [*case.final_ids, EOT_ID]
    assert outputs["without"].outputs[0].logprobs is None
    own = [entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    chosen = {p: c for step in case.steps for p, c in zip(step["pos"], step["conf"], strict=True)}
    num_suffix = len(case.raw["suffix_ids"])
    assert own[case.stopped_at : -1] == [0.0] * num_suffix, "the suffix was given, not chosen"
    ranks = [entry[token].rank for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert ranks == [1] * case.stopped_at + [0] * num_suffix + [1], "greedy tokens are the first"
    for position, logprob in zip(range(case.stopped_at + 1), [*own[: case.stopped_at], own[-1]], strict=True):
        assert logprob == pytest.approx(math.log(chosen[position]), abs=LOGPROB_TOLERANCE)


def test_logprobs_change_nothing_and_take_little_memory(engine, monkeypatch):
    """Their requests' chunks are a quarter of the others', and nothing is copied in float64."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from vllm_dvlm.worker import logprobs

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else [out]
            largest = max([largest, *(x.untyped_storage().nbytes() for x in made if torch.is_tensor(x))])
            return out

    logits = torch.randn(40, 5000)
    with Largest():
        ids, values, ranks = logprobs.row_logprobs(logits, logits.argmax(dim=1), 5)
    assert 0 < largest <= logits.nbytes
    exact = torch.log_softmax(logits.double(), dim=-1).topk(5)
    assert torch.equal(ids[:, 1:], exact.indices.int()) and torch.allclose(values[:, 1:].double(), exact.values)
    assert torch.equal(ids[:, 0], ids[:, 1]) and ranks.tolist() == [1] * 40

    engine.use(CASE.build_args)
    monkeypatch.setattr(engine.sampler, "rows_per_chunk", 160)
    rows, original = [], engine.model.vocab_logits
    monkeypatch.setattr(engine.model, "vocab_logits", lambda hidden: rows.append(len(hidden)) or original(hidden))
    options = {"diffusion_canvas_length": 64, "diffusion_block_length": 64, "diffusion_max_steps": 4}
    work = {f"r{i}": (prompt(), params(max_tokens=64, extra_args=options, ignore_eos=True)) for i in range(3)}
    work["wants"] = (prompt(), params(max_tokens=64, extra_args=options, ignore_eos=True, logprobs=4))
    outputs = engine.run(work)
    assert rows[:4] == [160, 32, 40, 24]
    replies = [list(output.outputs[0].token_ids) for output in outputs.values()]
    assert replies == [replies[0]] * 4 and len(outputs["wants"].outputs[0].logprobs) == 64


@pytest.mark.parametrize("at_steps", [{1, 6}])
def test_logprobs_survive_a_preemption(engine, at_steps):
    engine.use(CASE.build_args)
    work = {"one": (prompt(), params(logprobs=3)), "other": (prompt(), params(logprobs=1))}
    found = []
    for preempted in (set(), at_steps):
        steps = iter(range(1, 100))
        outputs = engine.run(work, on_step=lambda s=steps, p=preempted: next(s) in p and engine.preempt_all())
        found.append({name: output.outputs[0].logprobs for name, output in outputs.items()})
    assert found[0] == found[1] and [len(entry) for entry in found[0]["one"]] == [3] * 16


# -- noise and remasking ---------------------------------------------------------------------------------------


def test_noise_depends_on_the_seed_alone(engine):
    engine.use(CASE.build_args)
    kinds = {
        "warm": {"temperature": 0.9},
        "random": {"extra_args": {"diffusion_remasking": "random"}},
        "both": {"temperature": 0.5, "extra_args": {"diffusion_remasking": "random", "diffusion_max_steps": 8}},
    }
    alone = {}
    for seed in (1, 2):
        for kind, changes in kinds.items():
            alone[f"{kind}{seed}"] = list(run(engine, params(seed=seed, **changes)).token_ids)
    filler = {"image": (prompt(cases.load("d2_blocks2_k1")), params(max_tokens=12))}
    work = {
        f"{kind}{seed}": (prompt(), params(seed=seed, **changes))
        for seed in (2, 1)
        for kind, changes in reversed(kinds.items())
    }
    together = engine.run({**filler, **work, "plain": (prompt(), params())})
    assert {name: list(together[name].outputs[0].token_ids) for name in work} == alone
    assert list(together["plain"].outputs[0].token_ids) == CASE.final_ids
    for kind in kinds:
        assert alone[f"{kind}1"] != alone[f"{kind}2"]


def test_several_samples_of_one_prompt_differ(engine):
    engine.use(CASE.build_args)
    outputs = engine.llm.generate(prompt(), params(n=3, temperature=1.0, seed=5), use_tqdm=False)
    replies = [tuple(completion.token_ids) for completion in outputs[0].outputs]
    assert len(set(replies)) == 3
    again = engine.llm.generate(prompt(), params(n=3, temperature=1.0, seed=5), use_tqdm=False)
    assert [tuple(completion.token_ids) for completion in again[0].outputs] == replies
    engine.finish()


def negative_entropy(p):
    return float((p[p > 0] * p[p > 0].log()).sum())


def margin(p):
    best, second = p.topk(2).values.tolist()
    return best - second


def dense_remasking(model, prompt_ids, confidence, canvas_len, block_len, num_steps):
    """The block loop with another confidence, one position at a time. Returns (tokens, positions per step)."""
    canvas, steps = [MASK_ID] * canvas_len, []
    for start in range(0, canvas_len, block_len):
        per_step = block_len * (canvas_len // block_len) // num_steps
        for _ in range(block_len // per_step):
            logits = dense_logits(model, prompt_ids, canvas)
            masked = [i for i in range(start, start + block_len) if canvas[i] == MASK_ID]
            scores = {i: confidence(logits[i].softmax(-1)) for i in masked}
            chosen = sorted(masked, key=lambda i, scores=scores: (-scores[i], i))[:per_step]
            for i in chosen:
                canvas[i] = int(logits[i].argmax())
            steps.append(sorted(chosen))
    return canvas, steps


@pytest.mark.parametrize(("name", "confidence"), [("entropy", negative_entropy), ("margin", margin)])
def test_other_confidences(engine, reference, name, confidence):
    options = {"diffusion_remasking": name, "diffusion_block_length": 8, "diffusion_max_steps": 8}
    reply = run(engine, params(extra_args=options), name=name)
    canvas, steps = dense_remasking(reference(**CASE.build_args), CASE.prompt_ids, confidence, 16, 8, 8)
    assert [step["pos"] for step in engine.trace(name)["steps"]] == steps
    assert list(reply.token_ids) == canvas
    plain = run(engine, params(extra_args=options | {"diffusion_remasking": "low_confidence"}), name="plain")
    assert [s["pos"] for s in engine.trace("plain")["steps"]] != steps or plain.token_ids != reply.token_ids


def test_positions_left_masked_wait_for_a_refresh(engine, reference):
    """Where the mask token is predicted, positions of finished blocks stay masked.

    A cached step does not compute them, so it must neither read nor write them (golden README, points 26 and 40).
    """
    from tests.engine.engines import case_params

    case = cases.load("k1_mask_token_predicted")
    filler = cases.load("e4_stop_text_k1")  # another request's rows stand before and behind in the batch
    engine.use(case.build_args)
    for interval in (2, 4, 32):
        options = {"diffusion_block_length": 4, "diffusion_refresh_interval": interval}
        name = f"interval{interval}"
        work = {f"before{interval}": (prompt(filler), case_params(filler))}
        work[name] = (prompt(case), case_params(case, extra_args=options))
        reply = engine.run(work)[name].outputs[0]
        oracle = dense(reference, case, block_length=4, refresh_interval=interval)
        ours = [(s["pos"], s["ids"], s["query_len"]) for s in engine.trace(name)["steps"]]
        assert ours == [(s["pos"], s["ids"], s["forward_len"]) for s in oracle.steps]
        assert list(reply.token_ids) == oracle.final_ids and MASK_ID in oracle.final_ids


# -- threshold -------------------------------------------------------------------------------------------------


def test_threshold_ends_although_the_mask_token_is_predicted(engine):
    """The reference need not end here (golden README, point 45): the mask token is forbidden after a while."""
    from tests.engine.engines import case_params

    case = cases.load("k1_mask_token_predicted")
    assert MASK_ID in case.final_ids
    options = {"diffusion_threshold": 1.0, "diffusion_block_length": 8}
    reply = run(engine, case_params(case, extra_args=options), case)
    assert len(reply.token_ids) == 16 and MASK_ID not in reply.token_ids
    steps = engine.trace("one")["steps"]
    assert len(steps) <= 2 * (8 + 8)
    assert any(MASK_ID in step["ids"] for step in steps), "the checkpoint does predict it"


def test_threshold_bounds_the_number_of_steps_by_confidence(engine, reference):
    passes = {}
    for threshold in (0.01, 1.0, 4.0):
        reply = run(engine, params(extra_args={"diffusion_threshold": threshold}))
        oracle = dense(reference, threshold=threshold)
        assert list(reply.token_ids) == oracle.final_ids
        passes[threshold] = engine.trace("one")["num_forward_passes"]
        assert passes[threshold] == len(oracle.steps)
    assert passes[0.01] > passes[1.0] > passes[4.0]
