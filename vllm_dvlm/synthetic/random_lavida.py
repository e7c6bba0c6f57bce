"""Random-weight LaViDa-LLaDA checkpoint of any size: the weights of `random_checkpoint` under LaViDa's names.

Both have the same text stack, tower and projector. LaViDa-LLaDA's tokenizer is LLaDA's, so that of the LLaDA-V
checkpoints serves here, known words and small vocabularies included.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_dvlm.synthetic import lavida_files
from vllm_dvlm.synthetic.checkpoint_files import Sizes, vision_config, write_json, write_tokenizer
from vllm_dvlm.synthetic.lavida_files import BLOCK_NAMES, OTHER_NAMES
from vllm_dvlm.synthetic.random_checkpoint import random_tensors

_BLOCK_PARTS = {new: old for old, new in BLOCK_NAMES.items()}
_OTHER_PARTS = {new: old for old, new in OTHER_NAMES.items()}


def lavida_name(name: str) -> str:
    """LaViDa-LLaDA's name of a tensor of a LLaDA-V checkpoint; tower and projector have the same."""
    part, _, kind = name.rpartition(".")
    if part in _OTHER_PARTS:
        return f"model.transformer.{_OTHER_PARTS[part]}.{kind}"
    if part.startswith("model.layers."):
        layer, _, rest = part.removeprefix("model.layers.").partition(".")
        return f"model.transformer.blocks.{layer}.{_BLOCK_PARTS[rest]}.{kind}"
    return name


def write_random_lavida(
    folder: str | Path,
    sizes: Sizes = Sizes(),  # noqa: B008 - frozen
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    logit_std: float = 3.6,
) -> Path:
    """Write config, tokenizer and weights; return the folder. Arguments and errors as `write_random_checkpoint`."""
    folder, tensors = Path(folder), random_tensors(sizes, seed, dtype, logit_std)
    vision, name = folder / lavida_files.VISION_FOLDER, str(dtype).removeprefix("torch.")
    vision.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, sizes.ids)
    write_json(folder / "config.json", lavida_files.llada_config(sizes, name))
    write_json(vision / "config.json", vision_config(sizes, name))
    save_file({lavida_name(n): t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder
