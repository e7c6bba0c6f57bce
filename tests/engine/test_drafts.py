"""A canvas that begins with given tokens: they are never changed, and what is between them is filled."""

import pytest

from tests.engine import pruned_reference
from tests.engine.pruned_checks import assert_as_dense, prompt_of, request
from tests.golden import cases

BASE = cases.load("f1_redvtp_keep25")
MASK = pruned_reference.MASK_ID
WORDS = [300, 301, 302, 303, 304]
DRAFTS = {
    "prefix": WORDS[:3],
    "gap": [WORDS[0], MASK, MASK, WORDS[1], WORDS[2], MASK, WORDS[3]],
    "a whole block": [*WORDS[:4], MASK, WORDS[4]],
    "the second block": [MASK, *WORDS[:3], *WORDS[:4], MASK],
}
SETTINGS = {
    "exact": {},
    "blocks": {"diffusion_block_length": 4, "diffusion_max_steps": 8},
    "cached": {"diffusion_block_length": 4, "diffusion_refresh_interval": 3},
    "threshold": {"diffusion_threshold": 1.0},
    "pruned": {"prune_method": "redvtp"},
    # Before the first block lie positions of the canvas whose KV is read until the next refresh.
    "pruned, cached": {"prune_method": "redvtp", "diffusion_block_length": 4, "diffusion_refresh_interval": 2},
    "pruned, old angles": {
        "prune_method": "redvtp",
        "prune_positions": "keep",
        "diffusion_block_length": 4,
        "diffusion_refresh_interval": 3,
    },
    "pruned inside": {
        "prune_method": "fastv",
        "prune_layer": 2,
        "diffusion_block_length": 4,
        "diffusion_refresh_interval": 3,
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", DRAFTS)
def test_as_dense(engine, reference, setting, name):
    engine.use({"seed": 0})
    draft, options = DRAFTS[name], {"diffusion_canvas_length": 16, **SETTINGS[setting]}
    dense = pruned_reference.decode(reference(seed=0), prompt_of(reference(seed=0), BASE), options, draft=draft)
    output = engine.run({"alone": request(BASE, diffusion_draft=draft, **options)})["alone"]
    assert_as_dense(engine, "alone", output, dense, pruned="pruned" in setting)
    kept = [(i, token) for i, token in enumerate(draft) if token != MASK]
    assert [(i, output.outputs[0].token_ids[i]) for i, _ in kept] == kept


def test_text_and_ids_are_the_same(engine):
    engine.use({"seed": 0})
    text = "It is a <mask:3> tree"
    encode = engine.scheduler._encode
    ids = [*encode("It is a "), MASK, MASK, MASK, *encode(" tree")]
    work = {
        "text": request(BASE, diffusion_canvas_length=16, diffusion_draft=text),
        "ids": request(BASE, diffusion_canvas_length=16, diffusion_draft=ids),
        "none": request(BASE, diffusion_canvas_length=16),
        "empty": request(BASE, diffusion_canvas_length=16, diffusion_draft=""),
    }
    found = {name: list(output.outputs[0].token_ids) for name, output in engine.run(work).items()}
    assert found["text"] == found["ids"] != found["none"] == found["empty"], "off equals absent"


def test_a_draft_comes_back_after_a_preemption(engine):
    engine.use({"seed": 0})
    work = {"one": request(BASE, diffusion_canvas_length=16, diffusion_draft=DRAFTS["gap"])}
    undisturbed = list(engine.run(work)["one"].outputs[0].token_ids)
    steps = []

    def disturb():
        steps.append(1)
        if len(steps) == 3:
            assert engine.preempt_all() == 1

    assert list(engine.run(work, on_step=disturb)["one"].outputs[0].token_ids) == undisturbed
