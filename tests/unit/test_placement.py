"""The parser of options: every error names the option and the remedy; defaults, limits, round trips."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dvlm.families.base import Family, TokenTexts
from vllm_dvlm.options import REMASKING, REMASKING_ALIASES, DenoiseParams
from vllm_dvlm.placement import MASKED, ResolvedParams, Texts, check_lengths, draft_tokens, read, resolve
from vllm_dvlm.settings import ServerSettings
from vllm_dvlm.steps import Plan

SERVER = ServerSettings(max_canvas_length=64)


def refused(match, options=None, max_tokens=16, settings=SERVER):
    with pytest.raises(ValueError, match=match):
        resolve(options, max_tokens, settings)


# -- requests that name no length -------------------------------------------------------------------------------

FAMILY = Family(
    "name", "architecture", "type", "model", "config", TokenTexts("", "", "", ""), "template", 48, "<image>", 16, 24
)


def lengths(max_tokens, room, settings, **options):
    resolved = resolve({f"diffusion_{k}": v for k, v in options.items()}, max_tokens, settings, room)
    return resolved.canvas_len, resolved.block_len, resolved.max_steps


@pytest.mark.parametrize("max_tokens", [None, 500])
def test_no_named_length_means_the_familys_default(max_tokens):
    """vLLM fills in all that fits where nobody names max_tokens."""
    settings = SERVER.for_model(4, FAMILY)
    assert lengths(max_tokens, 500, settings) == (48, 16, 24)
    assert lengths(max_tokens, 500, settings, block_length=8) == (48, 8, 48)
    assert lengths(max_tokens, 500, settings, canvas_length=64) == (64, 64, 64)
    shorter = replace(SERVER, default_canvas_length=10).for_model(4, FAMILY)
    assert lengths(max_tokens, 500, shorter) == (10, 10, 10)


def test_what_a_request_names_is_untouched():
    settings = SERVER.for_model(4, FAMILY)
    assert lengths(64, 500, settings) == (64, 64, 64)
    assert lengths(48, 500, settings) == (48, 48, 48)


def test_a_default_canvas_shrinks_to_what_fits():
    settings = SERVER.for_model(4, FAMILY)
    assert lengths(None, 30, settings) == lengths(30, 30, settings) == (30, 30, 30)


def test_a_default_canvas_above_the_maximum_is_refused():
    with pytest.raises(ValueError, match="default_canvas_length 65 .* max_canvas_length 64"):
        ServerSettings.from_additional_config({"dvlm": {"max_canvas_length": 64, "default_canvas_length": 65}})
    assert replace(SERVER, max_canvas_length=32).for_model(4, FAMILY).default_canvas_length == 32


# -- what is derived -------------------------------------------------------------------------------------------


def test_defaults():
    resolved = resolve(None, 16, SERVER)
    assert (resolved.canvas_len, resolved.block_len, resolved.max_steps, resolved.num_blocks) == (16, 16, 16, 1)
    assert resolved.options == DenoiseParams()
    assert resolved.plan(100) == Plan(100, 16, 0, 16, 16, 1)


@pytest.mark.parametrize(
    ("options", "max_tokens", "canvas", "block", "steps"),
    [
        ({"diffusion_block_length": 8}, 20, 24, 8, 24),
        ({"diffusion_block_length": 8, "diffusion_max_steps": 6}, 20, 24, 8, 6),
        ({"diffusion_canvas_length": 32}, 5, 32, 32, 32),
        ({"diffusion_canvas_length": 32, "diffusion_max_steps": 64}, None, 32, 32, 64),
        ({}, None, 64, 64, 64),  # no limit: the largest canvas
        ({"diffusion_block_length": 24}, 4000, 48, 24, 48),  # cut to whole blocks within the server's limit
        ({"diffusion_canvas_length": 16.0}, 16, 16, 16, 16),  # HTTP clients may write integers so
        ({"diffusion_canvas_length": None}, 16, 16, 16, 16),
    ],
)
def test_lengths(options, max_tokens, canvas, block, steps):
    resolved = resolve(options, max_tokens, SERVER)
    assert (resolved.canvas_len, resolved.block_len, resolved.max_steps) == (canvas, block, steps)
    assert resolved.max_tokens == (canvas if max_tokens is None else max_tokens)


@given(
    st.integers(1, 64),
    st.none() | st.integers(1, 64),
    st.none() | st.integers(1, 64),
    st.none() | st.integers(1, 130),
    st.none() | st.sampled_from([0.5, 1.0]),
)
def test_whatever_is_accepted_is_whole(max_tokens, canvas, block, steps, threshold):
    options = {
        "diffusion_canvas_length": canvas,
        "diffusion_block_length": block,
        "diffusion_max_steps": steps,
        "diffusion_threshold": threshold,
    }
    try:
        resolved = resolve(options, max_tokens, SERVER)
    except ValueError as error:
        assert str(error).startswith("diffusion_")
        return
    assert 1 <= resolved.canvas_len <= 64
    assert resolved.canvas_len == (canvas or resolved.canvas_len)
    assert resolved.canvas_len % resolved.block_len == 0 and resolved.max_steps % resolved.num_blocks == 0
    plan = resolved.plan(10)
    assert (plan.steps_per_block is None) == (threshold is not None)
    if threshold is None:
        assert plan.steps_per_block == min(resolved.max_steps // resolved.num_blocks, resolved.block_len)
    assert 1 <= resolved.max_new_tokens <= max(max_tokens, resolved.canvas_len)


@pytest.mark.parametrize(("max_tokens", "allowed"), [(5, 5), (15, 15), (16, 19), (100, 19), (None, 19)])
def test_suffix_does_not_count_against_max_tokens(max_tokens, allowed):
    texts = Texts(suffix_ids=(7, 8, 9))
    assert resolve({"diffusion_canvas_length": 16}, max_tokens, SERVER, texts=texts).max_new_tokens == allowed


@pytest.mark.parametrize(
    ("options", "max_tokens", "room", "canvas"),
    [
        ({}, 50, 50, 50),
        ({}, None, 50, 50),
        ({"diffusion_suffix": "abc"}, 50, 50, 47),
        ({"diffusion_suffix": "abc"}, None, 500, 61),  # the server's limit holds for both
        ({"diffusion_suffix": "abc"}, 20, 50, 20),
        ({"diffusion_block_length": 8}, 50, 50, 48),
        ({"diffusion_block_length": 8}, 45, 46, 40),  # 48 would not fit
        ({"diffusion_block_length": 8, "diffusion_suffix": "abc"}, 50, 50, 40),
        ({}, 51, 50, 51),  # max_tokens itself does not fit; ``check_lengths`` says so
        ({"diffusion_canvas_length": 60}, None, 50, 60),  # asked for by name; the same
        ({"diffusion_suffix": "a" * 64}, 16, 500, 16),  # no room for any canvas; the same
    ],
)
def test_a_canvas_that_nobody_named_fits(options, max_tokens, room, canvas):
    texts = read(options, SERVER).texts(lambda text: [ord(char) for char in text], 0)
    resolved = resolve(options, max_tokens, SERVER, room, texts)
    assert resolved.canvas_len == canvas
    plan = resolved.plan(100)
    asked_too_much = canvas > 50 > 0 and room == 50 or "a" * 64 in options.values()
    assert (check_lengths(plan, 100 + room, SERVER) is None) == (not asked_too_much)


def test_none_as_a_word():
    """Over HTTP null does not arrive; a server's default must be possible to undo."""
    settings = replace(SERVER, defaults=DenoiseParams(diffusion_threshold=1.0, diffusion_block_length=8))
    words = {"diffusion_threshold": "none", "diffusion_block_length": "none", "diffusion_max_steps": "none"}
    resolved = resolve(words, 16, settings)
    assert resolved.options.diffusion_threshold is None and resolved.block_len == resolved.max_steps == 16


