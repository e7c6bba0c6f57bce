"""Pruning through the real engine: recorded runs, every option against dense PyTorch, preemption and aborts."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from vllm.sampling_params import RequestOutputKind

from tests.engine import pruned_reference
from tests.engine.pruned_checks import (
    IMPORTANCE_TOLERANCE,
    assert_as_dense,
    assert_as_golden,
    blocks_of,
    conserved,
    importance,
    prompt_of,
    request,
)
from tests.golden import cases
from vllm_dvlm.pruning import Pruner, StepView, create, names
from vllm_dvlm.pruning.select import select

GOLDEN = [case for case in cases.by_mode("redvtp") if not case.is_informative]
TWO_IMAGES = cases.load("f7_redvtp_two_images_informative")
BASE = cases.load("f1_redvtp_keep25")
CANVAS = {"diffusion_canvas_length": 16, "diffusion_block_length": 8, "diffusion_max_steps": 8}
RATIO = 0.35  # with these steps no run of this module comes near a tie


def check_dense(engine, reference, options, case=BASE, **more):
    """One request alone against the reference."""
    engine.use(case.build_args)
    model = reference(**case.build_args)
    dense = pruned_reference.decode(model, prompt_of(model, case), options, **more)
    output = engine.run({"alone": request(case, **options)}, on_step=conserved(engine))["alone"]
    assert_as_dense(engine, "alone", output, dense)
    return dense


def test_the_last_output_tells_what_a_stream_lost(engine):
    """A front end that is behind merges outputs, and of what they carry the last one's stays."""
    options = {"prune_method": "redvtp", "prune_keep_ratio": 0.25, "diffusion_stream": "provisional"}
    prompt, params = request(BASE, **CANVAS, **options)
    params.output_kind = RequestOutputKind.CUMULATIVE
    carried = engine.run_one(prompt, params).kv_transfer_params
    report, pruned = carried["dvlm"], carried["dvlm_canvas"]["pruned"]
    assert pruned["visual_tokens"] == [report["visual_tokens_before"], report["visual_tokens_after"]]
    assert len(pruned["kept"]) == report["visual_tokens_after"]


# -- recorded runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(GOLDEN, key=lambda c: sorted(c.build_args.items())), ids=lambda c: c.name)
def test_golden_alone(engine, case):
    engine.use(case.build_args)
    outputs = engine.run({case.name: request(case)}, on_step=conserved(engine))
    assert_as_golden(engine, case, outputs[case.name])


MIXED = (
    ["a1_text_single_block", "f1_redvtp_keep25", "b1_image_steps_eq_gen", "f2_redvtp_keep50", "g12_fast_k2_r8_none",
     "f3_redvtp_keep75", "h1_suffix", "g10_fast_text_r8_thr1"],
    ["f6_redvtp_square", "g5_fast_r8_thr1", "f4_redvtp_blocks", "b4_image_after_text", "a2_text_blocks_k2",
     "c2_steps_not_dividing"],
)  # fmt: skip


@pytest.mark.parametrize("batch", MIXED, ids=["seed0", "seed1"])
def test_golden_in_mixed_batches(engine, batch):
    """With unpruned, cached and text requests in the same forward passes; nobody sees the others."""
    from tests.engine.engines import case_tokens, tokens

    batch = [cases.load(name) for name in batch]
    engine.use(batch[0].build_args)
    outputs = engine.run({case.name: request(case) for case in batch}, on_step=conserved(engine))
    for case in batch:
        if case.mode == "redvtp":
            assert_as_golden(engine, case, outputs[case.name])
        else:
            assert tokens(outputs[case.name]) == case_tokens(case)
            assert engine.trace(case.name)["pruning"] is None


def test_two_images_are_ranked_together(engine, reference):
    """The original takes the first image's start with the last one's length; here every visual token is ranked."""
    options = cases.extra_args(TWO_IMAGES)
    dense = check_dense(engine, reference, options, TWO_IMAGES)
    (a, b), (c, d) = TWO_IMAGES.visual_spans
    pruning = engine.trace("alone")["pruning"]
    assert pruning["num_visual"] == b - a + d - c
    assert pruning["keep_count"] == len(dense.kept) == (b - a + d - c) // 2
    # The recorded importance covers the start of what we rank, so the two agree there.
    assert importance(engine, "alone")[: d - c] == pytest.approx(TWO_IMAGES.importance, rel=IMPORTANCE_TOLERANCE)
    assert min(dense.kept) < b - a <= max(dense.kept), "survivors in both images"


