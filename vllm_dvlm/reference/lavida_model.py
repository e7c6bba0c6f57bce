"""Dense LaViDa (LLaDA and Dream) in plain PyTorch, loaded from a checkpoint folder in the original layout.

Both are the text stack of model.py under other names. Source: tests/golden/lavida/README.md, "Prompt" to "Model".
"""

import re
from pathlib import Path

import torch

from vllm_dvlm.checkpoint import anyres
from vllm_dvlm.reference.model import SYSTEM_TEXT, KVCache, ReferenceModel, Tensors, TextModel, rotate
from vllm_dvlm.synthetic.lavida_files import BLOCK_NAMES, OTHER_NAMES

# Names of the LLaDA checkpoint -> those of `TextModel`; Dream has these already.
_CONFIG_KEYS = {
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "mlp_hidden_size": "intermediate_size",
}


class LavidaModel(ReferenceModel):
    """Text stack and vision tower of a LaViDa checkpoint, on the CPU.

    Attributes:
        mask_id: the mask token.
        shifts_logits: True (Dream): row i of a forward predicts position i + 1.
    """

    read_layout = staticmethod(anyres.lavida_layout)

    def __init__(self, folder: Path, config: dict, vision_config: dict, tensors: Tensors):
        renamed = {new: config[old] for old, new in _CONFIG_KEYS.items() if old in config}
        super().__init__(folder, config | renamed, vision_config, {_text_name(n): t for n, t in tensors.items()})
        self.mask_id: int = config["mask_token_id"]
        self.shifts_logits = config["architectures"] == ["LlavaDreamForMaskedDiffusion"]


def _text_name(name: str) -> str:
    found = re.fullmatch(r"model\.transformer\.(?:blocks\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        return name
    layer, part, kind = found.groups()
    if layer is None:
        return f"{OTHER_NAMES[part]}.{kind}"
    return f"model.layers.{layer}.{BLOCK_NAMES[part]}.{kind}"


def conversation(tokenizer, question: str) -> str:
    """Prompt text of one user turn through the tokenizer's chat template; the image is `<image>` in the question."""
    messages = [{"role": "system", "content": SYSTEM_TEXT}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


class PrefixKVCache(KVCache):
    """Keys and values of a prompt that stay, with room behind them for a canvas that is overwritten."""

    def __init__(self, canvas_len: int):
        super().__init__()
        self.canvas_len = canvas_len

    def update(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor):
        if start:
            return super().update(layer, start, k, v)
        room = k.shape[:2] + (self.canvas_len, k.shape[3])
        self.layers[layer] = (torch.cat([k, k.new_zeros(room)], 2), torch.cat([v, v.new_zeros(room)], 2))
        return k, v


def prune_prefix(cache: KVCache, text: TextModel, kept: torch.Tensor, renumber: bool) -> None:
    """Keep these rows [K] of a cached prompt, and whatever lies behind the prompt.

    `renumber`: the rows close up, so their keys are turned back by the number of rows dropped before them.
    """
    moved = torch.arange(len(kept)) - kept
    for layer, (k, v) in cache.layers.items():
        k, v = k[:, :, kept], v[:, :, kept]
        if renumber:
            k = rotate(k, *text.rotation(moved.float(), k.dtype))
        if isinstance(cache, PrefixKVCache):
            cache.update(layer, 0, k, v)
        else:
            cache.layers[layer] = (k, v)