def test_server_defaults_follow_the_request():
    """A default was chosen for other canvases; only what the request names itself can be wrong."""
    settings = replace(SERVER, defaults=DenoiseParams(diffusion_block_length=16, diffusion_max_steps=32))
    found = resolve({}, 40, settings)
    assert (found.canvas_len, found.block_len, found.max_steps) == (48, 16, 33)
    found = resolve({"diffusion_canvas_length": 20}, None, settings)
    assert (found.canvas_len, found.block_len, found.max_steps) == (20, 20, 32)
    refused("diffusion_block_length 3 does not divide", {"diffusion_block_length": 3, "diffusion_canvas_length": 20})
    refused("diffusion_max_steps 32 must be", {"diffusion_max_steps": 32}, max_tokens=40, settings=settings)
    both = replace(SERVER, defaults=DenoiseParams(diffusion_canvas_length=48, diffusion_max_steps=32))
    wrong = replace(both, defaults=replace(both.defaults, diffusion_block_length=16))
    assert resolve({}, 16, both).max_steps == 32
    refused("diffusion_max_steps 32 must be a multiple", {}, settings=wrong)


def test_every_option_is_documented_and_parsed():
    for field in fields(DenoiseParams):
        assert field.metadata["doc"] and field.metadata["values"]
        given = {field.name: getattr(DenoiseParams(), field.name)}
        assert resolve(given, 16, SERVER) == resolve({}, 16, SERVER), field.name


