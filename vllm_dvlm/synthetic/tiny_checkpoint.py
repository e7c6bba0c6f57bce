"""Tiny deterministic LLaDA-V checkpoint of the golden runs, rebuilt from a seed, byte for byte.

    python -m vllm_dvlm.synthetic.tiny_checkpoint OUT [--seed 0] [--eot-like ID] [--mask-like ID] [--shards N]

Weights come from numpy's frozen legacy generator, one stream per tensor keyed by sha256(seed,
tensor name), so neither the order of creation nor the torch version matters. Channel 0 of the
residual stream is a constant (no layer writes it), which turns column 0 of lm_head into a bias per
token: ids without a role are improbable. `eot_like=ID` swaps the output rows of ID and <|eot_id|>
(where the plain checkpoint says ID, this one stops); `mask_like` does so for the mask token. The
vision sub-folder holds other weights on purpose: those in model.safetensors must win.
Source: tests/golden/llada_v/README.md, "The checkpoint".
"""

import argparse
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from vllm_dvlm.synthetic import checkpoint_files as files

SIZES = files.Sizes()
CONSTANT = 3.0  # value of residual channel 0
VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."


class SeededTensors(dict[str, torch.Tensor]):
    """Tensors by name; every draw has its own stream, named by `key` (the tensor's name if not given)."""

    def __init__(self, seed: int | str):
        super().__init__()
        self.seed = seed

    def stream(self, key: str) -> np.random.RandomState:
        """The generator of this draw."""
        digest = hashlib.sha256(f"{self.seed}:{key}".encode()).digest()
        return np.random.RandomState(np.frombuffer(digest[:16], dtype="<u4"))

    def normal(
        self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0, key: str | None = None
    ) -> torch.Tensor:
        """Draw, store and return a float32 tensor."""
        drawn = self.stream(key or name).standard_normal(int(np.prod(shape))).reshape(shape) * std + mean
        self[name] = torch.from_numpy(drawn.astype(np.float32))
        return self[name]

    def linear(self, name: str, rows: int, columns: int, std: float, bias_std: float | None = None) -> None:
        self.normal(name + ".weight", (rows, columns), std)
        if bias_std is not None:
            self.normal(name + ".bias", (rows,), bias_std)

    def norm(self, name: str, width: int, with_bias: bool) -> None:
        self.normal(name + ".weight", (width,), 0.1, 1.0)
        if with_bias:
            self.normal(name + ".bias", (width,), 0.1)


