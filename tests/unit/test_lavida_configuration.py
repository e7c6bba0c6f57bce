"""config.json of LaViDa checkpoints: the original keys under our names, and values that are refused."""

import json
import pickle

import pytest
from transformers import AutoConfig

from vllm_dvlm.checkpoint.anyres import lavida_layout
from vllm_dvlm.checkpoint.configuration import LlavaLLaDAConfig, checkpoint_config, resolve_vision_config
from vllm_dvlm.checkpoint.lavida_configuration import LavidaDreamConfig, LavidaLladaConfig
from vllm_dvlm.families import FAMILIES, LLADA_V, family_of
from vllm_dvlm.families.lavida import LAVIDA_DREAM, LAVIDA_LLADA
from vllm_dvlm.synthetic import checkpoint_files
from vllm_dvlm.synthetic import lavida_files as files
from vllm_dvlm.synthetic.lavida_files import DREAM, LLADA

CLASSES = {LLADA: LavidaLladaConfig, DREAM: LavidaDreamConfig}
KINDS = pytest.mark.parametrize("kind", [LLADA, DREAM], ids=lambda kind: kind.name)


@pytest.fixture(autouse=True)
def registered():
    for family in FAMILIES.values():
        AutoConfig.register(family.model_type, checkpoint_config(family.model_type), exist_ok=True)


@pytest.fixture
def load(tmp_path):
    """``load(kind, **changes)``: the config of a checkpoint with these keys changed, or taken out if "absent"."""

    def read(kind, **changes):
        files.write_configs(tmp_path, kind)
        path = tmp_path / "config.json"
        values = json.loads(path.read_text()) | changes
        checkpoint_files.write_json(path, {key: value for key, value in values.items() if value != "absent"})
        return AutoConfig.from_pretrained(tmp_path)

    return read


def test_architectures_tell_the_families_apart():
    for family in (LLADA_V, LAVIDA_LLADA, LAVIDA_DREAM):
        assert family_of([family.architecture]) is family
    assert LLADA_V.model_type == LAVIDA_LLADA.model_type
    assert LLADA_V.attentions == ("full",) and LAVIDA_LLADA.attentions[0] == LAVIDA_DREAM.attentions[0] == "prefix"


@KINDS
def test_sizes(kind, load):
    config, sizes = load(kind), kind.sizes
    assert type(config) is CLASSES[kind]
    assert config.get_text_config() is config
    assert (config.hidden_size, config.intermediate_size) == (sizes.hidden, sizes.intermediate)
    assert (config.num_hidden_layers, config.num_attention_heads) == (sizes.layers, sizes.heads)
    assert (config.num_key_value_heads, config.head_dim) == (sizes.num_kv_heads, sizes.hidden // sizes.heads)
    assert config.vocab_size == sizes.vocab_rows and config.hidden_act == "silu"
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": {LLADA: 5e5, DREAM: 1e6}[kind]}
    assert config.rms_norm_eps == {LLADA: 1e-5, DREAM: 1e-6}[kind]
    assert config.max_position_embeddings == 4096, "as long as the official code takes prompts"
    assert (config.attention_bias, config.qkv_bias) == (False, kind is DREAM)
    assert not config.tie_word_embeddings and config.mask_token_id == kind.mask


@KINDS
def test_image_layout(kind, load):
    config = load(kind)
    vision = resolve_vision_config(config)
    assert (vision.hidden_size, vision.num_hidden_layers) == (kind.sizes.vision_hidden, kind.sizes.vision_layers)
    assert config.image_layout() == config.image_layout(vision) == lavida_layout(config, vision)
    assert config.image_layout().tokens_per_side == 14 and config.image_layout().unpads
    assert not load(kind, mm_patch_merge_type="spatial").image_layout().unpads
    assert LlavaLLaDAConfig(mm_vision_tower="google/siglip-so400m-patch14-384").image_layout().tokens_per_side == 27


@KINDS
def test_survives_pickle_and_disk(kind, load, tmp_path):
    config = load(kind)
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path / "saved")
    again, names = AutoConfig.from_pretrained(tmp_path / "saved"), {"_name_or_path"}
    assert {k: v for k, v in again.to_dict().items() if k not in names} == {
        k: v for k, v in config.to_dict().items() if k not in names
    }


def test_original_names_may_be_overridden(load):
    """As --hf-overrides does, after loading; so may ours."""
    config = load(LLADA)
    config.update({"n_layers": 2, "max_sequence_length": 512})
    assert (config.num_hidden_layers, config.max_position_embeddings) == (2, 512) == (config.n_layers, 512)
    config.update({"num_hidden_layers": 3})
    assert config.n_layers == 3


def test_sizes_that_follow_from_others(load):
    assert load(LLADA, mlp_hidden_size=None, mlp_ratio=3).intermediate_size == 3 * LLADA.sizes.hidden
    assert load(LLADA, n_kv_heads=None).num_key_value_heads == LLADA.sizes.heads
    assert load(LLADA, n_kv_heads=2).num_key_value_heads == 2
    assert load(LLADA, include_qkv_bias=True).qkv_bias
    assert load(LLADA, weight_tying=True).tie_word_embeddings
    # Head and embedding have `embedding_size` rows, of which `vocab_size` are tokens.
    assert load(LLADA, vocab_size=126349, embedding_size=126464).vocab_size == 126464
    assert load(LLADA, embedding_size=None).vocab_size == 126464
    assert load(LLADA, hidden_size=7).hidden_size == LLADA.sizes.hidden


@pytest.mark.parametrize(
    ("kind", "key", "value", "works"),
    [
        (LLADA, "block_type", "sequential", "'llama'"),
        (LLADA, "block_group_size", 2, "1"),
        (LLADA, "activation_type", "swiglu", "'silu'"),
        (LLADA, "layer_norm_type", "default", "'rms'"),
        (LLADA, "layer_norm_with_affine", False, "True"),
        (LLADA, "bias_for_layer_norm", True, "False or None"),
        (LLADA, "attention_layer_norm", True, "False"),
        (LLADA, "include_bias", True, "False"),
        (LLADA, "multi_query_attention", True, "None or False"),
        (LLADA, "rope", False, "True"),
        (LLADA, "alibi", True, "False"),
        (LLADA, "input_emb_norm", True, "False"),
        (LLADA, "scale_logits", True, "False"),
        (LLADA, "embedding_size", 126349, "null or at least vocab_size=126464"),
        (LLADA, "mm_resampler_type", "spatial_pool", "None"),
        (DREAM, "use_sliding_window", True, "False"),
        (DREAM, "mm_resampler_type", "perceiver", "None"),
    ],
)
def test_what_cannot_be_computed_is_refused(load, kind, key, value, works):
    with pytest.raises(ValueError, match=f"{key}={value!r} in config.json is not supported, only {works}"):
        load(kind, **{key: value})
    if key != "embedding_size":
        load(kind, **{key: "absent"})


@KINDS
@pytest.mark.parametrize(
    ("key", "value"),
    [("mm_patch_merge_type", "flat"), ("mm_spatial_pool_mode", "max"), ("image_aspect_ratio", "highres")],
)
def test_images_that_cannot_be_laid_out_are_refused(kind, load, key, value):
    with pytest.raises(ValueError, match=f"{key}={value!r} is not supported"):
        load(kind, **{key: value}).image_layout()