@pytest.mark.parametrize(("alias", "name"), REMASKING_ALIASES.items())
def test_remasking_by_its_official_name(alias, name):
    assert resolve({"diffusion_remasking": alias}, 16, SERVER).options.diffusion_remasking == name


@pytest.mark.parametrize("name", REMASKING)
def test_remasking_names(name):
    assert resolve({"diffusion_remasking": name}, 16, SERVER).options.diffusion_remasking == name


# -- drafts ----------------------------------------------------------------------------------------------------


def encode(text):
    return [ord(char) for char in text]


@pytest.mark.parametrize(
    ("draft", "tokens"),
    [
        ("", ()),
        ("ab", (97, 98)),
        ("a<mask:3>b", (97, MASKED, MASKED, MASKED, 98)),
        ("<mask:2>", (MASKED, MASKED)),
        ("<mask:x>", tuple(encode("<mask:x>"))),
        ((97, 0, 98), (97, MASKED, 98)),  # 0 is the mask token here
        ("a\0b", (97, MASKED, 98)),
    ],
)
def test_drafts(draft, tokens):
    assert draft_tokens(draft, encode, mask_token_id=0) == tokens


def test_a_draft_has_a_bound():
    refused("diffusion_draft: a token id must be an integer ≥ 0, not 'x'", {"diffusion_draft": [1, "x"]})
    refused("diffusion_draft has 70000 token ids", {"diffusion_draft": [1] * 70000})
    with pytest.raises(ValueError, match="longer than any canvas"):
        draft_tokens("<mask:9999999>", encode, 0)


def drafted(draft, **options):
    options = {f"diffusion_{name}": value for name, value in options.items()}
    return resolve(options, 16, SERVER, texts=Texts(draft=draft))


def test_a_draft_fits_the_canvas_and_leaves_something_to_fill():
    with pytest.raises(ValueError, match="diffusion_draft of 17 tokens does not fit the canvas of 16"):
        drafted((1,) * 17)
    with pytest.raises(ValueError, match="diffusion_draft leaves nothing to fill"):
        drafted((1,) * 16)
    assert drafted((1,) * 15 + (MASKED,)).texts.draft[-1] == MASKED


@pytest.mark.parametrize(
    ("draft", "start"), [((), 0), ((1,) * 3, 0), ((1,) * 4, 4), ((1,) * 9, 8), ((1, MASKED, *(1,) * 9), 0)]
)
def test_blocks_that_a_draft_fills_take_no_step(draft, start):
    assert drafted(draft, block_length=4).plan(9).start.block_start == start