def _add_vision(t: SeededTensors, prefix: str, num_layers: int) -> None:
    width, inner, patch = SIZES.vision_hidden, SIZES.vision_intermediate, SIZES.patch
    t.normal(prefix + "embeddings.patch_embedding.weight", (width, 3, patch, patch), 0.12)
    t.normal(prefix + "embeddings.patch_embedding.bias", (width,), 0.1)
    t.normal(
        prefix + "embeddings.position_embedding.weight",
        ((files.TILE_SIZE // patch) ** 2, width),
        0.7,
    )
    for i in range(num_layers):
        layer = f"{prefix}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            t.linear(f"{layer}self_attn.{name}", width, width, 0.25, 0.1)
        t.norm(layer + "layer_norm1", width, with_bias=True)
        t.norm(layer + "layer_norm2", width, with_bias=True)
        t.linear(layer + "mlp.fc1", inner, width, 0.25, 0.1)
        t.linear(layer + "mlp.fc2", width, inner, 0.2, 0.1)
    t.norm(prefix + "post_layernorm", width, with_bias=True)


def _add_vision_head(t: SeededTensors, prefix: str) -> None:
    width, inner = SIZES.vision_hidden, SIZES.vision_intermediate
    t.normal(prefix + "probe", (1, 1, width), 1.0)
    t.normal(prefix + "attention.in_proj_weight", (3 * width, width), 0.2)
    t.normal(prefix + "attention.in_proj_bias", (3 * width,), 0.1)
    t.linear(prefix + "attention.out_proj", width, width, 0.2, 0.1)
    t.norm(prefix + "layernorm", width, with_bias=True)
    t.linear(prefix + "mlp.fc1", inner, width, 0.2, 0.1)
    t.linear(prefix + "mlp.fc2", width, inner, 0.2, 0.1)


def _add_text(t: SeededTensors) -> None:
    width, inner = SIZES.hidden, SIZES.intermediate
    embedding = t.normal("model.embed_tokens.weight", (SIZES.vocab_rows, width), 1.0)
    embedding[files.MASK] *= 0.3  # let the context decide at masked places
    embedding[:, 0] = CONSTANT
    for i in range(SIZES.layers):
        layer = f"model.layers.{i}."
        for name, std in (("q_proj", 0.40), ("k_proj", 0.40), ("v_proj", 0.25), ("o_proj", 0.45)):
            t.linear(f"{layer}self_attn.{name}", width, width, std)
        t.linear(layer + "mlp.gate_proj", inner, width, 0.2)
        t.linear(layer + "mlp.up_proj", inner, width, 0.2)
        t.linear(layer + "mlp.down_proj", width, inner, 0.15)
        t[layer + "self_attn.o_proj.weight"][0] = 0
        t[layer + "mlp.down_proj.weight"][0] = 0
        t.norm(layer + "input_layernorm", width, with_bias=False)
        t.norm(layer + "post_attention_layernorm", width, with_bias=False)
    t.norm("model.norm", width, with_bias=False)


def _add_output_head(t: SeededTensors) -> None:
    rows = SIZES.vocab_rows
    head = t.normal("lm_head.weight", (rows, SIZES.hidden), 1.0)
    scale, bias = torch.full((rows, 1), 0.02), torch.full((rows,), -16.0)
    words = files.word_ids()
    scale[words], bias[words] = 0.45, 0.0
    # These would often win if they were not forbidden (golden README, point 24).
    forbidden = [files.BOS, files.EOS, files.START_HEADER, files.END_HEADER]
    scale[forbidden], bias[forbidden] = 0.45, 4.0
    bias[files.EOT] = bias[files.MASK] = -40.0
    bias[files.NUM_TOKENS :] = -40.0  # rows the tokenizer has no id for
    head *= scale
    head[:, 0] = bias


def _add_projector(t: SeededTensors) -> None:
    width = SIZES.hidden
    t.linear("model.mm_projector.0", width, SIZES.vision_hidden, 0.25, 0.2)
    t.linear("model.mm_projector.2", width, width, 0.2, 0.2)
    t["model.mm_projector.2.weight"][0] = 0
    t["model.mm_projector.2.bias"][0] = CONSTANT
    t.normal("model.image_newline", (width,), 1.0)[0] = CONSTANT


@functools.lru_cache(maxsize=2)  # 66 MB each; the draws take most of a build's time
def _base_tensors(seed: int) -> SeededTensors:
    t = SeededTensors(seed)
    _add_text(t)
    _add_output_head(t)
    _add_projector(t)
    _add_vision(t, VISION_PREFIX, SIZES.vision_layers - 1)
    return t


@functools.lru_cache(maxsize=2)
def _decoy_vision_tensors(seed: int) -> SeededTensors:
    t = SeededTensors(f"unused-vision-{seed}")
    _add_vision(t, "vision_model.", SIZES.vision_layers)
    _add_vision_head(t, "vision_model.head.")
    return t


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Hash of names, shapes and float32 bytes; independent of the file header and of sharding."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}:{tuple(tensors[name].shape)};".encode())
        digest.update(tensors[name].contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def save_weights(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> list[str]:
    """Write one file, or `num_shards` files and their index; return the file names."""
    names = sorted(tensors)
    if num_shards == 1:
        save_file({name: tensors[name] for name in names}, folder / "model.safetensors", {"format": "pt"})
        return ["model.safetensors"]
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = names[shard * len(names) // num_shards : (shard + 1) * len(names) // num_shards]
        save_file({name: tensors[name] for name in mine}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files.write_json(folder / "model.safetensors.index.json", index)
    return sorted(set(weight_map.values()))


def build(
    out_dir: str | Path,
    seed: int = 0,
    eot_like: int | None = None,
    mask_like: int | None = None,
    *,
    shards: int = 1,
) -> dict[str, str]:
    """Write the checkpoint folder; return sha256 digests by file name, as the goldens have them."""
    folder = Path(out_dir)
    files.write_configs(folder, SIZES)
    tensors = dict(_base_tensors(seed))
    if eot_like is not None or mask_like is not None:
        head = tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
        for token, like in ((files.EOT, eot_like), (files.MASK, mask_like)):
            if like is not None:
                head[[token, like]] = head[[like, token]]
    weight_files = save_weights(folder, tensors, shards)
    decoy = f"{files.VISION_FOLDER}/model.safetensors"
    vision = _decoy_vision_tensors(seed)
    save_file({name: vision[name] for name in sorted(vision)}, folder / decoy, {"format": "pt"})
    digests = {name: _file_digest(folder / name) for name in [*weight_files, decoy, "tokenizer.json"]}
    return digests | {"content of model.safetensors": content_digest(tensors)}


def checkpoint(tmp_root: str | Path, **build_args) -> Path:
    """Folder of the checkpoint with these `build` arguments below `tmp_root`; built on first use.

    The folders are independent copies, but shared by everyone with the same arguments: a test that
    edits a file must copy the folder first.
    """
    given = {key: value for key, value in sorted(build_args.items()) if value is not None}
    folder = Path(tmp_root) / "-".join(["llada_v", *(f"{key}={value}" for key, value in given.items())])
    return built_once(folder, functools.partial(build, **given))


def built_once(folder: Path, build_into: Callable[[Path], object]) -> Path:
    """`folder`, filled by `build_into` on first use; an interrupted build leaves nothing under that name."""
    if not folder.exists():
        half_built = folder.with_name(folder.name + ".part")
        shutil.rmtree(half_built, ignore_errors=True)
        build_into(half_built)
        half_built.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out_dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eot-like", type=int)
    parser.add_argument("--mask-like", type=int)
    parser.add_argument("--shards", type=int, default=1)
    print(json.dumps(build(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
