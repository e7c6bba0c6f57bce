"""What config classes of checkpoints share, the one of LLaDA-V, and the token ids and vision sizes that decoding needs
from a checkpoint.

Sources: tests/golden/llada_v/README.md, "The checkpoint" and points 10 and 24.
"""

import importlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig, SiglipVisionConfig

from vllm_dvlm.checkpoint.anyres import ImageLayoutConfig
from vllm_dvlm.families import LLADA_V, Family, family_of

# Sizes by name, for checkpoints that only name a hub tower: training writes no vision config into
# config.json [10]. hidden, intermediate, layers, heads; image and patch size are part of the name.
_SIGLIP_SIZES = {
    "base": (768, 3072, 12, 12),
    "large": (1024, 4096, 24, 16),
    "so400m": (1152, 4304, 27, 16),
    "giant-opt": (1536, 6144, 40, 16),
}
_SIGLIP_NAME = re.compile(r"siglip2?-(base|large|so400m|giant-opt)-patch(\d+)-(\d+)")


def checkpoint_config(model_type: str) -> type[PreTrainedConfig]:
    """The class for `AutoConfig`: reads a checkpoint with the config class of its family.

    Families share model types, so `architectures` decides; ValueError for one that is not known.
    """

    def from_dict(cls: type[PreTrainedConfig], config_dict: dict[str, Any], **kwargs: Any) -> Any:
        module, _, name = family_of(config_dict.get("architectures")).config.partition(":")
        return getattr(importlib.import_module(module), name).from_dict(config_dict, **kwargs)

    members = {"model_type": model_type, "from_dict": classmethod(from_dict), "__module__": __name__}
    return type("CheckpointConfig", (PreTrainedConfig,), members)


def load_config(model: str) -> "MaskedDiffusionConfig":
    """The config of a checkpoint folder or hub name, of the class of its family.

    OSError if there is no config.json; ValueError for one of no known family.
    """
    content = MaskedDiffusionConfig.get_config_dict(model)[0]
    return checkpoint_config(content.get("model_type", "")).from_dict(content)


def published_config(family: Family) -> "MaskedDiffusionConfig":
    """The config of the checkpoint that the authors of a family published; nothing is read or fetched."""
    fields = {"architectures": [family.architecture], "model_type": family.model_type, **dict(family.published)}
    return checkpoint_config(family.model_type).from_dict(fields)