def test_what_was_placed_travels():
    import json

    for draft in ((), (3, MASKED, 4)):
        placed = drafted(draft, block_length=4, threshold=1.0)
        assert ResolvedParams.from_mapping(placed.to_mapping()) == placed
        assert ResolvedParams.from_mapping(json.loads(json.dumps(placed.to_mapping()))) == placed


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("diffusion_canvas_lenght", "diffusion_canvas_length"),
        ("block_length", "diffusion_block_length"),
        ("diffusion_steps", "diffusion_max_steps"),
        ("prune_keep_ration", "prune_keep_ratio"),
        ("treshold", "diffusion_threshold"),
    ],
)
def test_unknown_options_name_the_nearest(misspelt, meant):
    refused(rf"^{misspelt} is not a known option; did you mean {meant}\? Known: diffusion_", {misspelt: 1})


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("diffusion_canvas_length", 0, "an integer ≥ 1, not 0"),
        ("diffusion_canvas_length", 2.5, "an integer ≥ 1, not 2.5"),
        ("diffusion_canvas_length", "16", "an integer ≥ 1, not '16'"),
        ("diffusion_block_length", True, "an integer ≥ 1, not True"),
        ("diffusion_max_steps", -4, "an integer ≥ 1, not -4"),
        ("diffusion_refresh_interval", None, "an integer ≥ 1, not None"),
        ("diffusion_refresh_interval", 1e19, "an integer ≥ 1 and at most"),
        ("diffusion_max_steps", 10**30, "an integer ≥ 1 and at most"),
        ("prune_keep_ratio", 10**400, r"a number in \(0, 1\]"),
        ("diffusion_threshold", float("inf"), "a number > 0, not inf"),
        ("diffusion_threshold", 0, "a number > 0, not 0"),
        ("diffusion_threshold", float("nan"), "a number > 0, not nan"),
        ("diffusion_threshold", "high", "a number > 0, not 'high'"),
        ("diffusion_remasking", "confidence", "one of low_confidence, random, entropy, margin"),
        ("diffusion_remasking", 3, "one of low_confidence, random, entropy, margin"),
        ("diffusion_suffix", 7, "text, not 7"),
        ("diffusion_suffix", [1, 2], "text, not"),
        ("diffusion_suffix", "a \udfff", "valid Unicode"),
        ("diffusion_stream", "all", "one of committed, provisional"),
        ("diffusion_schedule", "quadratic", "one of uniform, linear, shift, cosine, logit_normal"),
        ("diffusion_step_ratio", 1.5, r"a number in \(0, 1\], not 1.5"),
        ("diffusion_attention", "causal", "one of prefix, full"),
        ("diffusion_draft", 7, "text or a list of token ids, not 7"),
        ("diffusion_cfg_scale", -1, "a number ≥ 0, not -1"),
        ("diffusion_trace", 2, "0 or 1, not 2"),
        ("diffusion_trace", "yes", "0 or 1, not 'yes'"),
        ("prune_keep_ratio", 0, r"a number in \(0, 1\], not 0"),
        ("prune_keep_ratio", 1.5, r"a number in \(0, 1\], not 1.5"),
        ("prune_layer", 0, "an integer ≥ 1, not 0"),
        ("prune_positions", "stay", "one of renumber, keep"),
    ],
)
def test_ill_typed_values_name_the_allowed_ones(option, value, allowed):
    refused(f"^{option} must be {allowed}", {option: value})


def test_nearest_value_is_named():
    refused("did you mean 'low_confidence'", {"diffusion_remasking": "low-confidence"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diffusion_block_length": 6, "diffusion_canvas_length": 16}, "does not divide .* for example 4"),
        ({"diffusion_block_length": 20, "diffusion_canvas_length": 16}, "does not divide .* for example 16"),
        ({"diffusion_block_length": 4, "diffusion_max_steps": 3}, "multiple of the number of blocks, 4 .*is 4"),
        ({"diffusion_block_length": 4, "diffusion_max_steps": 11}, "the number of blocks, 4 .*nearest is 12"),
        ({"diffusion_canvas_length": 65}, 'larger than .* 64; .*"max_canvas_length": 65'),
        ({"diffusion_block_length": 65}, "diffusion_block_length 65 is larger than .* 64"),
        ({"diffusion_cfg_scale": 0.5}, "not supported yet; leave it at 0"),
        ({"diffusion_schedule": "cosine"}, "LLaDA-V has no other schedules; use 'uniform'"),
        ({"diffusion_schedule_shift": 0.3}, "LLaDA-V has no other schedules; use 'uniform'"),
        ({"diffusion_step_ratio": 0.5}, "LLaDA-V has none; use diffusion_max_steps"),
        ({"diffusion_attention": "prefix"}, "LLaDA-V has only full"),
        ({"diffusion_stream_every": 2}, "belongs to diffusion_stream 'provisional'"),
        ({"diffusion_trace": 1}, "trace_dir"),
        ({"prune_layer": 2}, "prune_layer belongs to prune_method 'fastv'"),
        ({"prune_method": "random", "prune_rows": "all"}, "prune_rows 'all' does not go with"),
    ],
)
def test_contradictions_name_a_remedy(options, message):
    refused(message, options)


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_a_canvas_needs_a_position(max_tokens):
    refused("max_tokens must be at least 1", max_tokens=max_tokens)