# -- options against the dense reference -----------------------------------------------------------------------

POSITIONS, INTERVALS = ("renumber", "keep"), (1, 3, 32)


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_redvtp_with_a_cache(engine, reference, positions, interval):
    """Kept keys are moved, and turned or not; later refreshes run on the pruned sequence."""
    options = {"prune_method": "redvtp", "prune_keep_ratio": RATIO, "prune_positions": positions}
    dense = check_dense(engine, reference, CANVAS | options | {"diffusion_refresh_interval": interval})
    assert len({step["query_len"] for step in dense.steps}) == {1: 2, 3: 4, 32: 4}[interval]


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_fastv(engine, reference, layer, positions, interval):
    """Layers up to ``prune_layer`` whole, then the short sequence in the same step and in all later ones."""
    options = {"prune_method": "fastv", "prune_layer": layer, "prune_keep_ratio": RATIO, "prune_positions": positions}
    check_dense(engine, reference, CANVAS | options | {"diffusion_refresh_interval": interval})
    assert engine.trace("alone")["pruning"]["layer"] == layer


def test_fastv_prunes_after_half_the_layers(engine, reference):
    options = CANVAS | {"prune_method": "fastv", "prune_keep_ratio": RATIO}
    check_dense(engine, reference, options)
    assert engine.trace("alone")["pruning"]["layer"] == 2


ROWS = [("redvtp", rows) for rows in ("masked", "committed", "response_prompt", "all")]
ROWS += [("fastv", rows) for rows in ("masked", "response_prompt", "all", "last")]


@pytest.mark.parametrize("method, rows", ROWS)
def test_rows(engine, reference, method, rows):
    options = {"diffusion_canvas_length": 8, "diffusion_max_steps": 4, "prune_method": method, "prune_rows": rows}
    check_dense(engine, reference, options | {"prune_keep_ratio": 0.3})


def test_rows_choose_differently(engine):
    """The reference follows the option, so this makes sure that the option reaches it."""
    engine.use(BASE.build_args)
    options = {"diffusion_canvas_length": 4, "diffusion_max_steps": 2}
    work = {f"{m}-{r}": request(BASE, **options, prune_method=m, prune_rows=r) for m, r in ROWS}
    engine.run(work)
    kept = {name: tuple(engine.trace(name)["pruning"]["kept_local_indices"]) for name in work}
    assert len(set(kept.values())) == len(ROWS)


def test_a_predicted_mask_token_is_no_masked_row(engine, reference):
    """Committed, it leaves its place masked; the released code takes the rows that no token was committed to."""
    options = {
        "diffusion_canvas_length": 6,
        "diffusion_max_steps": 3,
        "prune_method": "redvtp",
        "prune_keep_ratio": 0.3,
    }
    plain = pruned_reference.decode(reference(seed=0), prompt_of(reference(seed=0), BASE), options)
    arguments = {"build_args": {"seed": 0, "mask_like": plain.steps[0]["ids"][0]}}
    case = cases.Case(BASE.name, BASE.raw | {"checkpoint": BASE.raw["checkpoint"] | arguments})
    dense = check_dense(engine, reference, options, case)
    assert pruned_reference.MASK_ID in dense.steps[0]["ids"]


def test_threshold_and_cache_and_pruning(engine, reference):
    """The fast setting: parallel decoding against a pruned, cached prompt."""
    options = {"diffusion_canvas_length": 16, "diffusion_threshold": 1, "diffusion_refresh_interval": 32}
    dense = check_dense(engine, reference, options | {"prune_method": "redvtp", "prune_keep_ratio": 0.3})
    assert len(dense.steps) < 16


