"""Config and tokenizer files of a made-up LLaDA-V checkpoint in the original folder layout.

The tokenizer is byte level: known words are one token, anything else is split into bytes, and the
special tokens sit at the ids of the published LLaDA tokenizer. Sources: sections "The checkpoint"
and points 1-3 of tests/golden/llada_v/README.md. Used by the random checkpoints of the benches and
by the tests' tiny checkpoint.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB_ROWS = 126464  # rows of embed_tokens and lm_head
NUM_TOKENS = 126349  # ids the tokenizer knows: 0 .. 126348
BOS, EOS, CLS, GMASK = 126080, 126081, 126082, 126083
MASK, START_HEADER, END_HEADER, EOT = 126336, 126346, 126347, 126348
VISION_FOLDER = "siglip2-tiny-patch14-384"  # the original loader wants "siglip" in the name
TILE_SIZE = 384
MIN_VOCAB_ROWS = 2048  # bytes, known words and special tokens

_SPECIAL_TEXTS = {
    BOS: "<|startoftext|>",
    EOS: "<|endoftext|>",
    CLS: "[CLS]",
    GMASK: "[gMASK]",
    MASK: "<|mdm_mask|>",
    126340: "<role>",
    126341: "</role>",
    126342: "<|arithmetic_start|>",
    126343: "<|arithmetic_end|>",
    126344: "<|number_start|>",
    126345: "<|number_end|>",
    START_HEADER: "<|start_header_id|>",
    END_HEADER: "<|end_header_id|>",
    EOT: "<|eot_id|>",
}

# Ids of the published tokenizer that prompts of the chat template rely on.
_FIXED_WORD_IDS = {"assistant": 598, "system": 3840}

_WORDS = """You are a helpful language and vision assistant able to understand the visual
content that user provides assist with variety of tasks using natural . , ? ! : ; ' " ( ) - /
What is in this image Please describe detail How many objects can you see which color shape
left right top bottom large small red green blue yellow black white circle square line box
Compare two images picture pictures first second third difference between them there it one
three four five six seven eight nine ten zero yes no not maybe Answer briefly question Tell me
about story short long sentence word count list name cat dog bird fish tree house car road
river mountain sky cloud sun moon star light dark day night morning evening water fire stone
metal wood paper glass book table chair door window wall floor roof garden flower grass leaf
hand head eye face man woman child people person city street shop market train boat plane bike
run walk jump sit stand look find make take give put go come say think know want need like love
old new good bad big tiny fast slow hot cold warm cool high low near far up down inside outside
before after now then here where when why who how because so but or if as at by for from into
on over under through during without within along across against all any both each few more most
other some such only own same than too very just also again once always never often sometimes
text number letter value figure chart plot axis label title legend row column cell sum total mean
max min part whole end begin start stop next last middle center edge corner side front back
we they he she his her its our their my your been being was were be have has had do does did
will would shall should may might must could get got made seen shown shows show contains
background foreground object scene photo drawing diagram map sign symbol pattern texture
brown orange purple pink gray gold silver round flat thin thick wide narrow open closed full
empty""".split()  # noqa: SIM905 - readable

# As LLaDA's tokenizer files have it: it knows neither the system text nor images.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}"
    "{{ c }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


@dataclass(frozen=True)
class Ids:
    """Ids of the special tokens of a vocabulary with this many rows.

    They are the published ones where those fit. A smaller vocabulary has the same tokens in the same order at its end.
    """

    vocab_rows: int = VOCAB_ROWS

    @property
    def shift(self) -> int:
        """How far below the published ids the special tokens lie."""
        return max(0, NUM_TOKENS - self.vocab_rows)

    @property
    def num_tokens(self) -> int:
        """Ids that the tokenizer knows; rows from here on have no text."""
        return NUM_TOKENS - self.shift

    @property
    def bos(self) -> int:
        return BOS - self.shift

    @property
    def eos(self) -> int:
        return EOS - self.shift

    @property
    def mask(self) -> int:
        return MASK - self.shift

    @property
    def end_of_turn(self) -> int:
        return EOT - self.shift

    @property
    def forbidden(self) -> tuple[int, ...]:
        """What the model never writes (golden README, point 24)."""
        return tuple(i - self.shift for i in (BOS, EOS, START_HEADER, END_HEADER))


@dataclass(frozen=True)
class Sizes:
    """Shape of a checkpoint; the defaults are those of the golden runs."""

    hidden: int = 64
    layers: int = 4
    heads: int = 4
    intermediate: int = 128
    vocab_rows: int = VOCAB_ROWS
    vision_hidden: int = 32
    vision_layers: int = 3  # the original loader drops the last one right after loading
    vision_heads: int = 2
    vision_intermediate: int = 64
    patch: int = 14
    kv_heads: int | None = None  # as `heads` if not given

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def ids(self) -> Ids:
        """Special tokens of a vocabulary of this size."""
        return Ids(self.vocab_rows)


# LLaDA 8B's work on a prompt of 3,700 tokens is 12 % attention and 6 to 7 % logits of every position. A prompt of about
# 480 has these shares here; the coarse patches make that of a small picture.
SIZES_8B = Sizes(hidden=512, layers=8, heads=8, intermediate=1536, vocab_rows=4096, patch=24)
IMAGE_8B = (97, 61)


def byte_chars() -> dict[int, str]:
    """Byte -> printable stand-in; in this order the newline gets id 198 and the space 220."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table


