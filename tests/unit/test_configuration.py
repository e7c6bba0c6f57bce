"""Checkpoint configs: vision sizes from three places, rope, token ids."""

import json
import pickle
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoTokenizer

from vllm_dvlm.checkpoint.configuration import (
    LlavaLLaDAConfig,
    TokenIds,
    checkpoint_config,
    find_vision_config,
    resolve_image_token_id,
    resolve_token_ids,
    resolve_vision_config,
)
from vllm_dvlm.synthetic import tiny_checkpoint

OFFICIAL = {
    "<|startoftext|>": 126080,
    "<|endoftext|>": 126081,
    "<|mdm_mask|>": 126336,
    "<|start_header_id|>": 126346,
    "<|end_header_id|>": 126347,
    "<|eot_id|>": 126348,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint.build(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint, config=LlavaLLaDAConfig())


class FakeTokenizer(dict):
    """A vocabulary with the few attributes that are read."""

    bos_token_id = eos_token_id = mask_token_id = None

    def get_vocab(self):
        return dict(self)


def test_text_fields(checkpoint):
    config = LlavaLLaDAConfig.from_pretrained(checkpoint)
    raw = json.loads((checkpoint / "config.json").read_text())
    for key in ("hidden_size", "num_attention_heads", "vocab_size", "eos_token_id", "bos_token_id"):
        assert getattr(config, key) == raw[key]
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    assert config.get_text_config() is config
    assert not hasattr(config, "canvas_length")  # vLLM would take it for a DiffusionGemma


def test_vision_config_from_the_sub_folder(checkpoint):
    vision = resolve_vision_config(LlavaLLaDAConfig.from_pretrained(checkpoint))
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (32, 3, 2)
    assert (vision.image_size, vision.patch_size) == (384, 14)


def test_vision_config_in_config_json_wins(checkpoint):
    given = {"hidden_size": 32, "num_hidden_layers": 5, "model_type": "siglip_vision_model"}
    config = LlavaLLaDAConfig.from_pretrained(checkpoint, vision_config=given)
    assert resolve_vision_config(config).num_hidden_layers == 5


def test_two_tower_config_in_the_sub_folder(tmp_path):
    folder = tmp_path / "my-siglip"
    folder.mkdir()
    vision = {"hidden_size": 48, "model_type": "siglip_vision_model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    assert find_vision_config("my-siglip", str(tmp_path)).hidden_size == 48
    assert find_vision_config("some/other/my-siglip", str(tmp_path)).hidden_size == 48


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("google/siglip-so400m-patch14-384", (1152, 4304, 27, 16, 14, 384)),
        ("google/siglip2-so400m-patch14-384", (1152, 4304, 27, 16, 14, 384)),
        ("models/siglip2-so400m-patch14-384", (1152, 4304, 27, 16, 14, 384)),
        ("google/siglip-base-patch16-224", (768, 3072, 12, 12, 16, 224)),
        ("google/siglip2-large-patch16-512", (1024, 4096, 24, 16, 16, 512)),
    ],
)
def test_vision_config_by_hub_name(name, sizes):
    vision = LlavaLLaDAConfig(mm_vision_tower=name).vision_config
    found = (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers)
    found += (vision.num_attention_heads, vision.patch_size, vision.image_size)
    assert found == sizes and vision.hidden_act == "gelu_pytorch_tanh"


def test_unknown_towers_and_widths():
    config = LlavaLLaDAConfig(mm_vision_tower="openai/clip-vit-large-patch14-336")
    with pytest.raises(ValueError, match="hf-overrides"):
        resolve_vision_config(config)
    config = LlavaLLaDAConfig(mm_vision_tower="google/siglip-so400m-patch14-384", mm_hidden_size=9)
    with pytest.raises(ValueError, match="mm_hidden_size=9"):
        resolve_vision_config(config)
    with pytest.raises(ValueError, match="clip_vision_model"):
        LlavaLLaDAConfig(vision_config={"model_type": "clip_vision_model"})


