"""LaViDa checkpoints in their vLLM model classes: recorded embeddings, and logits of the dense reference and of the
official code's first tokens. No engine runs."""

import functools
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.engine.lavida_model import LoadedModel, process_group
from tests.golden import lavida_cases as cases
from vllm_dvlm.models.lavida import LlavaDreamForMaskedDiffusion, LlavaLladaForMaskedDiffusion
from vllm_dvlm.reference.lavida_model import LavidaModel
from vllm_dvlm.synthetic import tiny_lavida
from vllm_dvlm.synthetic.lavida_files import DREAM, LLADA

# One case per picture and way of laying it out.
IMAGES = {
    (case.kind.name, case.image_record["file"], *case.config_overrides.values()): case
    for case in cases.all_cases()
    if case.image_record and not case.records_defect
}
FULL = ["text_full", "img_full", "dream_text_full_maskgit", "dream_img_full_margin"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.getbasetemp() / "checkpoints"
    return functools.cache(lambda kind: tiny_lavida.checkpoint(root, kind))


@pytest.fixture(scope="module")
def group(no_engine, folders, tmp_path_factory):
    with process_group(tmp_path_factory.mktemp("group") / "store", model=str(folders(LLADA))):
        yield


@pytest.fixture(scope="module")
def loaded(folders, group):
    """``loaded(kind, **overrides)``: the checkpoint with these keys of config.json changed."""
    build = functools.cache(lambda kind, overrides: LoadedModel(folders(kind), **dict(overrides)))
    return lambda kind, **overrides: build(kind, tuple(overrides.items()))


@pytest.fixture(scope="module")
def references(folders):
    return functools.cache(lambda kind: LavidaModel.load(folders(kind)))


def test_classes(loaded):
    for kind, cls in ((LLADA, LlavaLladaForMaskedDiffusion), (DREAM, LlavaDreamForMaskedDiffusion)):
        model = loaded(kind).model
        assert type(model) is cls and model.token_ids.mask_token_id == kind.mask
        attention = model.model.layers[0].self_attn
        assert (attention.qkv_proj.bias is not None) == (kind is DREAM) and attention.o_proj.bias is None
        assert attention.num_kv_heads == kind.sizes.num_kv_heads


@pytest.mark.parametrize("case", IMAGES.values(), ids=map("-".join, IMAGES))
def test_merged_embeddings(case, loaded):
    """The tower in the checkpoint, not the one in its folder; other weights would be off by ones."""
    merged, span = loaded(case.kind, **case.config_overrides).merge(case)
    assert span == case.visual_spans[0]
    for name, rows in (("merged_embeds", merged), ("visual_embeds", merged[slice(*span)])):
        recorded, wide = case.raw[name], rows.double()
        assert list(rows.shape) == recorded["shape"]
        for row, values in ((rows[0], recorded["first_row"]), (rows[-1], recorded["last_row"])):
            assert row.tolist() == pytest.approx(values, rel=0, abs=1e-4)
        for key, values in (("sum", wide), ("abs_sum", wide.abs())):
            assert values.sum().item() == pytest.approx(recorded[key], rel=0, abs=0.05)
    if (whole := case.array("merged_embeds")) is not None:
        assert torch.allclose(merged, torch.from_numpy(whole), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FULL)
def test_full_attention(name, loaded, references):
    """One pass over prompt and canvas: the reference's hidden states and logits, the tokens recorded first."""
    case = cases.load(name)
    model, text = loaded(case.kind, **case.config_overrides), references(case.kind).text
    embeddings = model.with_canvas(case)
    assert len(embeddings) == case.forward_log[0][0]
    hidden = model.hidden(embeddings)
    logits = model.model.vocab_logits(hidden)
    with torch.inference_mode():
        expected = text.forward(embeddings[None])
        normed = F.rms_norm(expected, expected.shape[-1:], text.norm, text.eps)[0]
        assert torch.allclose(hidden, normed, rtol=1e-3, atol=1e-3)
        assert torch.allclose(logits, text.logits(expected)[0], rtol=1e-3, atol=5e-3)
    # Steps before the first that writes something see the same canvas. Dream's row i is about position i + 1.
    first = next(step for step in case.steps if step["tokens"])
    rows = torch.tensor(first["positions"]) + case.prompt_len - int(model.model.family.shifts_logits)
    assert logits[rows].argmax(-1).tolist() == first["tokens"]


def rewritten(folder, tmp_path, change, **config):
    """A copy of a checkpoint in one file, its tensors changed in place by `change`, the tower's folder without any."""
    tensors = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(file)
    change(tensors)
    shutil.copytree(folder, tmp_path / "changed", ignore=shutil.ignore_patterns("model*"))
    save_file(tensors, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    file = tmp_path / "changed" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return tmp_path / "changed"


def test_embedding_without_rows_behind_the_last_token(folders, loaded, tmp_path):
    """As the official loader leaves it: cut to the tokenizer's ids, the head as it was."""

    def cut(tensors):
        name = "model.transformer.wte.weight"
        tensors[name] = tensors[name][: LLADA.num_tokens].clone()

    table = LoadedModel(rewritten(folders(LLADA), tmp_path, cut)).model.model.embed_tokens.weight
    whole = loaded(LLADA).model.model.embed_tokens.weight
    assert table.shape == whole.shape and not table[LLADA.num_tokens :].any()
    assert torch.equal(table[: LLADA.num_tokens], whole[: LLADA.num_tokens])


def test_a_missing_part_of_a_joined_layer_is_named(folders, group, tmp_path):
    lost = "model.layers.1.self_attn.k_proj.bias"
    folder = rewritten(folders(DREAM), tmp_path, lambda tensors: tensors.pop(lost))
    with pytest.raises(ValueError, match=f"lacks 1 tensors, among them {lost}"):
        LoadedModel(folder)


def test_no_newline_vector_where_none_is_used(folders, loaded, tmp_path):
    """The official code writes none then."""
    case = cases.load("img_spatial_980")
    without = rewritten(folders(LLADA), tmp_path, lambda t: t.pop("model.image_newline"), **case.config_overrides)
    merged, _ = LoadedModel(without).merge(case)
    assert torch.equal(merged, loaded(LLADA, **case.config_overrides).merge(case)[0])


def test_tied_embedding(folders, loaded, tmp_path):
    """`weight_tying` of config.json; a head in the file would not be read."""
    tied = rewritten(folders(LLADA), tmp_path, lambda t: t.pop("model.transformer.ff_out.weight"), weight_tying=True)
    model = LoadedModel(tied).model
    rows = torch.randn(3, LLADA.sizes.hidden)
    table = loaded(LLADA).model.model.embed_tokens.weight
    assert torch.allclose(model.vocab_logits(rows), rows @ table.T, atol=1e-4)