class MaskedDiffusionConfig(PreTrainedConfig):
    """config.json of a checkpoint: text fields at the top level, image fields beside them.

    The fields here are what the model classes read, under the names of transformers, with LLaDA 8B's values; a family's
    own class sets `family` and `model_type`, and translates what its checkpoints call otherwise.

    `vision_config` is resolved while loading (see `resolve_vision_config`) and stays None where
    nothing tells it. `attention_bias`: biases of all four projections; `qkv_bias`: of all but the output's.
    `max_image_tiles` and the id fields from `mask_token_id` on are no keys of a release; they override what the
    tokenizer says.
    """

    family: ClassVar[Family]
    sub_configs = {"vision_config": SiglipVisionConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 126464
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 16384
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    attention_bias: bool = False
    qkv_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    vision_config: dict | PreTrainedConfig | None = None
    mm_vision_tower: str | None = None
    mm_hidden_size: int | None = None
    mm_projector_type: str = "mlp2x_gelu"
    mm_patch_merge_type: str = "spatial_unpad"
    mm_newline_position: str = "grid"
    image_aspect_ratio: str = "anyres_max_4"
    image_grid_pinpoints: list | str | None = "(1x1),...,(6x6)"
    max_image_tiles: int | None = None

    mask_token_id: int | None = None
    end_of_turn_token_id: int | None = None
    forbidden_token_ids: list[int] | tuple[int, ...] | None = None
    image_token_index: int | None = None

    # Read by the base class where config.json has no rope_theta.
    default_theta = 500000.0

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As the base class; the folder stays known, as it does through `AutoConfig`."""
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return {"name_or_path": str(pretrained_model_name_or_path), **fields}, kwargs

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        # Before the base class runs: it expects objects, not dicts, in `sub_configs`.
        if isinstance(self.vision_config, dict):
            self.vision_config = _siglip_config(self.vision_config)
        elif self.vision_config is None:
            self.vision_config = find_vision_config(self.mm_vision_tower, kwargs.get("name_or_path"))
        super().__post_init__(**kwargs)

    def image_layout(self, vision_config: Any = None) -> ImageLayoutConfig:
        """How the family turns an image into tiles and visual tokens; `vision_config` if it is not the config's own.

        ValueError, naming the key, for a value that is not supported.
        """
        return ImageLayoutConfig.from_hf_config(self, vision_config)


class LlavaLLaDAConfig(MaskedDiffusionConfig):
    """config.json of a LLaDA-V checkpoint; it has the names of transformers."""

    family = LLADA_V
    model_type = LLADA_V.model_type


def find_vision_config(tower: str | None, checkpoint: str | None) -> SiglipVisionConfig | None:
    """Sizes of a vision tower by its name, None if nothing known tells them.

    Of a tower outside the checkpoint nothing is downloaded.

    Args:
        tower: `mm_vision_tower`: a folder (inside the checkpoint or not), or the name of a SigLIP
            release.
        checkpoint: folder or hub name of the checkpoint.
    """
    if not tower:
        return None
    for file in _tower_files(tower, checkpoint):
        if file.is_file():
            return _siglip_config(json.loads(file.read_text(encoding="utf-8")))
    name = _SIGLIP_NAME.fullmatch(Path(tower).name)
    if name is None:
        return None
    hidden, intermediate, layers, heads = _SIGLIP_SIZES[name[1]]
    return SiglipVisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=int(name[2]),
        image_size=int(name[3]),
    )


def resolve_vision_config(config: Any) -> SiglipVisionConfig:
    """The vision config of a loaded checkpoint config.

    In this order: `vision_config` in config.json (or --hf-overrides), the sub-folder named by
    `mm_vision_tower`, a table of SigLIP releases. Raises ValueError with the remedy if none applies
    or the widths disagree.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise ValueError(
            f"Sizes of the vision tower {getattr(config, 'mm_vision_tower', None)!r} are unknown: "
            "put its folder with config.json inside the checkpoint, or pass --hf-overrides "
            "'{\"vision_config\": {...}}'."
        )
    width = getattr(config, "mm_hidden_size", None)
    if width is not None and width != vision.hidden_size:
        raise ValueError(
            f"mm_hidden_size={width} but the vision tower has hidden_size={vision.hidden_size}: "
            "correct one of them with --hf-overrides."
        )
    return vision


@dataclass(frozen=True)
class TokenIds:
    """Token ids with a role in decoding.

    Attributes:
        mask_token_id: the token of an undecided position.
        bos_token_id, eos_token_id: begin and end of text; None if the tokenizer has none.
        end_of_turn_token_id: ends an answer (a default stop); None if the tokenizer has none.
        forbidden_token_ids: never written at a masked position, ascending.
        num_tokens: ids below it decode to text; the rows of the embedding above it have none.
    """

    mask_token_id: int
    bos_token_id: int | None
    eos_token_id: int | None
    end_of_turn_token_id: int | None
    forbidden_token_ids: tuple[int, ...]
    num_tokens: int


def resolve_token_ids(config: Any, tokenizer: Any) -> TokenIds:
    """Find the token ids of a checkpoint.

    Explicit `mask_token_id`, `end_of_turn_token_id` and `forbidden_token_ids` of the config win;
    else the tokenizer is asked for the texts of the official vocabulary. `bos_token_id` and
    `eos_token_id` of the config come last: the release's config.json names a BOS that its
    vocabulary does not have.

    Raises ValueError if there is no mask token or an explicit id lies outside the vocabulary.
    """
    vocab, texts = tokenizer.get_vocab(), config.family.tokens
    mask = _first(
        _explicit(config, "mask_token_id"),
        vocab.get(texts.mask),
        _special(tokenizer, "mask_token_id"),
    )
    if mask is None:
        raise ValueError(
            f"No mask token: the tokenizer has neither {texts.mask!r} nor a mask_token. Name it "
            "with --hf-overrides '{\"mask_token_id\": ID}'."
        )
    bos = _first(vocab.get(texts.bos), _special(tokenizer, "bos_token_id"), _in_vocab(config, "bos_token_id"))
    eos = _first(vocab.get(texts.eos), _special(tokenizer, "eos_token_id"), _in_vocab(config, "eos_token_id"))
    forbidden = _explicit_many(config, "forbidden_token_ids")
    if forbidden is None:
        forbidden = [vocab[text] for text in texts.forbidden if text in vocab]
        if texts.bos in texts.forbidden:
            forbidden += [i for i in (bos, eos) if i is not None]
    return TokenIds(
        mask_token_id=mask,
        bos_token_id=bos,
        eos_token_id=eos,
        end_of_turn_token_id=_first(_explicit(config, "end_of_turn_token_id"), vocab.get(texts.end_of_turn)),
        forbidden_token_ids=tuple(sorted(set(forbidden))),
        num_tokens=len(tokenizer),
    )


def resolve_image_token_id(config: Any, tokenizer: Any) -> int:
    """The id that stands for visual tokens in a prompt; its embedding row is never read.

    `image_token_index` of the config if it is a usable id (the reference's -200 cannot be carried
    by vLLM); else the tokenizer's own `<image>` token; else the first id after the tokenizer's
    last, where the embedding has spare rows; else a reserved token. So text never produces it,
    except by its own name.

    Raises ValueError with the remedy if there is none, or if the explicit id has a role in
    decoding.
    """
    explicit = getattr(config, "image_token_index", None)
    if explicit is not None and explicit >= 0:
        ids = resolve_token_ids(config, tokenizer)
        taken = {ids.mask_token_id, ids.bos_token_id, ids.eos_token_id, ids.end_of_turn_token_id}
        if explicit in taken.union(ids.forbidden_token_ids) or explicit >= config.vocab_size:
            raise ValueError(f"image_token_index={explicit} is taken or outside the vocabulary: choose an unused id.")
        return explicit
    vocab = tokenizer.get_vocab()
    after_last = max(max(vocab.values()) + 1, len(tokenizer))
    if (own := vocab.get("<image>")) is not None:
        return own
    if after_last < config.vocab_size:
        return after_last
    reserved = [i for text, i in vocab.items() if re.fullmatch(r"<\|?reserved\w*\|?>", text)]
    if not reserved:
        raise ValueError(
            "The vocabulary has no unused id for visual tokens: name one with --hf-overrides "
            "'{\"image_token_index\": ID}'."
        )
    return min(reserved)


def _tower_files(tower: str, checkpoint: str | None) -> Iterable[Path]:
    """Places of the tower's config.json, most specific first."""
    if checkpoint:
        for folder in dict.fromkeys((tower, Path(tower).name)):
            if Path(checkpoint).exists():
                yield Path(checkpoint) / folder / "config.json"
            elif not Path(folder).is_absolute():
                yield from _hub_file(checkpoint, f"{folder}/config.json")
    if Path(tower).is_absolute():
        yield Path(tower) / "config.json"


def _hub_file(checkpoint: str, name: str) -> Iterable[Path]:
    """A file of a hub checkpoint, fetched unless it is in the cache; none if there is none or no network.

    While its config is loaded, nothing else of a checkpoint has been fetched. Of the default branch: transformers does
    not tell a config which revision it is from.
    """
    from transformers.utils import cached_file

    try:
        file = cached_file(
            checkpoint,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # no repository, or no name of one
        return
    if file is not None:
        yield Path(file)


def _siglip_config(fields: dict[str, Any]) -> SiglipVisionConfig:
    """From a vision config, or from a two-tower SigLIP config that contains one."""
    fields = dict(fields.get("vision_config") or fields)
    kind = fields.pop("model_type", SiglipVisionConfig.model_type)
    if kind != SiglipVisionConfig.model_type:
        raise ValueError(f"A vision tower of type {kind!r} is not supported, only SigLIP ones are.")
    return SiglipVisionConfig(**fields)


def _first(*candidates: int | None) -> int | None:
    return next((i for i in candidates if i is not None), None)


def _special(tokenizer: Any, name: str) -> int | None:
    return getattr(tokenizer, name, None)


def _explicit(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    if value is not None and not 0 <= value < config.vocab_size:
        raise ValueError(f"{name}={value} lies outside the vocabulary of {config.vocab_size} tokens.")
    return value


def _explicit_many(config: Any, name: str) -> list[int] | None:
    values = getattr(config, name, None)
    if values is None:
        return None
    for value in values:
        if not 0 <= value < config.vocab_size:
            raise ValueError(f"{name} contains {value}, outside the vocabulary of {config.vocab_size} tokens.")
    return list(values)


def _in_vocab(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    if isinstance(value, list):
        value = value[0] if value else None
    return value if value is not None and 0 <= value < config.vocab_size else None
