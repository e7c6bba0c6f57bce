"""A prompt that is computed once and pruned in its KV cache, beside what else may share its batch.

Truth is the dense reference with the mask "key < P or query >= P" (``pruned_reference``, ``lavida_loops``).
"""

import functools
import itertools

import pytest

from tests.engine import pruned_reference
from tests.engine.pruned_checks import assert_as_dense, conserved
from tests.golden import lavida_cases as cases
from vllm_dvlm.reference.lavida_loops import LavidaOptions, lean_loop
from vllm_dvlm.reference.lavida_model import LavidaModel
from vllm_dvlm.synthetic import tiny_lavida
from vllm_dvlm.synthetic.lavida_files import LLADA

PICTURE, TEXT = cases.load("fim_img_half"), cases.load("text_prefix")
LENGTH = 12
STEPS = {"diffusion_canvas_length": LENGTH, "diffusion_max_steps": 6}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    from tests.engine.engines import Engine

    folder = tiny_lavida.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints", LLADA)
    made = Engine(lambda **_: folder, tmp_path_factory.mktemp("traces"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(engine):
    return LavidaModel.load(engine.folder)


@pytest.fixture(scope="module")
def prompt_of(model):
    @functools.cache
    def merge(name):
        case = cases.load(name)
        features = model.image_features([cases.image(case)]) if case.image_record else None
        return model.merge(case.prompt_ids) if features is None else model.merge(case.prompt_ids, features)

    return lambda case: merge(case.name)


def request(case=PICTURE, max_tokens=LENGTH, ignore_eos=True, **options):
    from vllm import SamplingParams

    prompt = {"prompt": case.prompt_text}
    if case.image_record is not None:
        prompt["multi_modal_data"] = {"image": cases.image(case)}
    extra_args = {**STEPS, "diffusion_trace": 1, **options}
    return prompt, SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos, seed=7, extra_args=extra_args
    )


PRUNED = [
    {"prune_method": "redvtp", "prune_keep_ratio": keep, "prune_positions": positions}
    for keep in (0.5, 0.25)
    for positions in ("renumber", "keep")
] + [
    {"prune_method": "redvtp", "prune_rows": "response_prompt"},
    {"prune_method": "fastv"},
    {"prune_method": "fastv", "prune_layer": 1, "prune_keep_ratio": 0.25, "prune_positions": "keep"},
    {"prune_method": "fastv", "prune_layer": 3, "prune_rows": "all"},
]


def dense(model, prompt, options, **more):
    return pruned_reference.decode(model, prompt, STEPS | options, is_prefix=True, forbidden=(), **more)


@pytest.mark.parametrize("options", PRUNED, ids=lambda options: "-".join(map(str, options.values())))
def test_pruned_prefix_is_as_dense(engine, model, prompt_of, options):
    """Importance from the first forward pass, kept KV rows moved together, blocks freed in that step."""
    blocks = []
    output = engine.run({"alone": request(**options)}, on_step=lambda: blocks.append(engine.num_held_blocks))["alone"]
    assert_as_dense(engine, "alone", output, dense(model, prompt_of(PICTURE), options))
    trace = engine.trace("alone")
    lengths = [step["query_len"] for step in trace["steps"]]
    assert lengths == [PICTURE.prompt_len + LENGTH] + [LENGTH] * 5, "the prompt is computed once"
    after = -(-(PICTURE.prompt_len - trace["pruning"]["num_visual"] + trace["pruning"]["keep_count"] + LENGTH) // 32)
    assert blocks[0] == blocks[-2] == after, "blocks are free from the first step on"
    assert not engine.model_state.slots


@pytest.mark.parametrize("positions", ["renumber", "keep"])
def test_pruned_prefix_is_as_the_lean_loop(engine, model, prompt_of, positions):
    options = LavidaOptions(LENGTH, max_steps=6, prune_keep_ratio=0.5, prune_positions=positions)
    expected = lean_loop(model, prompt_of(PICTURE), options)
    output = engine.run({"alone": request(prune_method="redvtp", prune_positions=positions)})["alone"]
    assert list(output.outputs[0].token_ids) == expected.final_ids
    assert engine.trace("alone")["pruning"]["kept_local_indices"] == expected.kept_local_indices


def test_prompt_embeddings_do_not_outlive_their_use(engine):
    held = []

    def look():
        held.extend(slot.prompt_embeds for slot in engine.model_state.slots.values())

    engine.run({"prefix": request(), "pruned": request(prune_method="redvtp")}, on_step=look)
    assert held and all(embeds is None for embeds in held)


MIXED = {
    "prefix": {},
    "full": {"diffusion_attention": "full"},
    "cached": {"diffusion_attention": "full", "diffusion_refresh_interval": 4},
    "threshold": {"diffusion_threshold": 1.0},
    "blocks": {"diffusion_block_length": 4},
    "schedule": {"diffusion_schedule": "shift", "diffusion_schedule_shift": 0.5},
    "draft": {"diffusion_draft": "so <mask:5> it"},
    "redvtp": {"prune_method": "redvtp"},
    "fastv": {"prune_method": "fastv", "prune_keep_ratio": 0.25},
    "random": {"prune_method": "random"},
    "uniform": {"prune_method": "uniform", "prune_keep_ratio": 0.1},
    "diversity": {"prune_method": "diversity"},
    "pruned full": {"prune_method": "redvtp", "diffusion_attention": "full"},
}


def test_everything_in_one_batch(engine):
    """Every request gives the tokens that it gives alone; no KV block is lost or owned twice."""
    work = {
        f"{name} {case.name}": request(case, **options) for name, options in MIXED.items() for case in (PICTURE, TEXT)
    }
    alone = {name: engine.run({name: one})[name].outputs[0].token_ids for name, one in work.items()}
    together = engine.run(work, on_step=conserved(engine))
    assert {name: output.outputs[0].token_ids for name, output in together.items()} == alone
    pictures = {name: tokens for name, tokens in alone.items() if PICTURE.name in name}
    assert len({tuple(tokens) for tokens in pictures.values()}) > 6, "the settings do something"


@pytest.mark.parametrize("at_step", [1, 4])
def test_a_preempted_prefix_request_keeps_its_tokens(engine, at_step):
    """Its prompt's KV is computed again."""
    work = {"picture": request(), "text": request(TEXT), "full": request(diffusion_attention="full")}
    undisturbed = {name: list(output.outputs[0].token_ids) for name, output in engine.run(work).items()}
    steps = itertools.count(1)

    def disturb():
        if next(steps) == at_step:
            assert engine.preempt_all() == 3

    outputs = engine.run(work, on_step=disturb)
    assert {name: list(output.outputs[0].token_ids) for name, output in outputs.items()} == undisturbed
    lengths = [step["query_len"] for step in engine.trace("picture")["steps"]]
    assert lengths.count(PICTURE.prompt_len + LENGTH) == 2


def test_a_preempted_pruned_prefix_request_goes_on_with_its_survivors(engine, model, prompt_of):
    options, steps = {"prune_method": "redvtp"}, itertools.count(1)
    outputs = engine.run(
        {"alone": request(**options)}, on_step=lambda: engine.preempt_all() if next(steps) == 3 else None
    )
    expected = dense(model, prompt_of(PICTURE), options, refresh_also=[3])
    assert_as_dense(engine, "alone", outputs["alone"], expected)


def test_the_reply_ends_at_the_end_of_turn(engine):
    """Nothing stops decoding inside the canvas; a user sees what lies before the first end token."""
    whole = engine.run({"whole": request()})["whole"].outputs[0]
    stop = whole.token_ids[5]
    cut = engine.run({"cut": request()[:1] + (stopping(stop),)})["cut"].outputs[0]
    end = list(whole.token_ids).index(stop) + 1
    assert list(cut.token_ids) == list(whole.token_ids)[:end]
    assert (cut.finish_reason, whole.finish_reason) == ("stop", "length")


def stopping(token_id):
    params = request()[1].clone()
    params.stop_token_ids = [token_id]
    return params


def test_refused(engine):
    for options, message in (
        ({"diffusion_refresh_interval": 4}, "the prompt's KV is exact for the whole request"),
        ({"diffusion_suffix": "so"}, "LaViDa-LLaDA has none"),
        ({"diffusion_top_k": 5}, "takes all tokens into account"),
        ({"diffusion_draft": [1] * 13}, "does not fit the canvas of 12"),
        ({"diffusion_draft": [126350]}, "contains id 126350"),
        ({"diffusion_threshold": 1.0, "diffusion_step_ratio": 0.5}, "leave out diffusion_schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.run_one(*request(**options))
    with pytest.raises(ValueError, match="top_k"):
        prompt, params = request()
        params.temperature, params.top_k = 1.0, 5
        engine.run_one(prompt, params)
    engine.assert_idle()