@functools.cache
def _vocabulary(ids: Ids) -> tuple[str, tuple[int, ...]]:
    """(text of tokenizer.json, ids of the words a random model may say)."""
    table = byte_chars()
    vocab = {char: i for i, char in enumerate(table.values())}
    fixed_ids = {} if ids.shift else _FIXED_WORD_IDS
    fixed, word_ids = set(fixed_ids.values()), []
    first_special = BOS - ids.shift
    free = (i for i in range(len(table), first_special) if i not in fixed)
    for word in dict.fromkeys([*_WORDS, *_FIXED_WORD_IDS]):
        for text in (word, " " + word):
            piece = "".join(table[byte] for byte in text.encode())
            if piece not in vocab:
                vocab[piece] = fixed_ids[text] if text in fixed_ids else next(free)
            if text[0] == " " and len(word) > 1:
                word_ids.append(vocab[piece])
    used = set(vocab.values())
    # Never produced when encoding; they keep len(tokenizer) at the published number.
    vocab |= {f"<filler_{i}>": i for i in range(first_special) if i not in used}
    special = {i - ids.shift: text for i, text in _SPECIAL_TEXTS.items()}
    unnamed = [i for i in range(first_special, ids.num_tokens) if i not in special]
    special |= {i: f"<|reserved_token_{n}|>" for n, i in enumerate(unnamed)}
    # Named tokens first: the order of the vocabulary is part of the recorded file digest.
    vocab |= {text: i for i, text in special.items()}
    return tokenizer_text(vocab, special, use_regex=True), tuple(sorted(set(word_ids)))


def tokenizer_text(vocab: dict[str, int], special: dict[int, str], use_regex: bool) -> str:
    """Text of tokenizer.json: byte-level BPE without merges.

    Args:
        vocab: ids by piece, the special ones included.
        special: texts of the special ids, found anywhere in a text.
        use_regex: cut into words first; needed where words are pieces.
    """
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": special[i], **flags} for i in sorted(special)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [],
        },
    }
    return json.dumps(tokenizer, ensure_ascii=False)


def word_ids(ids: Ids = Ids()) -> list[int]:  # noqa: B008 - frozen
    """Ids of the known words with a leading space, ascending."""
    return list(_vocabulary(ids)[1])


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, ids: Ids = Ids()) -> None:  # noqa: B008 - frozen
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    (folder / "tokenizer.json").write_text(_vocabulary(ids)[0], encoding="utf-8")
    names = {
        "bos_token": _SPECIAL_TEXTS[BOS],
        "eos_token": _SPECIAL_TEXTS[EOS],
        "pad_token": _SPECIAL_TEXTS[EOS],
        "cls_token": _SPECIAL_TEXTS[CLS],
    }
    settings = names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", names)


def llava_config(sizes: Sizes, torch_dtype: str = "float32") -> dict[str, Any]:
    """config.json as the original training code saves it.

    Origin of each value: golden README, "The checkpoint".
    """
    return {
        "architectures": ["LlavaLLaDAModelLM"],
        "model_type": "llava_llada",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": sizes.ids.bos,
        "eos_token_id": sizes.ids.eos,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate,
        "max_position_embeddings": 16384,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": torch_dtype,
        "transformers_version": "4.43.4",
        "use_cache": False,
        "vocab_size": sizes.vocab_rows,
        "mm_vision_tower": VISION_FOLDER,
        "vision_tower_pretrained": None,
        "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": sizes.vision_hidden,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_resampler_type": None,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_newline_position": "grid",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_spatial_pool_stride": None,
        "mm_spatial_pool_mode": "bilinear",
        "mm_projector_lr": None,
        "mm_vision_tower_lr": 2e-6,
        "image_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": [[w * TILE_SIZE, h * TILE_SIZE] for w in range(1, 7) for h in range(1, 7)],
        "image_crop_resolution": None,
        "image_split_resolution": None,
        "add_faster_video": False,
        "faster_token_stride": 10,
        "add_time_instruction": False,
        "force_sample": False,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 16384,
    }


def vision_config(sizes: Sizes, torch_dtype: str = "float32") -> dict[str, Any]:
    """config.json of the vision tower's own folder."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_intermediate,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "num_channels": 3,
        "image_size": TILE_SIZE,
        "patch_size": sizes.patch,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "torch_dtype": torch_dtype,
    }


def write_configs(folder: Path, sizes: Sizes, torch_dtype: str = "float32") -> None:
    """Write every file of the checkpoint except the weights."""
    (folder / VISION_FOLDER).mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, sizes.ids)
    write_json(folder / "config.json", llava_config(sizes, torch_dtype))
    write_json(folder / VISION_FOLDER / "config.json", vision_config(sizes, torch_dtype))
    generation = {"bos_token_id": sizes.ids.bos, "eos_token_id": sizes.ids.eos, "transformers_version": "4.43.4"}
    write_json(folder / "generation_config.json", generation)
