"""LaViDa as vLLM loads it, with LLaDA and with Dream as its language model.

The text stack is that of llada.py, Dream's with biases of the query, key and value projections. The vision tower in the
checkpoint was trained along; nothing is read from the tower's own folder but its sizes. Source:
tests/golden/lavida/README.md, "Checkpoint".
"""

from __future__ import annotations

import re

from vllm.model_executor.models.utils import WeightsMapper

from vllm_dvlm.families.lavida import LAVIDA_DREAM, LAVIDA_LLADA
from vllm_dvlm.models.masked_diffusion import MaskedDiffusionVLM

# LLaDA's own names of the parts of a layer -> Llama's.
_LAYER_NAMES = {
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


class LlavaLladaForMaskedDiffusion(MaskedDiffusionVLM):
    """The model class for ``architectures: ["LlavaLladaForMaskedDiffusion"]``."""

    family = LAVIDA_LLADA
    text_names = WeightsMapper(
        orig_to_new_regex={
            re.compile(rf"^model\.transformer\.blocks\.(\d+)\.{original}\."): rf"model.layers.\1.{name}."
            for original, name in _LAYER_NAMES.items()
        },
        orig_to_new_prefix={
            "model.transformer.wte.": "model.embed_tokens.",
            "model.transformer.ln_f.": "model.norm.",
            "model.transformer.ff_out.": "lm_head.",
        },
    )


class LlavaDreamForMaskedDiffusion(MaskedDiffusionVLM):
    """The model class for ``architectures: ["LlavaDreamForMaskedDiffusion"]``; its checkpoint has Llama's names."""

    family = LAVIDA_DREAM