def test_survives_pickle_and_disk(checkpoint, tmp_path):
    config = LlavaLLaDAConfig.from_pretrained(checkpoint)
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    again = LlavaLLaDAConfig.from_pretrained(tmp_path)
    assert again.vision_config.to_dict() == config.vision_config.to_dict()
    assert again.rope_parameters == config.rope_parameters


def test_auto_config(checkpoint):
    AutoConfig.register("llava_llada", checkpoint_config("llava_llada"), exist_ok=True)
    assert isinstance(AutoConfig.from_pretrained(checkpoint), LlavaLLaDAConfig)


@pytest.mark.parametrize(
    ("architectures", "said"),
    [(["LlavaLladaForSomethingElse"], "not known to vllm-dvlm"), ([], "names no architectures")],
)
def test_another_family_of_the_same_model_type_is_refused(tmp_path, architectures, said):
    """Its sizes have other names, so ours would silently be the defaults of an 8B model."""
    AutoConfig.register("llava_llada", checkpoint_config("llava_llada"), exist_ok=True)
    config = {"model_type": "llava_llada", "architectures": architectures, "d_model": 64, "n_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{said}.*LlavaLLaDAModelLM"):
        AutoConfig.from_pretrained(tmp_path)


def test_token_ids_of_the_official_vocabulary(checkpoint, tokenizer):
    config = LlavaLLaDAConfig.from_pretrained(checkpoint)
    assert resolve_token_ids(config, tokenizer) == TokenIds(
        mask_token_id=126336,
        bos_token_id=126080,
        eos_token_id=126081,
        end_of_turn_token_id=126348,
        forbidden_token_ids=(126080, 126081, 126346, 126347),
        num_tokens=126349,
    )
    assert resolve_image_token_id(config, tokenizer) == 126349


def test_config_of_the_release_names_a_wrong_bos():
    config = LlavaLLaDAConfig(bos_token_id=128000)
    assert resolve_token_ids(config, FakeTokenizer(OFFICIAL)).bos_token_id == 126080


def test_other_vocabularies():
    config = LlavaLLaDAConfig(vocab_size=10, mask_token_id=7, eos_token_id=3)
    ids = resolve_token_ids(config, FakeTokenizer(a=0, b=1))
    assert ids.mask_token_id == 7 and ids.forbidden_token_ids == (3,)
    assert ids.end_of_turn_token_id is None and ids.bos_token_id is None
    config.forbidden_token_ids = [5, 4]
    config.end_of_turn_token_id = 2
    ids = resolve_token_ids(config, FakeTokenizer(a=0, b=1))
    assert ids.forbidden_token_ids == (4, 5) and ids.end_of_turn_token_id == 2


def test_token_id_errors():
    with pytest.raises(ValueError, match="No mask token"):
        resolve_token_ids(LlavaLLaDAConfig(), FakeTokenizer(a=0))
    with pytest.raises(ValueError, match="mask_token_id=10 lies outside"):
        resolve_token_ids(LlavaLLaDAConfig(vocab_size=10, mask_token_id=10), FakeTokenizer(a=0))
    with pytest.raises(ValueError, match="forbidden_token_ids contains 11"):
        config = LlavaLLaDAConfig(vocab_size=10, mask_token_id=1, forbidden_token_ids=[11])
        resolve_token_ids(config, FakeTokenizer(a=0))


def test_image_token_id():
    vocab = FakeTokenizer(OFFICIAL)
    config = LlavaLLaDAConfig(image_token_index=-200)
    assert resolve_image_token_id(config, vocab) == 126349
    config.image_token_index = 126400
    assert resolve_image_token_id(config, vocab) == 126400
    for taken in (126336, 126346, 126348, 126464):
        config.image_token_index = taken
        with pytest.raises(ValueError, match="image_token_index"):
            resolve_image_token_id(config, vocab)
    assert resolve_image_token_id(SimpleNamespace(vocab_size=9), FakeTokenizer({"<image>": 3})) == 3
    full = SimpleNamespace(vocab_size=2)
    reserved = FakeTokenizer({"a": 0, "<|reserved_token_0|>": 1})
    assert resolve_image_token_id(full, reserved) == 1
    with pytest.raises(ValueError, match="no unused id"):
        resolve_image_token_id(full, FakeTokenizer(a=0, b=1))
