"""Random checkpoints, loop timing and report files."""

import argparse
import csv
import dataclasses
import json

import pytest
import torch
from safetensors import safe_open

from vllm_dvlm.bench import baselines, common
from vllm_dvlm.reference.lavida_model import LavidaModel
from vllm_dvlm.reference.loops import lean_loop
from vllm_dvlm.reference.model import ReferenceModel
from vllm_dvlm.synthetic.checkpoint_files import SIZES_8B, Sizes
from vllm_dvlm.synthetic.random_checkpoint import write_random_checkpoint
from vllm_dvlm.synthetic.random_lavida import write_random_lavida

SIZES = Sizes(hidden=32, layers=2, heads=2, intermediate=48, vision_hidden=16, vision_layers=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ReferenceModel.load(write_random_checkpoint(tmp_path_factory.mktemp("random"), SIZES))


def test_random_checkpoint_has_the_tensors_of_the_tiny_one(model, tmp_path):
    from vllm_dvlm.synthetic.tiny_checkpoint import checkpoint

    def names(folder):
        with safe_open(folder / "model.safetensors", "pt") as weights:
            return {name for name in weights.keys() if "layers" not in name}  # noqa: SIM118

    assert names(model.folder) == names(checkpoint(tmp_path, seed=0))
    assert (model.text.num_layers, model.vision.num_layers) == (2, 2)


def test_random_checkpoint_repeats_and_refuses(model, tmp_path):
    again = ReferenceModel.load(write_random_checkpoint(tmp_path, SIZES))
    assert torch.equal(again.text.head, model.text.head)
    with pytest.raises(ValueError, match="vocab_rows"):
        write_random_checkpoint(tmp_path, Sizes(vocab_rows=1000))
    with pytest.raises(ValueError, match="multiple"):
        write_random_checkpoint(tmp_path, Sizes(hidden=30, heads=4))


def test_random_lavida_has_the_same_weights_under_its_own_names(model, tmp_path):
    from vllm_dvlm.synthetic.lavida_files import LLADA
    from vllm_dvlm.synthetic.tiny_lavida import tensors

    lavida = LavidaModel.load(write_random_lavida(tmp_path, SIZES))
    assert torch.equal(lavida.text.head, model.text.head)
    for ours, theirs in zip(lavida.text.layers, model.text.layers, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(lavida.vision.image_newline, model.vision.image_newline)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    # Two layers of the tiny checkpoint's four.
    assert names == {name for name in tensors(LLADA) if ".blocks.2." not in name and ".blocks.3." not in name}


def test_random_lavida_with_a_small_vocabulary(tmp_path):
    from vllm_dvlm.synthetic.checkpoint_files import MIN_VOCAB_ROWS, Ids

    sizes = dataclasses.replace(SIZES, vocab_rows=MIN_VOCAB_ROWS)
    small = LavidaModel.load(write_random_lavida(tmp_path, sizes))
    assert len(small.text.head) == MIN_VOCAB_ROWS and small.mask_id == Ids(MIN_VOCAB_ROWS).mask


def test_a_small_vocabulary_has_the_same_tokens_at_its_end(tmp_path):
    from transformers import PreTrainedTokenizerFast

    from vllm_dvlm.synthetic.checkpoint_files import MIN_VOCAB_ROWS, Ids

    rows = MIN_VOCAB_ROWS
    ids = Ids(rows)
    small = ReferenceModel.load(write_random_checkpoint(tmp_path, dataclasses.replace(SIZES, vocab_rows=rows)))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(tokenizer) == len(small.text.head) == ids.num_tokens == rows
    names = {"<|mdm_mask|>": ids.mask, "<|startoftext|>": ids.bos, "<|endoftext|>": ids.eos, "<|eot_id|>": rows - 1}
    assert tokenizer.convert_tokens_to_ids([*names]) == [*names.values()]
    assert tokenizer.decode(tokenizer.encode("What is in this image? µ")) == "What is in this image? µ"
    published = Ids()
    assert (published.shift, published.mask, published.end_of_turn) == (0, 126336, 126348)
    assert published.forbidden == (126080, 126081, 126346, 126347)


@pytest.mark.parametrize("sizes", [Sizes(), dataclasses.replace(SIZES_8B, layers=4)])
def test_replies_of_random_checkpoints_are_varied(sizes, tmp_path):
    """Equal tokens say little if one token fills the canvas."""
    model = ReferenceModel.load(write_random_checkpoint(tmp_path, sizes))
    prompt = baselines.make_prompt(model, "What is the color of the sky?")
    for options in (baselines.exact_options(32, 8, ids=sizes.ids), baselines.cached_options(32, ids=sizes.ids)):
        found = lean_loop(model, prompt, options).final_ids
        assert len(found) == 32 and len({*found}) >= 10, found


def test_both_loops_are_timed_and_agree(model):
    prompt = baselines.make_prompt(model, "What is the color of the sky?")
    for options in (baselines.exact_options(8, 4), baselines.cached_options(8, block_length=4)):
        timings = [
            time_loop(model, prompt, options, num_threads=1, num_repeats=2)
            for time_loop in (baselines.time_official_loop, baselines.time_lean_loop)
        ]
        official, lean = timings
        assert official.result.final_ids == lean.result.final_ids
        assert len(lean.result.final_ids) == 8
        assert len(lean.seconds) == 2 and lean.num_threads == 1
        assert lean.row()["num_forwards"] == len(lean.result.steps)


def test_report_writes_every_file(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    common.add_output_arguments(parser)
    paths = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "png")}
    arguments = parser.parse_args([f"--{kind}={path}" for kind, path in paths.items()])
    rows = [{"loop": "lean", "step_ms": 1.25}, {"loop": "official", "step_ms": 25.0, "note": "x"}]
    description = common.describe_run(torch.float32, seed=0, hidden=64)
    common.report(arguments, rows, {"N3_ratio": 1.5}, description, lambda axes: axes.plot([1, 2]))
    with paths["csv"].open() as file:
        assert [row["loop"] for row in csv.DictReader(file)] == ["lean", "official"]
    written = json.loads(paths["json"].read_text())
    assert written["N3_ratio"] == 1.5 and written["dtype"] == "float32" and written["hidden"] == 64
    assert written["peak_rss_gib"] > 0
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert "N3_ratio: 1.5" in capsys.readouterr().out


def test_table_is_aligned():
    table = common.format_table([{"name": "a", "ms": 1.5}, {"name": "long", "ms": None}])
    assert table.splitlines() == ["name   ms", "a     1.5", "long    -"]


def test_nested_figures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="N3"):
        common.write_json(tmp_path / "x.json", {"N3": [1]})
