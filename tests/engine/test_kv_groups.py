"""Late layers in a KV cache group of their own (fastv as the server's method): the same results, fewer blocks."""

import pytest

from tests.engine import pruned_reference
from tests.engine.pruned_checks import assert_as_dense, conserved, importance, prompt_of, request
from tests.golden import cases

CASE = cases.load("f1_redvtp_keep25")
CANVAS = {"diffusion_canvas_length": 16, "diffusion_block_length": 8, "diffusion_max_steps": 8}
RATIO = 0.35
FASTV = CANVAS | {"prune_method": "fastv", "prune_keep_ratio": RATIO}


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory):
    """Two of the tiny model's four layers before fastv's default layer, two behind it."""
    from tests.engine import engines

    with pytest.MonkeyPatch.context() as patch:
        made = engines.LLM

        def with_fastv(*args, additional_config, **kwargs):
            settings = additional_config["dvlm"] | {"prune_method": "fastv", "prune_keep_ratio": RATIO}
            return made(*args, additional_config={"dvlm": settings}, **kwargs)

        patch.setattr(engines, "LLM", with_fastv)
        patch.setattr(engines, "NUM_KV_BLOCKS", 2 * engines.NUM_KV_BLOCKS)  # of half the layers each
        engine = engines.Engine(checkpoint, tmp_path_factory.mktemp("traces"))
    yield engine
    engine.close()


def blocks_by_group(engine):
    managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    return [sum(len(blocks) for blocks in manager.req_to_blocks.values()) for manager in managers]


SETTINGS = {
    "default layer": FASTV,
    "cached": FASTV | {"diffusion_refresh_interval": 32},
    "cached, keep": FASTV | {"diffusion_refresh_interval": 32, "prune_positions": "keep"},
    "an earlier layer": FASTV | {"prune_layer": 1, "diffusion_refresh_interval": 32},
    "a later layer": FASTV | {"prune_layer": 3, "diffusion_refresh_interval": 32},
    "after the step": FASTV | {"prune_method": "redvtp", "diffusion_refresh_interval": 32},
    "not at all": FASTV | {"prune_method": "none", "diffusion_refresh_interval": 32},
}


def test_every_setting_together(engine, reference):
    """Requests that shorten at the border of the groups, elsewhere and nowhere, in one forward pass."""
    model = reference(**CASE.build_args)
    work = {name.replace(",", "").replace(" ", "-"): request(CASE, **options) for name, options in SETTINGS.items()}
    outputs = engine.run(work, on_step=conserved(engine))
    for name, options in zip(work, SETTINGS.values(), strict=True):
        dense = pruned_reference.decode(model, prompt_of(model, CASE), options)
        assert_as_dense(engine, name, outputs[name], dense, pruned=options["prune_method"] != "none")


def test_preempted(engine):
    options = SETTINGS["default layer"]
    calm = engine.run_one(*request(CASE, **options)).outputs[0].token_ids
    check = conserved(engine)

    def disturb():
        check()
        engine.preempt_all()
        check()

    disturbed = engine.run({"disturbed": request(CASE, **options)}, on_step=disturb)["disturbed"]
    assert disturbed.outputs[0].token_ids == calm


def test_late_layers_never_hold_the_dropped_tokens(engine):
    """A group holds half the layers, so that the same bytes are twice as many blocks; 945 tokens, 380 once pruned."""
    held = []
    from vllm_dvlm.scheduler import DiffusionScheduler

    schedule = DiffusionScheduler.schedule

    def watched(self, *args, **kwargs):
        output = schedule(self, *args, **kwargs)
        held.append(blocks_by_group(engine))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionScheduler, "schedule", watched)
        engine.run_one(*request(CASE, **FASTV))
        assert held[:2] == [[30, 12], [12, 12]]
        held.clear()
        engine.run_one(*request(CASE, **FASTV, prune_layer=1))
        assert held[:2] == [[30, 30], [12, 12]]


def test_one_trace(engine):
    engine.run_one(*request(CASE, **FASTV))
    pruning = engine.trace("alone")["pruning"]
    assert (pruning["kv_blocks_before"], pruning["kv_blocks_after"]) == (42, 24)
    assert importance(engine, "alone").shape == (869,)


def test_golden_of_another_method(engine):
    output = engine.run({CASE.name: request(CASE)})[CASE.name]
    assert list(output.outputs[0].token_ids) == CASE.final_ids
    assert engine.trace(CASE.name)["pruning"]["kept_local_indices"] == CASE.pruning["kept_local_indices"]
