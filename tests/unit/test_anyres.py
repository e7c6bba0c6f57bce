"""Layouts, pixels and token order against the recorded reference, and properties for any size."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.golden import lavida_cases
from vllm_dvlm.checkpoint.anyres import (
    ImageLayoutConfig,
    arrange,
    heaviest_image,
    largest_image,
    lavida_layout,
    layout_of,
    num_visual_tokens,
    parse_pinpoints,
    preprocess,
    select_grid,
)
from vllm_dvlm.steps import VisualSpan
from vllm_dvlm.synthetic.lavida_files import PINPOINTS
from vllm_dvlm.worker.image_layouts import describe_images, visual_places

GOLDEN = Path(__file__).parents[1] / "golden" / "llada_v"
PREPROCESSING = sorted(path.stem for path in GOLDEN.glob("p*.json"))
WITH_IMAGES = [
    "b1_image_steps_eq_gen",
    "i1_two_images_anyres",
    "i2_two_images_pad",
    "i3_one_image_pad",
]
SIDES = st.integers(1, 4000)


def layout(aspect_ratio="anyres_max_4", pinpoints="(1x1),...,(6x6)"):
    config = SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=pinpoints)
    return ImageLayoutConfig.from_hf_config(config, SimpleNamespace(image_size=384, patch_size=14))


def pooled(aspect_ratio="anyres", merge_type=None, pinpoints=PINPOINTS):
    config = SimpleNamespace(
        image_aspect_ratio=aspect_ratio, image_grid_pinpoints=pinpoints, mm_patch_merge_type=merge_type
    )
    return lavida_layout(config, SimpleNamespace(image_size=384, patch_size=14))


def load(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def pixels_of(image):
    return Image.open(GOLDEN / "images" / image["file"])


@pytest.mark.parametrize("name", PREPROCESSING)
def test_layout_is_the_recorded_one(name):
    case = load(name)
    found = layout_of(*case["image"]["size_wh"], layout(case["image_aspect_ratio"]))
    assert found.num_tiles == case["image"]["tiles"]
    assert found.num_visual_tokens == case["image"]["visual_tokens"]
    for field, key in (
        (found.unpad_in, "unpad_in_hw"),
        (found.unpad_out, "unpad_out_hw"),
        (found.downsampled, "downsampled_hw"),
    ):
        assert list(field or ()) == case["layout"].get(key, [])
    if "grid_wh_tiles" in case["image"]:
        assert found.grid_tiles == tuple(reversed(case["image"]["grid_wh_tiles"]))


@pytest.mark.parametrize("name", PREPROCESSING)
def test_pixels_are_the_recorded_ones(name):
    case = load(name)
    tiles = preprocess(pixels_of(case["image"]), layout(case["image_aspect_ratio"])).numpy()
    stats = case["image"]["pixel_stats"]
    assert tiles.dtype == np.float32
    assert hashlib.sha256(tiles.tobytes()).hexdigest() == stats["sha256_float32_c_order"]
    as_bytes = np.round((tiles * 0.5 + 0.5) * 255).astype(np.uint8)
    assert hashlib.sha256(as_bytes.tobytes()).hexdigest() == stats["sha256_uint8_c_order"]
    flat = tiles.astype(np.float64).ravel()
    assert flat.sum() == pytest.approx(stats["sum"], rel=1e-9)
    assert (flat * np.cos(0.001 * np.arange(flat.size))).sum() == pytest.approx(stats["cos_checksum"], rel=1e-6)
    for tile, total, corners in zip(tiles, case["tile_sums"], case["tile_corners_rgb"], strict=True):
        assert tile.astype(np.float64).sum() == pytest.approx(total, rel=1e-9)
        places = [(0, 0), (0, 383), (383, 0), (383, 383), (191, 191)]
        assert np.allclose([tile[:, y, x] for y, x in places], corners, atol=1e-6)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_images_of_prompts(name):
    case = load(name)
    of_case = layout(case["settings"].get("image_aspect_ratio", "anyres_max_4"))
    for image in case["images"]:
        assert num_visual_tokens(*image["size_wh"], of_case) == image["visual_tokens"]
        digest = hashlib.sha256(preprocess(pixels_of(image), of_case).numpy().tobytes())
        assert digest.hexdigest() == image["pixel_stats"]["sha256_float32_c_order"]


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.sampled_from(["anyres_max_4", "anyres_max_1", "anyres", "pad"]))
def test_count_is_what_arrange_returns(width, height, aspect_ratio):
    of_mode = layout(aspect_ratio)
    try:
        found = layout_of(width, height, of_mode)
    except ValueError as error:
        assert "too thin" in str(error)
        assert max(width, height) > 20 * min(width, height)
        return
    features = torch.zeros(found.num_tiles, 729, 2)
    tokens = arrange(features, (width, height), of_mode, torch.ones(2))
    assert tokens.shape == (found.num_visual_tokens, 2)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES)
def test_no_image_is_larger_than_the_largest(width, height):
    bound = num_visual_tokens(*largest_image(layout()), layout())
    try:
        assert num_visual_tokens(width, height, layout()) <= bound
    except ValueError:
        assert max(width, height) > 20 * min(width, height)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.sampled_from(["anyres_max_4", "anyres", "pad"]), st.sampled_from([None, 5, 12]))
def test_no_image_has_more_tiles_than_the_heaviest(width, height, aspect_ratio, max_tiles):
    """Of those that the server takes; among images of as many tiles, none has more visual tokens."""
    of_mode = layout(aspect_ratio)
    most = layout_of(*heaviest_image(of_mode, max_tiles), of_mode)
    try:
        found = layout_of(width, height, of_mode)
    except ValueError:
        return
    assert max_tiles is None or most.num_tiles <= max_tiles
    if max_tiles is None or found.num_tiles <= max_tiles:
        assert (found.num_tiles, found.num_visual_tokens) <= (most.num_tiles, most.num_visual_tokens)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["anyres_max_4", "pad"]))
def test_every_image_gives_its_tiles(width, height, aspect_ratio):
    of_mode = layout(aspect_ratio)
    try:
        found = layout_of(width, height, of_mode)
    except ValueError:
        return
    tiles = preprocess(Image.new("RGB", (width, height), (255, 255, 255)), of_mode)
    assert tiles.shape == (found.num_tiles, 3, 384, 384)
    # Enlarging a line between grey borders leaves 9 of 16 parts of it where it falls between two pixels.
    assert tiles.min() >= -1 and tiles.max() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_arrange_keeps_places_and_dtype(dtype):
    """Tile t, patch p carry 1000 t + p, exact in float32: rows of the map can be read off."""
    of_mode = layout()
    size = (768, 384)
    found = layout_of(*size, of_mode)
    features = (1000 * torch.arange(3)[:, None] + torch.arange(729)).to(dtype)[..., None]
    tokens = arrange(features, size, of_mode, torch.full((1,), -1.0))
    assert tokens.dtype == dtype and found.unpad_out == (27, 54) and found.downsampled is None
    expected = torch.cat([torch.arange(27) + 1000, torch.arange(27) + 2000, torch.tensor([-1])])
    assert torch.equal(tokens[729 : 729 + 55, 0], expected.to(dtype))
    assert torch.equal(tokens[:729, 0], torch.arange(729).to(dtype))


def test_bilinear_is_done_in_float32():
    of_mode, size = layout(), (1600, 1200)
    torch.manual_seed(0)
    features = torch.randn(21, 729, 8).bfloat16()
    newline = torch.zeros(8)
    low = arrange(features, size, of_mode, newline)
    high = arrange(features.float(), size, of_mode, newline)
    assert torch.equal(low, high.bfloat16())


def test_arrange_refuses_another_number_of_tiles():
    with pytest.raises(ValueError, match="2 tiles given"):
        arrange(torch.zeros(2, 729, 1), (1600, 1200), layout(), torch.zeros(1))


def test_pinpoints_in_all_notations():
    expanded = [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)]
    points = parse_pinpoints(expanded, 384)
    assert points == parse_pinpoints("(1x1),...,(6x6)", 384) == parse_pinpoints(str(expanded), 384)
    assert len(points) == 36 and points[1] == (384, 768)


@pytest.mark.parametrize("value", [None, "", "six by six", [], [[384]], [[100, 384]], [[0, 384]], 7])
def test_bad_pinpoints(value):
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        parse_pinpoints(value, 384)


def test_ties_go_to_the_first_candidate():
    assert select_grid(10, 10, [(768, 384), (384, 768)]) == (768, 384)
    assert select_grid(10, 10, [(384, 768), (768, 384)]) == (384, 768)


@pytest.mark.parametrize("value", ["square", "anyres_max_0", "anyres_max_", "", None, 4])
def test_unknown_aspect_ratio(value):
    with pytest.raises(ValueError, match="image_aspect_ratio"):
        layout(value)


def test_other_merges_are_refused():
    config = SimpleNamespace(image_aspect_ratio="pad", mm_patch_merge_type="flat")
    with pytest.raises(ValueError, match="mm_patch_merge_type"):
        ImageLayoutConfig.from_hf_config(config, SimpleNamespace(image_size=384, patch_size=14))


def test_grid_limit_names_the_mode():
    for name in ("pad", "anyres", "anyres_max_4", "anyres_max_9"):
        of_mode = layout(name)
        assert layout().with_grid_limit(of_mode.grid_limit) == of_mode
        assert layout().with_aspect_ratio(name) == of_mode


def test_pad_needs_no_pinpoints_but_anyres_does():
    of_mode = layout("pad", None)
    assert num_visual_tokens(5, 5000, of_mode) == 730
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        of_mode.with_aspect_ratio("anyres")


def test_thin_images():
    assert layout_of(1, 1, layout()).num_tiles == 2
    assert layout_of(1, 3000, layout()).unpad_out[1] >= 1
    with pytest.raises(ValueError, match="at least one pixel"):
        layout_of(0, 10, layout())


MODES = [layout(), layout("anyres"), layout("pad"), pooled("anyres"), pooled("anyres", "spatial"), pooled("pad")]


@pytest.mark.parametrize("of_mode", MODES, ids=["anyres_max_4", "anyres", "pad", "pooled", "spatial", "pooled pad"])
@pytest.mark.parametrize("size", [(384, 384), (640, 300), (77, 1000)])
def test_places_of_visual_tokens(of_mode, size):
    """Newline tokens are one column behind the map, the others where `arrange` puts the features of their tiles."""
    feature = {"image_sizes": torch.tensor([size]), "grid_limits": torch.tensor([of_mode.grid_limit])}
    feature = SimpleNamespace(data={name: SimpleNamespace(data=value) for name, value in feature.items()})
    images = describe_images([feature, SimpleNamespace(data=None)], of_mode)
    found = layout_of(*size, of_mode)
    spans = [VisualSpan(3, 3 + found.num_visual_tokens), VisualSpan(5000, 5007)]
    places = visual_places(images, spans)
    assert places[found.num_visual_tokens :].tolist() == [[0, column] for column in range(7)]

    # What `arrange` does after pooling: here the tokens of a tile are its patches.
    of_mode = replace(of_mode, patches_per_side=of_mode.tokens_per_side, pooled_side=None)
    side = of_mode.patches_per_side
    features = torch.zeros(found.num_tiles, side * side, 2)
    features[0] = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # row and column in the overview
    tokens = arrange(features, size, of_mode, torch.tensor([-1.0, -1.0]))
    is_newline = (tokens < 0).all(dim=1).numpy()
    overview, rest = places[: side * side], places[side * side : found.num_visual_tokens]
    assert overview.tolist() == tokens[: side * side].tolist()
    if not of_mode.unpads:
        assert not is_newline.any()
        assert rest.tolist() == [list(divmod(i, found.unpad_out[1])) for i in range(len(rest))]
        return
    assert (rest[:, 1] == rest[:, 1].max()).tolist() == is_newline[side * side :].tolist()
    starts = np.flatnonzero(is_newline)[:-1] + 1
    if len(rest) > 1:
        assert rest[0].tolist() == [0, 0]
        assert places[starts].tolist() == [[row + 1, 0] for row in range(len(starts))]


LAVIDA_IMAGES = {
    case.image_record["file"] + "".join(case.config_overrides.values()): case
    for case in lavida_cases.all_cases()
    if case.image_record
}


@pytest.mark.parametrize("case", LAVIDA_IMAGES.values(), ids=LAVIDA_IMAGES)
def test_pooled_views_are_the_recorded_ones(case):
    record, overrides = case.image_record, case.config_overrides
    of_case = pooled(overrides.get("image_aspect_ratio", "anyres"), overrides.get("mm_patch_merge_type"))
    found = layout_of(*record["size"], of_case)
    assert (found.num_tiles, found.num_visual_tokens) == (record["views"], record["visual_tokens"])
    tiles = preprocess(lavida_cases.image(case), of_case).numpy().astype(np.float64)
    stats = record["pixel_values"]
    assert list(tiles.shape) == stats["shape"] or [*tiles.shape[1:]] == stats["shape"]
    for name, total in (("sum", tiles.sum()), ("abs_sum", np.abs(tiles).sum()), ("sq_sum", (tiles**2).sum())):
        assert total == pytest.approx(stats[name], rel=1e-9)


@pytest.mark.parametrize("merge_type", ["spatial_unpad", "spatial"])
@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.sampled_from(["anyres", "anyres_max_4", "pad"]))
def test_pooled_count_is_what_arrange_returns(merge_type, width, height, aspect_ratio):
    of_mode = pooled(aspect_ratio, merge_type)
    try:
        found = layout_of(width, height, of_mode)
    except ValueError as error:
        assert "too thin" in str(error) and merge_type == "spatial_unpad"
        return
    tokens = arrange(torch.zeros(found.num_tiles, 729, 2), (width, height), of_mode, torch.ones(2))
    assert tokens.shape == (found.num_visual_tokens, 2)
    assert found.num_visual_tokens <= num_visual_tokens(*largest_image(of_mode), of_mode)
    assert merge_type == "spatial_unpad" or found.num_visual_tokens == 196 * found.num_tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_is_bilinear_and_in_float32(dtype):
    """Along a side, token i lies at patch (i + 0.5) * 27 / 14 - 0.5: what a ramp of patches shows there."""
    of_mode = pooled("pad", "spatial")
    ramp = torch.arange(27.0).repeat(27)[None, :, None]
    tokens = arrange(ramp.to(dtype), (384, 384), of_mode, torch.zeros(1))
    expected = ((torch.arange(14) + 0.5) * 27 / 14 - 0.5).clamp(0, 26).repeat(14)
    assert tokens.dtype == dtype
    assert torch.allclose(tokens[:, 0], expected.to(dtype), rtol=0, atol=0 if dtype == torch.bfloat16 else 1e-5)


def test_only_a_pooling_layout_reads_the_pooling_mode():
    vision = SimpleNamespace(image_size=384, patch_size=14)
    config = SimpleNamespace(image_aspect_ratio="pad", mm_spatial_pool_mode="average")
    assert ImageLayoutConfig.from_hf_config(config, vision).pooled_side is None
    with pytest.raises(ValueError, match="mm_spatial_pool_mode='average'"):
        lavida_layout(config, vision)
    config = SimpleNamespace(image_aspect_ratio="pad", mm_patch_merge_type="flat")
    with pytest.raises(ValueError, match="only 'spatial_unpad' or 'spatial'"):
        lavida_layout(config, vision)
    assert lavida_layout(SimpleNamespace(image_aspect_ratio="pad"), SimpleNamespace(image_size=168, patch_size=14)) == (
        replace(pooled("pad", pinpoints=None), tile_size=168, patches_per_side=12, pooled_side=6)
    )
