"""Every recorded run of the original code, through the real engine: alone and in mixed batches.

Source of the expectations: tests/golden/llada_v/README.md ('Tolerance to expect').
"""

import itertools

import pytest

from tests.golden import cases
from vllm_dvlm.synthetic.tiny_checkpoint import content_digest

CONFIDENCE_TOLERANCE = 5e-4
RECORDED = cases.by_mode("plain", "fast_dllm")
GUIDED = [case for case in RECORDED if case.uses_guidance]
PRUNED = cases.by_mode("redvtp")  # run in test_pruning.py


def by_checkpoint(case):
    return sorted(case.build_args.items())


# In order of their checkpoints, so that the engine changes its weights once per checkpoint.
DECODED = sorted((case for case in RECORDED if not case.uses_guidance), key=by_checkpoint)
BATCHES = [list(group) for _, group in itertools.groupby(DECODED, key=by_checkpoint)]
MIXED = [batch for batch in BATCHES if len(batch) > 1]


def batch_name(batch):
    return "-".join(f"{key}={value}" for key, value in by_checkpoint(batch[0]))


def as_recorded(engine, case, output):
    """Asserts output, trace and text of one finished request."""
    from tests.engine.engines import case_tokens, tokens

    assert tokens(output) == case_tokens(case)
    assert output.outputs[0].finish_reason == ("length" if case.stopped_at is None else "stop")
    assert output.outputs[0].text == case.raw["final_text"]
    assert len(output.prompt_token_ids) == case.prompt_len
    trace = engine.trace(case.name)
    assert trace["prompt_len"] == case.prompt_len
    assert [tuple(span) for span in trace["visual_spans"]] == case.visual_spans
    assert [step["pos"] for step in trace["steps"]] == [step["pos"] for step in case.steps]
    assert [step["ids"] for step in trace["steps"]] == [step["ids"] for step in case.steps]
    for ours, theirs in zip(trace["steps"], case.steps, strict=True):
        assert ours["conf"] == pytest.approx(theirs["conf"], rel=0, abs=CONFIDENCE_TOLERANCE)
    computed = [[1, step["query_len"]] for step in trace["steps"]]
    assert computed == case.raw["forward_shapes"]
    total = case.prompt_len + case.settings["gen_length"] + len(case.raw["suffix_ids"])
    assert {step["seq_len"] for step in trace["steps"]} == {total}
    assert [step["refresh"] for step in trace["steps"]] == [length == total for _, length in computed]
    assert {step["kv_blocks"] for step in trace["steps"]} == {-(-total // engine.kv_block_size)}
    assert trace["final_ids"] == case.final_ids
    assert trace["stopped_at"] == case.stopped_at
    assert trace["num_forward_passes"] == case.raw["num_forward_passes"]
    assert trace["pruning"] is None


def request(case):
    from tests.engine.engines import case_params, case_prompt

    # The recorded text shows special tokens, for example a mask token that was predicted.
    return case_prompt(case), case_params(case, skip_special_tokens=False)


def test_which_cases_are_run():
    assert [case.name for case in cases.all_cases() if case.is_informative] == ["f7_redvtp_two_images_informative"]
    assert [case.name for case in GUIDED] == ["j1_cfg", "j2_cfg_text_blocks"]
    assert {case.name[0] for case in DECODED} == set("abcdeghikl")
    assert len(DECODED) == 39 and len(PRUNED) == 7


@pytest.mark.parametrize("batch", BATCHES, ids=batch_name)
def test_checkpoint_is_the_recorded_one(batch, checkpoint):
    from safetensors.torch import load_file

    tensors = load_file(checkpoint(**batch[0].build_args) / "model.safetensors")
    assert content_digest(tensors) in (cases.FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", DECODED, ids=lambda case: case.name)
def test_alone(engine, case):
    engine.use(case.build_args)
    as_recorded(engine, case, engine.run({case.name: request(case)})[case.name])


@pytest.mark.parametrize("batch", MIXED, ids=batch_name)
def test_all_of_a_checkpoint_together(engine, batch):
    engine.use(batch[0].build_args)
    outputs = engine.run({case.name: request(case) for case in batch})
    for case in batch:
        as_recorded(engine, case, outputs[case.name])


def test_eight_in_one_step(engine):
    """Other lengths, blocks, steps, cache and threshold modes, suffix, images: all in the same forward pass."""
    names = ["a2_text_blocks_k2", "b4_image_after_text", "c2_steps_not_dividing", "d1_blocks4_k2"]
    names += ["g3_fast_r32_none", "g5_fast_r8_thr1", "h2_suffix_blocks_text", "i3_one_image_pad"]
    batch = [cases.load(name) for name in names]
    engine.use(batch[0].build_args)
    together = []
    outputs = engine.run(
        {case.name: request(case) for case in batch}, on_step=lambda: together.append(len(engine.scheduler.running))
    )
    assert together[0] == 8
    for case in batch:
        as_recorded(engine, case, outputs[case.name])


def test_switching_weights_is_exact(engine):
    """The shared engine gives, bit for bit, the confidences it gave before it held other weights."""
    first, other = cases.load("b1_image_steps_eq_gen"), cases.load("b5_same_as_g1")

    def confidences(case):
        engine.run_case(case)
        return [step["conf"] for step in engine.trace(case.name)["steps"]]

    before = confidences(first)
    assert confidences(other) != before  # same prompt, same image, other weights
    assert confidences(first) == before


def test_generate_takes_a_batch(engine):
    """``LLM.generate``, as a user calls it."""
    from tests.engine.engines import case_params, case_prompt, case_tokens, tokens

    batch = [cases.load("a1_text_single_block"), cases.load("d2_blocks2_k1")]
    engine.use(batch[0].build_args)
    prompts, params = zip(*((case_prompt(c), case_params(c)) for c in batch), strict=True)
    outputs = engine.llm.generate(list(prompts), list(params), use_tqdm=False)
    assert [tokens(output) for output in outputs] == [case_tokens(case) for case in batch]
    engine.finish()


@pytest.mark.parametrize("case", GUIDED, ids=lambda case: case.name)
def test_guidance_is_refused(engine, case):
    engine.use(case.build_args)
    with pytest.raises(ValueError, match="diffusion_cfg_scale.*not supported yet.*leave it at 0"):
        engine.run({case.name: request(case)})
    assert not engine.engine.has_unfinished_requests()
