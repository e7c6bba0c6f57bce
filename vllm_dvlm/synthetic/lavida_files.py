"""Config and tokenizer files of made-up LaViDa checkpoints (LLaDA and Dream) in the original folder layout.

The tokenizer is byte level without merges: the id of a byte is its value, fillers keep the published number of ids,
and the special tokens sit where the published tokenizers have them. Source: tests/golden/lavida/README.md,
"Checkpoint" and "Prompt". Used by the random checkpoints of the benches and by the tests' tiny checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_dvlm.synthetic.checkpoint_files import TILE_SIZE, Sizes, byte_chars, tokenizer_text, vision_config, write_json

# Part of a tensor's name in the original layout -> in that of Hugging Face.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
OTHER_NAMES = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}

VISION_FOLDER = "siglip-tiny-patch14-384"  # the original loader wants "siglip" in the name
PINPOINTS = [[w * TILE_SIZE, h * TILE_SIZE] for w, h in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]

_LLADA_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_DREAM_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """One of the two LaViDa models: its vocabulary, special tokens and defaults of its tiny checkpoint.

    num_tokens: ids the tokenizer knows, 0 .. num_tokens - 1. first_special: smallest special id. unnamed: text of a
    special id that is not in `named`, with `{n}` = the id.
    """

    name: str
    sizes: Sizes
    num_tokens: int
    first_special: int
    named: dict[int, str] = field(repr=False, hash=False)
    unnamed: str
    bos: int
    eos: int
    mask: int
    template: str = field(repr=False)
    max_length: int = 4096

    def special_texts(self) -> dict[int, str]:
        """Every special token by id."""
        ids = range(self.first_special, self.num_tokens)
        return {i: self.named.get(i, self.unnamed.format(n=i)) for i in ids}


LLADA = Kind(
    name="lavida-llada",
    sizes=Sizes(),
    num_tokens=126349,
    first_special=126080,
    # The token of fill-in-the-middle drafts is <|reserved_token_1|>.
    named={
        126080: "<|startoftext|>",
        126081: "<|endoftext|>",
        126082: "[CLS]",
        126083: "[gMASK]",
        **{i: f"<|reserved_token_{i - 126084}|>" for i in range(126084, 126336)},
        126336: "<|mdm_mask|>",
        126346: "<|start_header_id|>",
        126347: "<|end_header_id|>",
        126348: "<|eot_id|>",
    },
    unnamed="<|tail_{n}|>",
    bos=126080,
    eos=126081,
    mask=126336,
    template=_LLADA_TEMPLATE,
)
DREAM = Kind(
    name="lavida-dream",
    sizes=replace(Sizes(), vocab_rows=152064, kv_heads=2),
    num_tokens=151667,
    first_special=151643,
    named={
        151643: "<|endoftext|>",
        151644: "<|im_start|>",
        151645: "<|im_end|>",
        151665: "<|beginoftext|>",
        151666: "<|mask|>",
    },
    unnamed="<|extra_{n}|>",
    bos=151665,
    eos=151643,
    mask=151666,
    template=_DREAM_TEMPLATE,
    max_length=131072,
)
KINDS = {kind.name: kind for kind in (LLADA, DREAM)}


def write_tokenizer(folder: Path, kind: Kind) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    vocab = {char: byte for byte, char in byte_chars().items()}
    # The published vocabularies have words there; nothing encodes to a filler.
    vocab |= {f"<filler_{i}>": i for i in range(256, kind.first_special)}
    special = kind.special_texts()
    text = tokenizer_text(vocab | {text: i for i, text in special.items()}, special, use_regex=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[kind.bos],
        "eos_token": special[kind.eos],
        "pad_token": special[kind.eos],
        "mask_token": special[kind.mask],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": kind.template,
        "model_max_length": kind.max_length,
        "padding_side": "right",
    }
    write_json(folder / "tokenizer_config.json", settings)


def multimodal_config(sizes: Sizes, torch_dtype: str) -> dict[str, Any]:
    """Keys of config.json that both kinds share."""
    return {
        "mm_vision_tower": VISION_FOLDER,
        "mm_hidden_size": sizes.vision_hidden,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": "grid",
        "mm_pooler_ratio": 2,
        "mm_resampler_type": None,
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": None,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": PINPOINTS,
        "tokenizer_model_max_length": 4096,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        "use_pos_skipping": False,
        "vision_tower_pretrained": "",
        "torch_dtype": torch_dtype,
    }


def llada_config(sizes: Sizes = LLADA.sizes, torch_dtype: str = "float32") -> dict[str, Any]:
    """config.json of LaViDa-LLaDA."""
    return {
        "architectures": ["LlavaLladaForMaskedDiffusion"],
        "model_type": "llava_llada",
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": sizes.hidden,
        "embedding_dropout": 0.0,
        "embedding_size": sizes.vocab_rows,
        "eos_token_id": sizes.ids.eos,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "cpu",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": sizes.ids.mask,
        "max_sequence_length": 4096,
        "mlp_hidden_size": sizes.intermediate,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": sizes.heads,
        "n_kv_heads": sizes.num_kv_heads,
        "n_layers": sizes.layers,
        "pad_token_id": sizes.ids.eos,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "use_cache": False,
        "vocab_size": sizes.vocab_rows,
        "weight_tying": False,
    } | multimodal_config(sizes, torch_dtype)


def dream_config(sizes: Sizes = DREAM.sizes, torch_dtype: str = "float32") -> dict[str, Any]:
    """config.json of LaViDa-Dream."""
    return {
        "architectures": ["LlavaDreamForMaskedDiffusion"],
        "model_type": "llava_dream",
        "attention_dropout": 0.0,
        "bos_token_id": DREAM.eos,
        "eos_token_id": DREAM.eos,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate,
        "mask_token_id": DREAM.mask,
        "max_position_embeddings": 131072,
        "max_window_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.num_kv_heads,
        "pad_token_id": DREAM.eos,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": sizes.vocab_rows,
    } | multimodal_config(sizes, torch_dtype)


def write_configs(folder: Path, kind: Kind, sizes: Sizes | None = None, torch_dtype: str = "float32") -> None:
    """Write every file of the checkpoint except the weights; `sizes` None: those of the golden runs.

    The tower's own folder, beside the checkpoint in a released one, lies inside: a checkpoint is one folder.
    """
    sizes = sizes or kind.sizes
    (folder / VISION_FOLDER).mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, kind)
    config = llada_config if kind is LLADA else dream_config
    write_json(folder / "config.json", config(sizes, torch_dtype))
    write_json(folder / VISION_FOLDER / "config.json", vision_config(sizes, torch_dtype))
    if kind is DREAM:
        generation = {"bos_token_id": kind.eos, "eos_token_id": kind.eos, "pad_token_id": kind.eos}
        write_json(folder / "generation_config.json", generation | {"mask_token_id": kind.mask})