def test_all_settings_in_one_batch(engine, reference):
    """Requests that shorten after different layers, after the step, and not at all, in one forward pass."""
    engine.use(BASE.build_args)
    model = reference(**BASE.build_args)
    settings = {"none": {"diffusion_refresh_interval": 3}}
    for method, layer in (("fastv", 2), ("redvtp", None), ("fastv", 1), ("fastv", 3), ("fastv", 2)):
        for positions, interval in (("renumber", 1), ("keep", 32)):
            options = {"prune_method": method, "prune_keep_ratio": RATIO, "prune_positions": positions}
            options |= {"diffusion_refresh_interval": interval} | ({"prune_layer": layer} if layer else {})
            settings[f"{len(settings)}-{method}-{layer}-{positions}-{interval}"] = options
    work = {name: request(BASE, **CANVAS, **options) for name, options in settings.items()}
    together = []
    outputs = engine.run(work, on_step=lambda: together.append(len(engine.scheduler.running)))
    assert max(together) == len(settings)
    for name, options in settings.items():
        dense = pruned_reference.decode(model, prompt_of(model, BASE), CANVAS | options)
        assert_as_dense(engine, name, outputs[name], dense, pruned=name != "none")


@pytest.mark.parametrize("method", ["random", "uniform", "diversity"])
def test_methods_without_attention(engine, reference, method):
    """What they keep follows from embeddings and seed; cached, with the keys turned."""
    from vllm import SamplingParams

    engine.use(BASE.build_args)
    model = reference(**BASE.build_args)
    prompt = prompt_of(model, BASE)
    options = {"diffusion_canvas_length": 8, "diffusion_refresh_interval": 32}
    options |= {"prune_method": method, "prune_keep_ratio": 0.3}
    (span,) = prompt.visual_spans
    nothing = torch.empty(0)
    embeds = prompt.embeddings[slice(*span)]
    view = StepView(None, None, None, 0, nothing, nothing, embeds, places_by_newlines(embeds), 5)
    expected = create(method).importance(view)
    dense = pruned_reference.decode(model, prompt, options, importance=expected)
    dense.distances.pop("importance")  # ranks are exact here
    params = SamplingParams(temperature=0, seed=5, max_tokens=8, extra_args=options | {"diffusion_trace": 1})
    output = engine.run({method: (request(BASE)[0], params)})[method]
    assert_as_dense(engine, method, output, dense, pruned=False)
    kept = engine.trace(method)["pruning"]["kept_local_indices"]
    assert kept == select(torch.from_numpy(importance(engine, method)), len(dense.kept)).tolist()
    if method != "diversity":  # its cosines come from another vision tower's rounding
        assert kept == dense.kept


