"""From text and images to prompt ids, spans, tiles and visual tokens, through vLLM's front end.

No engine runs: a stand-in model class carries the processor, so that neither the text backbone nor
the scheduler can spoil these tests.
"""

import asyncio
import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import MultiModalProcessorOnlyCache, engine_receiver_cache_from_config
from vllm.multimodal.encoder_budget import MultiModalBudget
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.renderers.registry import renderer_from_config

from tests.engine import prompt_rendering
from tests.engine.prompt_rendering import (
    GOLDEN,
    REFERENCE_PLACEHOLDER,
    engine_config,
    expanded,
    images_of,
    load,
    mm_options,
    render,
    same_as,
)
from vllm_dvlm.checkpoint import processing, renderer
from vllm_dvlm.models.vision import VisionStack, build_projector
from vllm_dvlm.synthetic import tiny_checkpoint

WITH_IMAGES = [
    "b1_image_steps_eq_gen",
    "b2_image_square",
    "b3_image_grid2x1",
    "b4_image_after_text",
]
WITH_IMAGES += ["b5_same_as_g1", "i1_two_images_anyres", "i2_two_images_pad", "i3_one_image_pad"]
WITH_IMAGES += ["l1_big_image_downsampled"]
TEXT_ONLY = ["a1_text_single_block", "a2_text_blocks_k2"]
PREPROCESSING = sorted(path.stem for path in GOLDEN.glob("p*.json"))


@pytest.fixture(scope="module", autouse=True)
def registered():
    prompt_rendering.register()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint.build(folder)
    return folder


@pytest.fixture(scope="module")
def config(checkpoint):
    return engine_config(checkpoint)


@pytest.fixture(scope="module")
def front_end(config):
    made = renderer_from_config(config)
    yield made
    made.shutdown()


@pytest.fixture
def fresh(front_end):
    front_end.clear_mm_cache()
    return front_end


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_ids_spans_and_tiles(fresh, name):
    case = load(name)
    prompt = {"prompt": case["prompt_text"], "multi_modal_data": {"image": images_of(case)}}
    same_as(case, render(fresh, {**prompt, **mm_options(case)}))


def test_pieces_of_any_tokenizer():
    """1 is BOS, 9 the placeholder; letters are their code points."""
    plain = lambda text: [1 if c == "^" else ord(c) for c in text]  # noqa: E731
    a, b, c = (ord(letter) for letter in "abc")
    pieces = renderer.tokenize_pieces
    assert pieces("^a<image>bc<image>", plain, 1, 9) == [1, a, 9, c, 9]
    assert pieces("^a<image><image>bc", plain, 1, 9) == [1, a, 9, 9, c]
    assert pieces("a<image>bc", plain, 1, 9) == [a, 9, b, c]
    assert pieces("<image>bc", plain, 1, 9) == [9, b, c]
    assert pieces("^a<image>bc", plain, None, 9) == [1, a, 9, b, c]
    with_bos = lambda text: [1, *plain(text)]  # noqa: E731
    assert pieces("a<image>bc<image>", with_bos, 1, 9) == [1, a, 9, b, c, 9]


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_ids_of_text(fresh, name):
    case = load(name)
    assert render(fresh, {"prompt": case["prompt_text"]})["prompt_token_ids"] == case["prompt_ids"]


@pytest.mark.parametrize("name", ["i1_two_images_anyres", "i3_one_image_pad"])
def test_async_path_and_token_prompts(fresh, name):
    case = load(name)
    extra = {"multi_modal_data": {"image": images_of(case)}, **mm_options(case)}
    ids = [126349 if i == REFERENCE_PLACEHOLDER else i for i in case["prompt_ids"]]
    for prompt in ({"prompt": case["prompt_text"]}, {"prompt_token_ids": ids}):
        same_as(case, asyncio.run(fresh.render_cmpl_async([{**prompt, **extra}]))[0])


def test_cached_images_need_no_work_and_change_nothing(fresh, monkeypatch):
    case = load("i1_two_images_anyres")
    prompt = {"prompt": case["prompt_text"], "multi_modal_data": {"image": images_of(case)}}
    calls, real = [], processing.preprocess
    monkeypatch.setattr(processing, "preprocess", lambda *args: calls.append(0) or real(*args))
    first = render(fresh, dict(prompt))
    assert len(calls) == 2
    again = render(fresh, dict(prompt))
    assert len(calls) == 2, "both were cached"
    same_as(case, again)
    assert again["mm_hashes"] == first["mm_hashes"]
    # One of two cached, and in another order.
    big = Image.open(GOLDEN / "images" / "square_384x384.png")
    mixed = {"image": [images_of(case)[1], big]}
    result = render(fresh, {"prompt": case["prompt_text"], "multi_modal_data": mixed})
    assert len(calls) == 3
    assert [p.length for p in result["mm_placeholders"]["image"]] == [891, 1485]
    # A request's own mode is another entry.
    case = load("i2_two_images_pad")
    prompt = {"prompt": case["prompt_text"], "multi_modal_data": {"image": images_of(case)}}
    same_as(case, render(fresh, {**prompt, **mm_options(case)}))


