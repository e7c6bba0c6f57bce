"""Config classes of LaViDa checkpoints: the keys of the original config.json under the names that our models read.

A value that would change the computation in a way that is not written here is refused, never ignored. Source:
tests/golden/lavida/README.md, "Checkpoint" and "Model"; what the keys mean: the official configuration_llada.py and
modeling_llada.py, configuration_dream.py and modeling_dream.py.
"""

from typing import Any, ClassVar

from vllm_dvlm.checkpoint.anyres import ImageLayoutConfig, lavida_layout
from vllm_dvlm.checkpoint.configuration import MaskedDiffusionConfig
from vllm_dvlm.families.lavida import LAVIDA_DREAM, LAVIDA_LLADA

# Key -> the values with which the computation is the one of models/llada.py, the usual one first.
_LLADA_VALUES: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "attention_layer_norm": (False,),
    "include_bias": (False,),
    "multi_query_attention": (None, False),
    "rope": (True,),
    "alibi": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
}


class LavidaConfig(MaskedDiffusionConfig):
    """The image fields of both kinds.

    supported_values: key of config.json -> values that can be computed; ValueError, naming both, for any other. A key
        that is not there is fine.
    """

    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {"mm_resampler_type": (None,)}

    image_aspect_ratio: str = "anyres"
    image_grid_pinpoints: list | str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for key, values in self.supported_values.items():
            if key in kwargs and kwargs[key] not in values:
                works = " or ".join(map(repr, values))
                raise ValueError(f"{key}={kwargs[key]!r} in config.json is not supported, only {works}.")
        super().__post_init__(**kwargs)

    def image_layout(self, vision_config: Any = None) -> ImageLayoutConfig:
        return lavida_layout(self, vision_config)


class LavidaLladaConfig(LavidaConfig):
    """config.json of a LaViDa-LLaDA checkpoint, which has the names of LLaDA's own code (`d_model`, `n_layers`, ...).

    Both names of a size are read and may be overridden; where a file has both, the original one counts.
    """

    family = LAVIDA_LLADA
    model_type = LAVIDA_LLADA.model_type
    supported_values = LavidaConfig.supported_values | _LLADA_VALUES
    attribute_map = {
        "d_model": "hidden_size",
        "mlp_hidden_size": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "max_sequence_length": "max_position_embeddings",
        "include_qkv_bias": "qkv_bias",
        "weight_tying": "tie_word_embeddings",
        "init_std": "initializer_range",
    }

    intermediate_size: int | None = 12288
    max_position_embeddings: int = 4096

    def __post_init__(self, **kwargs: Any) -> None:
        # Before the base class derives sizes from each other.
        for original, name in self.attribute_map.items():
            if original in kwargs:
                setattr(self, name, kwargs.pop(original))
        if self.intermediate_size is None:
            self.intermediate_size = kwargs.get("mlp_ratio", 4) * self.hidden_size
        rows = kwargs.get("embedding_size") or self.vocab_size
        if rows < self.vocab_size:
            raise ValueError(
                f"embedding_size={rows} in config.json is not supported, only null or at least vocab_size="
                f"{self.vocab_size}."
            )
        self.vocab_size = rows
        super().__post_init__(**kwargs)


class LavidaDreamConfig(LavidaConfig):
    """config.json of a LaViDa-Dream checkpoint; Dream has the names and sizes of Qwen2.

    The model is as long as its prompts may be, `tokenizer_model_max_length`, where the official code cuts them: a step
    computes whole sequences, so Qwen2's 131,072 positions would size every buffer.
    """

    family = LAVIDA_DREAM
    model_type = LAVIDA_DREAM.model_type
    supported_values = LavidaConfig.supported_values | {"use_sliding_window": (False,)}

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = True

    default_theta = 1000000.0

    def __post_init__(self, **kwargs: Any) -> None:
        if longest := kwargs.get("tokenizer_model_max_length"):
            self.max_position_embeddings = min(self.max_position_embeddings, longest)
        super().__post_init__(**kwargs)