def places_by_newlines(embeds):
    """Row and column of the tokens of one image, read off where its newline tokens stand. [N, 2] int64."""
    equal_to_last = (embeds == embeds[-1]).all(dim=1).nonzero().flatten()  # every row ends in the newline vector
    length = int(equal_to_last.diff()[0])
    assert set(equal_to_last.diff().tolist()) == {length} and length > 2
    num_overview = int(equal_to_last[0]) + 1 - length
    side = math.isqrt(num_overview)
    assert side**2 == num_overview
    overview, grid = torch.arange(num_overview), torch.arange(len(embeds) - num_overview)
    places = [torch.stack([index // n, index % n], dim=1) for index, n in ((overview, side), (grid, length))]
    return torch.cat(places)


@dataclass(frozen=True)
class Tail(Pruner):
    """The last visual tokens."""

    def importance(self, view):
        return torch.arange(view.visual_embeds.shape[0], dtype=torch.float32)


def test_method_of_a_third_party(engine, monkeypatch):
    monkeypatch.setitem(names.METHODS, "tail", f"{__name__}:Tail")
    names.targets.cache_clear()
    engine.use(BASE.build_args)
    engine.run({"tail": request(BASE, diffusion_canvas_length=4, prune_method="tail", prune_keep_ratio=0.25)})
    monkeypatch.undo()
    names.targets.cache_clear()
    assert engine.trace("tail")["pruning"]["kept_local_indices"] == list(range(869 - 217, 869))


# -- nothing to prune ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 32])
@pytest.mark.parametrize("method", ["redvtp", "fastv", "random", "uniform", "diversity"])
def test_keep_ratio_one_changes_no_bit(engine, method, interval):
    engine.use(BASE.build_args)
    options = {"diffusion_canvas_length": 8, "diffusion_refresh_interval": interval}
    outcomes = []
    for pruning in ({"prune_method": "none"}, {"prune_method": method, "prune_keep_ratio": 1.0}):
        output = engine.run_one(*request(BASE, **options, **pruning))
        trace = engine.trace("alone")
        outcomes.append((list(output.outputs[0].token_ids), trace["steps"], trace["pruning"], trace["flops"]))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][2] is None


def test_without_an_image(engine):
    case = cases.load("a1_text_single_block")
    engine.use(case.build_args)
    steps = []
    for options in ({}, {"prune_method": "redvtp"}, {"prune_method": "fastv", "prune_keep_ratio": 0.1}):
        before = engine.scheduler.counters["requests_pruned"]
        engine.run({"text": request(case, diffusion_canvas_length=16, **options)})
        assert engine.trace("text")["pruning"] is None
        assert engine.scheduler.counters["requests_pruned"] == before
        steps.append(engine.trace("text")["steps"])
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize("options", [{"diffusion_max_steps": 1}, {"diffusion_threshold": 1e9}], ids=str)
def test_canvas_full_after_the_first_step(engine, options):
    """There is no later step to make cheaper, so nothing is pruned."""
    engine.use(BASE.build_args)
    options = {"diffusion_canvas_length": 8, "prune_keep_ratio": 0.25, **options}
    plain = engine.run_one(*request(BASE, **options))
    unpruned = engine.trace("alone")
    before = dict(engine.scheduler.counters)
    output = engine.run_one(*request(BASE, **options, prune_method="redvtp"))
    trace = engine.trace("alone")
    assert list(output.outputs[0].token_ids) == list(plain.outputs[0].token_ids)
    assert trace["steps"] == unpruned["steps"] and len(trace["steps"]) == 1
    assert trace["pruning"] is None and trace["pruning_skipped"] == "the canvas is full after the first step"
    assert "pruning_skipped" not in unpruned
    for name in ("requests_pruned", "visual_tokens_pruned", "kv_blocks_freed"):
        assert engine.scheduler.counters[name] == before.get(name, 0), name


# -- what is counted -------------------------------------------------------------------------------------------


def flops(lengths):
    """Of the tiny model's layers on whole sequences: [(layers, tokens), ...]; width 64, MLP 128, no grouped heads."""
    return sum(layers * n * (4 * 64**2 + 2 * n * 64 + 3 * 64 * 128) for layers, n in lengths)


def test_counters_and_flops(engine):
    engine.use(BASE.build_args)
    for method, first in (("redvtp", [(4, 945)]), ("fastv", [(2, 945), (2, 293)])):
        before = engine.scheduler.counters.copy()
        options = {"diffusion_canvas_length": 16, "diffusion_max_steps": 8, "prune_keep_ratio": 0.25}
        engine.run({"counted": request(BASE, **options, prune_method=method)})
        grown = engine.scheduler.counters - before
        assert grown["requests_pruned"] == 1
        assert grown["visual_tokens_pruned"] == 869 - 217
        assert grown["visual_tokens"] == 869
        assert grown["kv_blocks_before"] == blocks_of(engine, 945)
        assert grown["kv_blocks_freed"] == blocks_of(engine, 945) - blocks_of(engine, 293)
        assert engine.trace("counted")["flops"] == flops(first + [(4, 293)] * 7)
        # The time came from the worker through vLLM's output.
        assert 0 < grown["prune_us"] == round(engine.trace("counted")["pruning"]["prune_ms"] * 1000)
    before = engine.scheduler.counters.copy()
    engine.run({"whole": request(BASE, **options | {"prune_method": "none"})})
    assert (engine.scheduler.counters - before)["prune_us"] == 0


# -- preemption, aborts, errors --------------------------------------------------------------------------------


def steps_of(engine, name):
    return [{key: step[key] for key in ("pos", "ids")} for step in engine.trace(name)["steps"]]


EXACT = {
    "golden": (BASE, cases.extra_args(BASE)),
    "keep": (BASE, CANVAS | {"prune_method": "redvtp", "prune_keep_ratio": 0.3, "prune_positions": "keep"}),
    "fastv": (BASE, CANVAS | {"prune_method": "fastv", "prune_keep_ratio": 0.3}),
    "two images": (TWO_IMAGES, cases.extra_args(TWO_IMAGES) | {"prune_keep_ratio": 0.25}),
}


@pytest.mark.parametrize("case, options", EXACT.values(), ids=EXACT)
def test_preempted_after_every_step(engine, case, options):
    """In exact mode a request goes on as if nothing had happened, with the visual tokens that it kept."""
    engine.use(case.build_args)
    undisturbed = list(engine.run({"calm": request(case, **options)})["calm"].outputs[0].token_ids)
    before = engine.scheduler.counters["requests_pruned"]
    check, preempted = conserved(engine), []

    def disturb():
        check()
        preempted.append(engine.preempt_all())
        engine.engine.reset_encoder_cache()  # the images are encoded again, also those behind the pruned length
        check()

    output = engine.run({"disturbed": request(case, **options)}, on_step=disturb)["disturbed"]
    assert sum(preempted) == len(steps_of(engine, "calm")) - 1
    assert list(output.outputs[0].token_ids) == undisturbed
    assert steps_of(engine, "disturbed") == steps_of(engine, "calm")
    calm, disturbed = (engine.trace(name) for name in ("calm", "disturbed"))
    assert all(trace["pruning"].pop("prune_ms") > 0 for trace in (calm, disturbed))
    assert disturbed["pruning"] == calm["pruning"]
    assert [s["query_len"] for s in disturbed["steps"]] == [s["query_len"] for s in calm["steps"]]
    assert engine.scheduler.counters["requests_pruned"] == before + 1, "pruned once"


@pytest.mark.parametrize("positions", POSITIONS)
def test_preempted_with_a_cache(engine, reference, positions):
    """The step after a preemption recomputes everything, on the pruned sequence."""
    engine.use(BASE.build_args)
    model = reference(**BASE.build_args)
    options = CANVAS | {"prune_method": "redvtp", "prune_keep_ratio": RATIO, "prune_positions": positions}
    options |= {"diffusion_refresh_interval": 32}
    dense = pruned_reference.decode(model, prompt_of(model, BASE), options, refresh_also={1, 5})
    num_steps = itertools.count(1)

    def disturb():
        if next(num_steps) in (1, 5):
            engine.preempt_all()

    output = engine.run({"cached": request(BASE, **options)}, on_step=disturb)["cached"]
    assert_as_dense(engine, "cached", output, dense)


@pytest.mark.parametrize("moment", [0, 1, 2])
@pytest.mark.parametrize("inside_the_step", [False, True])
def test_aborted_around_pruning(engine, moment, inside_the_step):
    """Before, in and after the pruning step; aborts that arrive while the model runs are taken before its output."""
    engine.use(BASE.build_args)
    check = conserved(engine)
    other = cases.load("f2_redvtp_keep50")
    request_id = engine.engine.add_request("gone", *request(BASE))
    engine.add(other.name, *request(other))
    for _ in range(moment):
        engine.engine.step()
        check()
    if inside_the_step:
        engine.engine.output_processor.abort_requests([request_id], internal=True)
        engine.core.aborts_queue.put_nowait([request_id])
    else:
        engine.engine.abort_request([request_id], internal=True)
    outputs = engine.finish(on_step=check)
    engine.assert_idle()
    assert_as_golden(engine, other, outputs[other.name])


def test_same_id_again_after_an_abort(engine):
    """The stash of a removed request is for preempted ones only; a new request of that name prunes anew."""
    engine.use(BASE.build_args)
    request_id = engine.engine.add_request(BASE.name, *request(BASE, **CANVAS, prune_method="uniform"))
    engine.engine.step()
    engine.engine.abort_request([request_id], internal=True)
    engine.finish()
    assert_as_golden(engine, BASE, engine.run({BASE.name: request(BASE)})[BASE.name])