def test_refused_request_leaves_no_trace(fresh, config):
    """The front end always sends its images and the engine core keeps none, so they cannot differ.

    vLLM's default cache sends None for an image that it has rendered before.
    """
    assert isinstance(fresh.mm_processor_cache, MultiModalProcessorOnlyCache)
    assert engine_receiver_cache_from_config(config) is None
    case = load("b1_image_steps_eq_gen")
    prompt = {"prompt": case["prompt_text"], "multi_modal_data": {"image": images_of(case)}}
    render(fresh, dict(prompt))  # never reaches an engine
    again = render(fresh, dict(prompt))
    assert all(item is not None for item in again["mm_kwargs"]["image"])


def test_without_cache_images_keep_their_identity(checkpoint):
    front_end = renderer_from_config(engine_config(checkpoint, mm_processor_cache_gb=0))
    case = load("b1_image_steps_eq_gen")
    prompt = {"prompt": case["prompt_text"], "multi_modal_data": {"image": images_of(case)}}
    hashes = [render(front_end, dict(prompt))["mm_hashes"]["image"] for _ in range(2)]
    assert hashes[0] == hashes[1] and "renderer" not in hashes[0][0]
    front_end.shutdown()


@pytest.mark.parametrize(
    ("prompt", "num_images"),
    [("<image>\nHi", 0), ("Hi", 1), ("<image><image>", 1), ("<image>", 2), ("<image>", 0)],
)
def test_placeholders_must_match_images(fresh, prompt, num_images):
    image = Image.new("RGB", (20, 20))
    request = {"prompt": prompt}
    if num_images:
        request["multi_modal_data"] = {"image": [image] * num_images}
    with pytest.raises(VLLMValidationError, match="exactly once per image"):
        render(fresh, dict(request))
    with pytest.raises(VLLMValidationError, match="exactly once per image"):
        asyncio.run(fresh.render_cmpl_async([dict(request)]))


def test_expanded_prompt_is_not_expanded_again(fresh):
    case = load("b1_image_steps_eq_gen")
    ids = list(expanded(case, 126349))
    with pytest.raises(VLLMValidationError, match="869 image placeholder"):
        render(fresh, {"prompt_token_ids": ids, "multi_modal_data": {"image": images_of(case)}})


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "I", "F", "PA", "YCbCr"])
def test_images_of_any_mode(fresh, mode):
    image = Image.new("RGB", (40, 30), (200, 30, 60))
    if mode == "PA":
        image = image.convert("P").convert("PA")
    elif mode == "I;16":
        image = Image.fromarray(np.full((30, 40), 40000, dtype=np.uint16))
    else:
        image = image.convert(mode)
    assert image.mode == mode
    request = {"prompt": "<image>\nHi", "multi_modal_data": {"image": image}}
    item = render(fresh, request)["mm_kwargs"]["image"][0].get_data()
    overview = image.convert("RGB").resize((384, 384))
    expected = (np.asarray(overview, dtype=np.float32) / 255 - 0.5) / 0.5
    assert np.allclose(item["pixel_values"][0], expected.transpose(2, 0, 1), atol=1e-6)


def test_transparency_is_dropped_not_blended(fresh):
    image = Image.new("RGBA", (40, 30), (200, 30, 60, 0))
    assert processing.to_rgb(image).getpixel((0, 0)) == (200, 30, 60)
    assert fresh.model_config.multimodal_config.media_io_kwargs["image"]["image_mode"] is None
    path = GOLDEN / "images" / "small_97x61.png"
    from_http = ImageMediaIO(image_mode=None).load_bytes(path.read_bytes())
    request = {"prompt": "<image>", "multi_modal_data": {"image": [from_http]}}
    assert render(fresh, request)["mm_placeholders"]["image"][0].length == 1205


