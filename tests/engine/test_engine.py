"""Many requests in one engine: arriving, finishing, aborting, preempted, sharing budget, memory and caches."""

import itertools
import random

import pytest

from tests.golden import cases

TEXT, IMAGE, BLOCKS = "a1_text_single_block", "b1_image_steps_eq_gen", "d2_blocks2_k1"
SUFFIX, CACHED, CACHED_THRESHOLD = "h1_suffix", "g12_fast_k2_r8_none", "g8_fast_blocks_r4_thr1"


SUFFIX_TEXT, SUFFIX_LEN = cases.load("h4_suffix_stop").settings["generation_suffix"], 6


def request(name, **changes):
    from tests.engine.engines import case_params, case_prompt

    case = cases.load(name)
    return case_prompt(case), case_params(case, **changes)


def expected(*names):
    from tests.engine.engines import case_tokens

    return {name: case_tokens(cases.load(name)) for name in names}


def tokens_of(outputs):
    return {request_id: list(output.outputs[0].token_ids) for request_id, output in outputs.items()}


def spy(monkeypatch, holder, name, size=lambda *args, **kwargs: 1):
    """Let calls pass and record the size of each."""
    calls, original = [], getattr(holder, name)

    def recording(*args, **kwargs):
        calls.append(size(*args, **kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(holder, name, recording)
    return calls


# -- churn -----------------------------------------------------------------------------------------------------


def random_request(rng):
    """A prompt of random words, now and then with an image, and options in any combination that is allowed."""
    from vllm import SamplingParams

    canvas = rng.choice([4, 6, 8, 12, 16])
    block = rng.choice([b for b in range(2, canvas + 1) if canvas % b == 0])
    num_blocks = canvas // block
    options = {
        "diffusion_canvas_length": canvas,
        "diffusion_block_length": block,
        "diffusion_max_steps": num_blocks * rng.randint(1, block + 1),
        "diffusion_refresh_interval": rng.choice([1, 1, 2, 32]),
        "diffusion_remasking": rng.choice(["low_confidence"] * 4 + ["random", "entropy", "margin"]),
    }
    if rng.random() < 0.25:
        options["diffusion_threshold"] = rng.choice([0.5, 1, 4])
    if rng.random() < 0.2:
        options["diffusion_suffix"] = SUFFIX_TEXT
    params = SamplingParams(
        temperature=rng.choice([0, 0, 0, 0.7]),
        seed=rng.randrange(1000),
        max_tokens=rng.choice([canvas, canvas, rng.randint(1, canvas)]),
        # Words that the tiny model says often.
        stop_token_ids=rng.choice([[], [], [271], [920, 403, 702]]),
        ignore_eos=rng.random() < 0.2,
        extra_args=options,
    )
    if rng.random() < 0.08:
        return {"prompt": "<image>\nWhat is this?", "multi_modal_data": {"image": small_image()}}, params
    return {"prompt_token_ids": [rng.randrange(300, 900) for _ in range(rng.randint(1, 90))]}, params


def small_image():
    from PIL import Image

    with Image.open(cases.IMAGE_FOLDER / "tall_60x300.png") as image:
        return image.convert("RGB")


def test_churn_frees_everything(engine):
    engine.use({"seed": 0})
    rng = random.Random(7)
    waiting = {f"r{i}": random_request(rng) for i in range(120)}
    work = dict(waiting)
    live, aborted, done, most = {}, set(), {}, 0
    pool = engine.scheduler.kv_cache_manager.block_pool
    while waiting or live:
        for request_id in list(waiting)[: rng.choice([0, 0, 1, 2, 9])]:
            # The internal id, which aborts take here, is the one with a random ending.
            live[request_id] = engine.engine.add_request(request_id, *waiting.pop(request_id))
        if live and rng.random() < 0.15:
            request_id = rng.choice(list(live))
            engine.engine.abort_request([live.pop(request_id)], internal=True)
            aborted.add(request_id)
        for output in engine.engine.step():
            if output.finished and output.request_id in live:
                done[output.request_id] = output
                del live[output.request_id]
        most = max(most, len(engine.scheduler.running))
        assert pool.get_num_free_blocks() + engine.num_held_blocks == engine.num_idle_blocks, "lost or freed twice"
    engine.finish()
    engine.assert_idle()
    assert len(done) + len(aborted) == 120 and len(aborted) >= 10
    assert most == engine.scheduler.max_num_running_reqs
    for request_id, output in done.items():
        (completion,) = output.outputs
        params = work[request_id][1]
        canvas = params.extra_args["diffusion_canvas_length"]
        if completion.finish_reason == "length" and params.max_tokens < canvas:
            assert len(completion.token_ids) == params.max_tokens
        elif completion.finish_reason == "length":
            suffix_len = SUFFIX_LEN * ("diffusion_suffix" in params.extra_args)
            assert len(completion.token_ids) == canvas + suffix_len
        else:
            assert completion.token_ids[-1] in [126348, *params.stop_token_ids]
    # Whoever else was there, and wherever the others' blocks were: the same tokens as alone.
    sample = rng.sample(sorted(done), 12)
    alone = {request_id: engine.run({request_id: work[request_id]})[request_id] for request_id in sample}
    assert tokens_of(alone) == tokens_of({request_id: done[request_id] for request_id in sample})


# -- preemption ------------------------------------------------------------------------------------------------


def preempting(engine, at_steps):
    """For ``Engine.run``: preempts all running requests after these steps; the list of how many that were."""
    counts, steps = [], iter(range(1, 1000))

    def after_step():
        if next(steps) in at_steps and engine.scheduler.running:
            counts.append(engine.preempt_all())

    return counts, after_step


def test_preemption_changes_no_token_in_exact_mode(engine):
    engine.use({"seed": 0})
    noisy = {"temperature": 0.8, "seed": 3, "extra_args": {"diffusion_remasking": "random"}}
    names = [TEXT, IMAGE, BLOCKS, SUFFIX]
    work = {name: request(name) for name in names} | {"noisy": request(TEXT, **noisy)}
    undisturbed = engine.run(work)
    traces = {name: engine.trace(name) for name in names}
    assert tokens_of(undisturbed) | expected(*names) == tokens_of(undisturbed)
    counts, after_step = preempting(engine, {1, 4, 5, 11})
    disturbed = engine.run(work, on_step=after_step)
    assert counts == [5, 5, 5, 5]
    assert tokens_of(disturbed) == tokens_of(undisturbed)
    for name in names:
        again = engine.trace(name)
        assert [step["pos"] for step in again["steps"]] == [step["pos"] for step in traces[name]["steps"]]
        assert again["num_forward_passes"] == cases.load(name).raw["num_forward_passes"]


def test_preemption_with_a_cache_finishes(engine):
    """The prompt's KV is computed anew, from a newer canvas than the plan says, so tokens may differ; nothing hangs."""
    engine.use({"seed": 0})
    counts, after_step = preempting(engine, {3, 7})
    outputs = engine.run({name: request(name) for name in (CACHED, CACHED_THRESHOLD)}, on_step=after_step)
    assert counts == [2, 2]
    assert [len(tokens) for tokens in tokens_of(outputs).values()] == [16, 16]
    trace = engine.trace(CACHED)
    # After each of the two preemptions one full forward more than planned (steps 0 and 4 begin blocks).
    assert [i for i, step in enumerate(trace["steps"]) if step["refresh"]] == [0, 3, 4, 7]


def test_preempted_before_its_images_were_merged(engine):
    """A request that waits for budget is not running; one preempted after step 1 gets its images again."""
    engine.use({"seed": 0})
    engine.engine.reset_encoder_cache()
    engine.engine.reset_mm_cache()
    counts, after_step = preempting(engine, {1, 2})
    outputs = engine.run({IMAGE: request(IMAGE)}, on_step=after_step)
    assert counts == [1, 1]
    assert tokens_of(outputs) == expected(IMAGE)


# -- token budget ----------------------------------------------------------------------------------------------


def test_no_step_is_cut_to_the_token_budget(engine, monkeypatch):
    """Five prompts of about 1,000 tokens and one of 3,700, all recomputing everything, in steps of 4,096 tokens."""
    engine.use({"seed": 0})
    monkeypatch.setattr(engine.scheduler, "max_num_scheduled_tokens", engine.scheduler.max_model_len)
    names = [IMAGE, BLOCKS, SUFFIX, "c1_steps_lt_gen", "l1_big_image_downsampled", CACHED]
    in_step = []
    schedule = engine.scheduler.schedule

    def counting(*args, **kwargs):
        output = schedule(*args, **kwargs)
        in_step.append(output.num_scheduled_tokens)
        return output

    monkeypatch.setattr(engine.scheduler, "schedule", counting)
    outputs = engine.run({name: request(name) for name in names})
    assert tokens_of(outputs) == expected(*names)
    # It was tight: at some time requests had to wait for their turn, and no step exceeded the budget.
    assert max(sum(step.values()) for step in in_step) <= 4096
    waited = [step for step in in_step if 0 < len(step) < 3]
    assert len(waited) > 10
    for name in names:
        lengths = [[1, step["query_len"]] for step in engine.trace(name)["steps"]]
        assert lengths == cases.load(name).raw["forward_shapes"]


def test_refreshes_that_coincide_take_turns(engine, monkeypatch):
    """Four requests refresh in step 4 of the engine, and so do four that came a step later: twice the budget."""
    engine.use({"seed": 0})
    early, late = request(CACHED), request(CACHED, extra_args={"diffusion_refresh_interval": 3})
    alone = engine.run({"early": early, "late": late})
    monkeypatch.setattr(engine.scheduler, "max_num_scheduled_tokens", engine.scheduler.max_model_len)
    work = {f"early{i}": early for i in range(4)} | {f"late{i}": late for i in range(4)}
    steps = spy(monkeypatch, engine.scheduler, "update_from_output", lambda output, *_: output.num_scheduled_tokens)
    running = []
    outputs = engine.run(work, on_step=lambda: running.append(len(engine.scheduler.running)))
    assert max(sum(step.values()) for step in steps) <= 4096
    assert any(0 < len(step) < num for step, num in zip(steps[1:], running, strict=False)), "somebody had to wait"
    for name, output in outputs.items():
        assert list(output.outputs[0].token_ids) == list(alone[name[:-1]].outputs[0].token_ids)
        shapes = [[step["query_len"] for step in engine.trace(i)["steps"]] for i in (name, name[:-1])]
        assert shapes[0] == shapes[1]


def test_who_is_held_back_is_next_and_nobody_gets_in_before(engine, monkeypatch):
    """Refreshes of two groups coincide beyond the budget while new requests keep coming."""
    engine.use({"seed": 0})
    early, late = request(CACHED), request(CACHED, extra_args={"diffusion_refresh_interval": 3})
    scheduler, schedule = engine.scheduler, engine.scheduler.schedule
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", scheduler.max_model_len)
    held_at = []

    def watched(*args, **kwargs):
        # Finished requests have left by now: what runs is what the scheduler looks at, oldest first.
        running = [(r.request_id, r.num_tokens_with_spec - r.num_computed_tokens) for r in scheduler.running]
        num_waiting = len(scheduler.waiting)
        output = schedule(*args, **kwargs)
        fitting, budget = [], scheduler.max_num_scheduled_tokens
        for name, need in running:
            if need <= budget:
                fitting.append(name)
                budget -= need
        scheduled, before = [*output.num_scheduled_tokens], {name for name, _ in running}
        assert [name for name in scheduled if name in before] == fitting
        held = before.difference(fitting)
        if held:
            assert before.issuperset(scheduled), "admitted although somebody had to wait"
        held_at.append((held, num_waiting))
        return output

    monkeypatch.setattr(scheduler, "schedule", watched)
    for name, (prompt, params) in (
        {f"early{i}": early for i in range(4)} | {f"late{i}": late for i in range(4)}
    ).items():
        engine.add(name, prompt, params)
    coming = iter([(f"text{i}", request(TEXT)) for i in range(20)])

    def one_more():
        for name, (prompt, params) in itertools.islice(coming, 1):
            engine.add(name, prompt, params)

    outputs = engine.finish(one_more)
    engine.assert_idle()
    assert len(outputs) >= 8
    assert any(held and num_waiting for held, num_waiting in held_at), "nobody had to wait beside newcomers"
    for (held, _), (held_next, _) in itertools.pairwise(held_at):
        assert not held & held_next, "waited for more than one step"


def test_holding_back_is_linear(engine, monkeypatch):
    """Every running request is looked at once, however many there are."""
    looked_at = []

    class Running:
        num_computed_tokens, next_decode_eligible_step = 0, 0

        @property
        def num_tokens_with_spec(self):
            looked_at.append(self)
            return 1000

    many = [Running() for _ in range(500)]
    monkeypatch.setattr(engine.scheduler, "running", many)
    assert engine.scheduler._hold_back_what_does_not_fit()
    assert looked_at == many
    held = [r for r in many if r.next_decode_eligible_step == engine.scheduler.current_step + 2]
    assert held == many[engine.scheduler.max_num_scheduled_tokens // 1000 :]


def test_engine_and_worker_sleep_while_they_wait(engine):
    from vllm.distributed.device_communicators import shm_broadcast

    from vllm_dvlm.patches.vllm import p004_waits_that_sleep

    engine.use(cases.load("a1_text_single_block").build_args)
    assert shm_broadcast.sched_yield is p004_waits_that_sleep.rest


def test_requests_that_do_not_fit_the_kv_pool_wait(engine):
    """Ten requests of 31 KV blocks in a pool of 255: eight at a time, and none takes a step with fewer blocks."""
    engine.use({"seed": 0})
    running = []
    outputs = engine.run(
        {f"r{i}": request(CACHED) for i in range(10)}, on_step=lambda: running.append(len(engine.scheduler.running))
    )
    assert max(running) == 8
    assert running.count(2) == cases.load(CACHED).raw["num_forward_passes"] - 1  # the last two, after the others
    assert set(map(tuple, tokens_of(outputs).values())) == {tuple(expected(CACHED)[CACHED])}


# -- memory and caches -----------------------------------------------------------------------------------------


def test_logits_come_in_bounded_chunks(engine, monkeypatch):
    engine.use({"seed": 0})
    names = [TEXT, BLOCKS, SUFFIX]
    work = {name: request(name) for name in names}
    whole = engine.run(work)
    confidences = {name: [step["conf"] for step in engine.trace(name)["steps"]] for name in names}
    monkeypatch.setattr(engine.sampler, "rows_per_chunk", 3)
    rows = spy(monkeypatch, engine.model, "vocab_logits", len)
    chunked = engine.run(work)
    assert max(rows) == 3
    assert tokens_of(chunked) == tokens_of(whole) == expected(*names)
    for name in names:
        for step, before in zip(engine.trace(name)["steps"], confidences[name], strict=True):
            assert step["conf"] == pytest.approx(before, rel=0, abs=1e-6)


def test_logits_only_of_masked_rows_of_the_block(engine, monkeypatch):
    """Two blocks of six, one position per step: 6 + 5 + ... + 1 rows, twice."""
    engine.use({"seed": 0})
    rows = spy(monkeypatch, engine.model, "vocab_logits", len)
    engine.run({BLOCKS: request(BLOCKS)})
    assert sum(rows) == 2 * sum(range(1, 7))


def test_same_image_is_processed_and_encoded_once(engine, monkeypatch):
    from vllm_dvlm.checkpoint import processing

    engine.use({"seed": 0})
    engine.engine.reset_encoder_cache()
    engine.engine.reset_mm_cache()
    processed = spy(monkeypatch, processing, "preprocess")
    encoded = spy(monkeypatch, engine.model, "embed_multimodal")
    assert tokens_of(engine.run({IMAGE: request(IMAGE)})) == expected(IMAGE)
    assert (len(processed), len(encoded)) == (1, 1)
    # Another question about the same picture, then two at once.
    engine.run({"another": request("c2_steps_not_dividing")})
    engine.run({"one": request(IMAGE), "two": request(SUFFIX)})
    assert (len(processed), len(encoded)) == (1, 1)
    engine.run({"other": request(BLOCKS)})
    assert (len(processed), len(encoded)) == (2, 2)
