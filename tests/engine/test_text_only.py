"""Text-only mode: no image is allowed, no tower is built, and the tokens are those of the full model."""

import pytest

from tests.golden import cases

TEXT = [case for case in cases.by_mode("plain", "fast_dllm") if not case.image_records and not case.uses_guidance]
IMAGE = cases.load("b1_image_steps_eq_gen")


@pytest.fixture(
    scope="module",
    params=[{"limit_mm_per_prompt": {"image": 0}}, {"limit_mm_per_prompt": {}, "language_model_only": True}],
    ids=["limit 0", "language model only"],
)
def text_only(request, checkpoint, tmp_path_factory):
    from tests.engine.engines import Engine

    made = Engine(checkpoint, tmp_path_factory.mktemp("traces"), **request.param)
    yield made
    made.close()


def test_text_is_as_recorded(text_only):
    """Alone and in company, exact and cached, with suffix and stops, on every recorded checkpoint."""
    from tests.engine.engines import case_params, case_prompt, case_tokens, tokens

    assert len(TEXT) >= 8 and {case.name[0] for case in TEXT} >= set("aeh")
    assert not text_only.model_state.supports_mm_inputs
    for build_args in sorted({tuple(sorted(case.build_args.items())) for case in TEXT}):
        batch = [case for case in TEXT if tuple(sorted(case.build_args.items())) == build_args]
        text_only.use(dict(build_args))
        work = {case.name: (case_prompt(case), case_params(case)) for case in batch}
        together = text_only.run(work)
        text_only.run_one(*work[batch[0].name])
        for case in batch:
            assert tokens(together[case.name]) == case_tokens(case), case.name
            trace = text_only.trace(case.name)
            assert [step["pos"] for step in trace["steps"]] == [step["pos"] for step in case.steps]
            assert trace["images"] == [] and trace["num_forward_passes"] == case.raw["num_forward_passes"]


def test_a_preempted_request_goes_on(text_only):
    from tests.engine.engines import case_params, case_prompt, case_tokens, tokens

    case = cases.load("a1_text_single_block")
    text_only.use(case.build_args)
    steps = iter(range(100))
    output = text_only.run(
        {"one": (case_prompt(case), case_params(case))},
        on_step=lambda: next(steps) in (0, 5) and text_only.preempt_all(),
    )["one"]
    assert tokens(output) == case_tokens(case)


def test_images_are_refused(text_only):
    from vllm.exceptions import VLLMValidationError

    from tests.engine.engines import case_params, case_prompt, tokens

    params = case_params(IMAGE)
    # VLLMValidationError is a ValueError, and HTTP 400.
    with pytest.raises(VLLMValidationError, match="text-only mode.*limit-mm-per-prompt"):
        text_only.llm.generate(case_prompt(IMAGE), params, use_tqdm=False)
    chat = [{"role": "user", "content": [{"type": "image_pil", "image_pil": cases.images(IMAGE)[0]}]}]
    with pytest.raises(VLLMValidationError, match="[Aa]t most 0 image"):
        text_only.llm.chat(chat, params, use_tqdm=False)
    image_token_id = text_only.engine.renderer.image_token_id
    for prompt in ({"prompt": "<image>\nWhat is this?"}, {"prompt_token_ids": [300, image_token_id, 301]}):
        with pytest.raises(VLLMValidationError, match="1 image placeholder.*0 image"):
            text_only.llm.generate(prompt, params, use_tqdm=False)
    case = cases.load("a1_text_single_block")
    text_only.use(case.build_args)
    assert tokens(text_only.run_one(case_prompt(case), case_params(case))) == case.final_ids


def test_the_tower_takes_no_memory(text_only):
    assert not any(name.startswith("vision") for name, _ in text_only.model.named_parameters())