def test_arrays(fresh):
    pixels = np.asarray(Image.open(GOLDEN / "images" / "small_97x61.png"))
    # A bare 3-D tensor means embeddings to vLLM.
    for array in (pixels, pixels.transpose(2, 0, 1), [torch.from_numpy(pixels.copy())]):
        request = {"prompt": "<image>", "multi_modal_data": {"image": array}}
        assert render(fresh, request)["mm_placeholders"]["image"][0].length == 1205
    for bad in (pixels.astype(np.float32), np.zeros((5, 5, 5), np.uint8)):
        request = {"prompt": "<image>", "multi_modal_data": {"image": [bad]}}
        with pytest.raises(VLLMValidationError, match="are no image"):
            render(fresh, request)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 1000), (385, 1), (800, 2)])
def test_odd_sizes_work_or_are_refused(fresh, size):
    request = {"prompt": "<image>", "multi_modal_data": {"image": Image.new("RGB", size)}}
    try:
        result = render(fresh, request)
    except VLLMValidationError as error:
        assert "too thin" in str(error)
    else:
        assert result["mm_placeholders"]["image"][0].length > 729


def test_unusable_options(fresh):
    request = {"prompt": "<image>", "multi_modal_data": {"image": Image.new("RGB", (900, 900))}}
    for options, message in (
        ({"image_aspect_ratio": "square"}, "anyres_max_N"),
        ({"aspect": "pad"}, "not settings"),
        ({"images_kwargs": 3}, "not settings"),
        ({"image_aspect_ratio": "anyres"}, "sized for"),
    ):
        with pytest.raises(VLLMValidationError, match=message):
            render(fresh, {**request, "mm_processor_kwargs": options})