def test_prune_layer_must_leave_a_layer():
    settings = replace(SERVER, num_layers=4)
    options = {"prune_method": "fastv", "prune_layer": 3}
    assert resolve(options, 16, settings).prune_after_layers(4) == 3
    refused("prune_layer must be from 1 to 3, not 4", options | {"prune_layer": 4}, settings=settings)
    assert resolve({"prune_method": "fastv"}, 16, settings).prune_after_layers(4) == 2


def test_lengths_of_prompt_and_canvas():
    def plan_of(suffix_len):
        texts = Texts(suffix_ids=(1,) * suffix_len)
        return resolve({"diffusion_canvas_length": 60}, None, SERVER, texts=texts).plan(100)

    plan = plan_of(4)
    assert check_lengths(plan, 164, SERVER) is None
    assert "exceed the model's 163 positions" in check_lengths(plan, 163, SERVER)
    assert "exceed the server's max_canvas_length 64" in check_lengths(plan_of(5), 1000, SERVER)


def test_pruned_plan():
    def pruned(num_visual=80, **options):
        resolved = resolve(options, 16, SERVER)
        return resolved.pruned_plan(resolved.plan(100), num_visual)

    assert pruned(prune_method="random", prune_keep_ratio=0.25).prompt_len == 100 - 80 + 20
    assert pruned(prune_method="none") is None
    assert pruned(prune_method="random", prune_keep_ratio=1.0) is None, "off equals absent"
    assert pruned(num_visual=0, prune_method="random") is None


# -- server settings -------------------------------------------------------------------------------------------


def test_server_settings():
    raw = {"max_canvas_length": 32, "trace_dir": "traces", "diffusion_block_length": 8, "cpu_dtype": "bfloat16"}
    settings = ServerSettings.from_additional_config({"dvlm": raw, "other": 1})
    assert (settings.max_canvas_length, settings.trace_dir, settings.cpu_dtype) == (32, "traces", "bfloat16")
    assert settings.defaults == DenoiseParams(diffusion_block_length=8)
    assert resolve({}, 16, settings).block_len == 8
    assert resolve({"diffusion_block_length": 4}, 16, settings).block_len == 4, "a request's own value wins"
    assert ServerSettings.from_additional_config(None) == ServerSettings.from_additional_config({}) == ServerSettings()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1], "must be an object of settings, not list"),
        ({"max_canvas_len": 3}, "max_canvas_len is not a known server setting; did you mean max_canvas_length"),
        ({"diffusion_treshold": 3}, "did you mean diffusion_threshold"),
        ({"max_canvas_length": 0}, "max_canvas_length must be an integer ≥ 1"),
        ({"max_canvas_length": None}, "max_canvas_length must be an integer ≥ 1"),
        ({"max_image_tiles": "many"}, "max_image_tiles must be an integer ≥ 1"),
        ({"trace_dir": 3}, "trace_dir must be a path"),
        ({"cpu_dtype": "float16"}, "cpu_dtype must be one of float32, bfloat16"),
        ({"logits_chunk_bytes": 0}, "logits_chunk_bytes must be an integer ≥ 1"),
        ({"diffusion_remasking": "best"}, "diffusion_remasking must be one of"),
    ],
)
def test_server_settings_are_strict(raw, message):
    with pytest.raises(ValueError, match=message):
        ServerSettings.from_additional_config({"dvlm": raw})


defaults = st.builds(
    DenoiseParams,
    diffusion_block_length=st.none() | st.integers(1, 64),
    diffusion_threshold=st.none() | st.floats(0.001, 9),
    diffusion_remasking=st.sampled_from(REMASKING),
    diffusion_suffix=st.text(max_size=9),
    diffusion_draft=st.text(max_size=9) | st.lists(st.integers(0, 2**53), max_size=4).map(tuple),
    prune_keep_ratio=st.floats(0.01, 1),
    diffusion_trace=st.sampled_from([0, 1]),
)
servers = st.builds(
    ServerSettings,
    defaults=defaults,
    max_canvas_length=st.integers(1, 5000),
    max_image_tiles=st.none() | st.integers(1, 99),
    trace_dir=st.none() | st.text(max_size=9),
    logits_chunk_bytes=st.none() | st.integers(1, 2**40),
    cpu_dtype=st.sampled_from(["float32", "bfloat16"]),
)


@given(servers)
def test_settings_travel_in_a_name(settings):
    name = settings.to_name()
    assert f"Options_{name}".isidentifier()
    assert ServerSettings.from_name(name) == settings