def test_announced_size_is_checked_before_decoding(front_end):
    """A header of 30000 x 30000 pixels: Pillow's own error would become HTTP 500."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    png += struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT" + b"\0" * 8
    with pytest.raises(ValueError, match="VLLM_MAX_IMAGE_PIXELS"):
        ImageMediaIO(image_mode=None).load_bytes(png)


def test_a_square_is_bounded_before_it_is_made(fresh):
    """A kilobyte of PNG may name a million pixels in a row; the square of its side would take terabytes."""
    request = {"prompt": "<image>", "multi_modal_data": {"image": Image.new("RGB", (1_000_000, 1))}}
    request["mm_processor_kwargs"] = {"image_aspect_ratio": "pad"}
    with pytest.raises(VLLMValidationError, match="padded to 1000000x1000000.*VLLM_MAX_IMAGE_PIXELS"):
        render(fresh, request)


def test_images_that_fit_into_no_prompt_are_not_cut_into_tiles(fresh, monkeypatch):
    """Otherwise one request with a thousand large pictures takes memory and time from everybody."""
    monkeypatch.setattr(processing, "preprocess", lambda *args: pytest.fail("an image was cut into tiles"))
    images = [Image.new("RGB", (900, 900), (i, 0, 0)) for i in range(9)]
    request = {"prompt": "<image>" * 9, "multi_modal_data": {"image": images}}
    with pytest.raises(VLLMValidationError, match=r"tokens with those of its 9 image\(s\).*fewer or smaller images"):
        render(fresh, request)


def test_image_embeddings_are_refused(fresh):
    request = {"prompt": "<image>", "multi_modal_data": {"image": torch.zeros(1, 7, 64)}}
    with pytest.raises(VLLMValidationError):
        render(fresh, request)


def test_server_options(checkpoint):
    limited = engine_config(checkpoint, hf_overrides={"max_image_tiles": 5})
    front_end = renderer_from_config(limited)
    request = {"prompt": "<image>", "multi_modal_data": {"image": Image.new("RGB", (1600, 1200))}}
    with pytest.raises(VLLMValidationError, match="needs 21 tiles.*takes 5.*pad"):
        render(front_end, dict(request))
    pad = {"mm_processor_kwargs": {"image_aspect_ratio": "pad"}}
    assert render(front_end, {**request, **pad})["mm_placeholders"]["image"][0].length == 730
    info = front_end.mm_processor.info
    assert info.get_mm_max_tokens_per_item(16384, {"image": 1})["image"] == 729 + 27 * 4 * 28
    front_end.shutdown()
    padded = engine_config(checkpoint, mm_processor_kwargs={"image_aspect_ratio": "pad"})
    front_end = renderer_from_config(padded)
    assert render(front_end, dict(request))["mm_placeholders"]["image"][0].length == 730
    front_end.shutdown()


def test_budgets_follow_tokens_and_profiling_follows_tiles(front_end, checkpoint):
    """The image with most visual tokens is another one than the one that takes most memory to encode."""
    processor = front_end.mm_processor
    promised = processor.info.get_mm_max_tokens_per_item(16384, {"image": 1})["image"]
    assert promised == 729 + 129 * 28 == 4341
    assert processor.info.get_mm_max_tokens_per_item(100, {"image": 1})["image"] == 100
    assert len(dummy_pixels(processor)) == 37
    limited = renderer_from_config(engine_config(checkpoint, hf_overrides={"max_image_tiles": 9}))
    assert len(dummy_pixels(limited.mm_processor)) == 9
    limited.shutdown()


def dummy_pixels(processor):
    return processor.get_dummy_mm_inputs({"image": 1})["mm_kwargs"]["image"][0].get_data()["pixel_values"]


@pytest.fixture(scope="module")
def vision(no_engine, config, checkpoint, tmp_path_factory):
    """The vision stack with the checkpoint's weights, on one rank without an engine."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.parallel_state import (
        init_distributed_environment,
        initialize_model_parallel,
    )

    store = tmp_path_factory.mktemp("dist") / "store"
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        initialize_model_parallel(1, 1)

        class Holder(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.vision = VisionStack(config, prefix="vision")

        holder = Holder()
        weights = load_file(checkpoint / "model.safetensors").items()
        mapper = VisionStack.weights_mapper("vision.")
        mapped = [(n, w) for n, w in mapper.apply(weights) if n.startswith("vision.")]
        loaded = AutoWeightsLoader(holder).load_weights(mapped)
        assert loaded == {name for name, _ in holder.named_parameters()}
        process_weights_after_loading(holder, config.model_config, torch.device("cpu"))
        yield holder.vision.eval()
    cleanup_dist_env_and_memory()


def statistics(values):
    a = values.double().numpy()
    rows, columns = np.arange(a.shape[0])[:, None], np.arange(a.shape[1])
    wave = np.cos(0.1 * rows + 0.7 * columns)
    return {"sum": a.sum(), "abs_sum": np.abs(a).sum(), "cos_checksum": (a * wave).sum()}


def assert_close(values, recorded):
    assert list(values.shape) == recorded["shape"]
    found = statistics(values)
    for key in ("sum", "abs_sum", "cos_checksum"):
        assert math.isclose(found[key], recorded[key], abs_tol=1e-5 * recorded["abs_sum"]), key


@torch.no_grad()
@pytest.mark.parametrize("name", PREPROCESSING)
def test_tower_and_projector(fresh, vision, name):
    case = load(name)
    image = Image.open(GOLDEN / "images" / case["image"]["file"])
    ratio = {"image_aspect_ratio": case["image_aspect_ratio"]}
    request = {"prompt": "<image>", "multi_modal_data": {"image": image}}
    result = render(fresh, {**request, "mm_processor_kwargs": ratio})
    pixel_values = result["mm_kwargs"]["image"][0].get_data()["pixel_values"]
    tower = vision.vision_tower(pixel_values)
    projected = vision(pixel_values)
    for index in range(len(pixel_values)):
        assert_close(tower[index], case["vision_tower_output"][index])
        assert_close(projected[index], case["projector_output"][index])
    assert np.allclose(tower[0, 0], case["vision_tower_first_token"], atol=1e-4)
    assert np.allclose(projected[0, 0], case["projector_first_token"], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [*PREPROCESSING[1:], "b1_image_steps_eq_gen", "i2_two_images_pad"])
def test_merged_embeddings(fresh, vision, checkpoint, name):
    case = load(name)
    images = [case["image"]] if "image" in case else case["images"]
    if case.get("prompt_text") is None:
        begin, end = load("b1_image_steps_eq_gen")["prompt_text"].split("<image>\nPlease", 1)
        text = begin + "<image>" + end[end.index("<|eot_id|>") :]
    else:
        text = case["prompt_text"]
    ratio = case.get("image_aspect_ratio") or case["settings"].get("image_aspect_ratio")
    request = {
        "prompt": text,
        "multi_modal_data": {"image": [Image.open(GOLDEN / "images" / i["file"]) for i in images]},
        "mm_processor_kwargs": {"image_aspect_ratio": ratio} if ratio else {},
    }
    result = render(fresh, request)
    items = [("image", item) for item in result["mm_kwargs"]["image"]]
    ((_, _, batch),) = group_and_batch_mm_kwargs(items)
    tokens = vision.embed_multimodal(**batch)
    table = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    merged = table[torch.tensor(result["prompt_token_ids"])].clone()
    for place, rows in zip(result["mm_placeholders"]["image"], tokens, strict=True):
        merged[place.offset : place.offset + place.length] = rows
    recorded = case["merged_embeddings"]
    assert_close(merged, recorded["stats"])
    for row, values in recorded["rows"].items():
        assert np.allclose(merged[int(row)], values, atol=1e-4), row


@torch.no_grad()
def test_passes_of_the_tower_do_not_matter(vision, monkeypatch):
    torch.manual_seed(0)
    pixel_values = torch.randn(5, 3, 384, 384)
    whole = vision(pixel_values)
    monkeypatch.setattr("vllm_dvlm.models.vision._TILES_PER_PASS", 2)
    assert torch.allclose(vision(pixel_values), whole, atol=1e-4)


@torch.no_grad()
def test_passes_are_shared_by_small_images_alone(fresh, vision, monkeypatch):
    """Each image's tokens are those it has alone; a pass takes small images together, and no large one with another."""
    sizes = [(384, 384), (384, 300), (1600, 1200), (300, 384), (384, 384), (97, 61)]
    images = [Image.effect_noise(size, 60).convert("RGB") for size in sizes]
    items = [("image", item_of(fresh, image)) for image in images]
    ((_, _, batch),) = group_and_batch_mm_kwargs(items)
    passes = []
    forward = vision.vision_tower.forward

    def counted(pixel_values):
        passes.append(len(pixel_values))
        return forward(pixel_values)

    monkeypatch.setattr(vision.vision_tower, "forward", counted)
    together = vision.embed_multimodal(**batch)
    assert passes == [4, 16, 5, 6]
    for item, tokens in zip(items, together, strict=True):
        ((_, _, alone),) = group_and_batch_mm_kwargs([item])
        assert torch.allclose(vision.embed_multimodal(**alone)[0], tokens, atol=1e-4)


def item_of(front_end, image):
    return render(front_end, {"prompt": "<image>", "multi_modal_data": {"image": image}})["mm_kwargs"]["image"][0]


@torch.no_grad()
@pytest.mark.usefixtures("vision")  # its process groups
def test_no_image_takes_more_memory_than_was_profiled(fresh, checkpoint, tmp_path):
    """As many of the images that vLLM profiles at start-up as it takes, against a photo of 37 tiles, and against as
    many of those as a step's budget admits: what a pass needs beside its results is the same."""
    # As wide as it takes for the features to outweigh the tower's own tensors, as they do at full size.
    overrides = {"hidden_size": 1024, "mm_projector_type": "linear"}
    config = engine_config(checkpoint, max_model_len=16384, max_num_batched_tokens=16384, hf_overrides=overrides)
    with set_current_vllm_config(config):
        wide = VisionStack(config).eval()
        for parameter in wide.parameters():
            parameter.data.normal_(std=0.02)
        process_weights_after_loading(wide, config.model_config, torch.device("cpu"))
    budget = MultiModalBudget(config, MULTIMODAL_REGISTRY, enable_cache=False)
    photo = item_of(fresh, Image.effect_noise((2304, 2304), 60).convert("RGB"))
    num_tokens, num_tiles = 3699, len(photo.get_data()["pixel_values"])
    most = budget.get_encoder_budget() // num_tokens
    profiled = budget.get_dummy_encoder_profile_inputs()
    assert (num_tiles, len(profiled), most) == (37, 3, 4)
    peaks, results = {}, {}
    for name, items in {"profiled": profiled, "one": [("image", photo)], "most": [("image", photo)] * most}.items():
        ((_, _, batch),) = group_and_batch_mm_kwargs(items)
        peaks[name], tokens = peak_memory(lambda batch=batch: wide.embed_multimodal(**batch), tmp_path / name)
        results[name] = sum(x.nbytes for x in tokens)
    assert results["most"] == most * num_tokens * wide.image_newline.nbytes
    features = num_tiles * 729 * wide.image_newline.nbytes
    assert features < peaks["one"] <= peaks["profiled"]
    beside = {name: peaks[name] - results[name] for name in peaks}
    assert beside["most"] <= beside["profiled"] * 1.01
    # The features of one image, and the pass that makes the last of them or a few channels of the map made from them.
    assert beside["most"] < 2 * features


def peak_memory(run, file):
    """(most bytes that ``run`` held at a time, its result), as torch's allocator on the host reports them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    profile.export_chrome_trace(str(file))
    events = [e for e in json.loads(Path(file).read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = np.cumsum([e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])])
    return int(held.max()), result


def test_projectors():
    assert [n for n, _ in build_projector("mlp3x_gelu", 4, 8).named_parameters()] == [
        f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")
    ]
    assert build_projector("linear", 4, 8).weight.shape == (8, 4)
    with pytest.raises(ValueError, match="mm_projector_type"):
        build_projector("pooler", 4, 8)
