"""Tiny deterministic LaViDa checkpoints of the golden runs, rebuilt from a seed, byte for byte.

    python -m vllm_dvlm.synthetic.tiny_lavida OUT {lavida-llada,lavida-dream}

As tiny_checkpoint, with the streams of this family's recordings: seed = crc32 of a key + SEED, values rounded to
multiples of 2**-12. Head rows that must never win (no token, the mask token) are zero. The tower's folder holds other
weights on purpose: those in the checkpoint must win. Source: tests/golden/lavida/README.md, "Checkpoint".
"""

import argparse
import functools
import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from vllm_dvlm.synthetic import lavida_files as files
from vllm_dvlm.synthetic.checkpoint_files import TILE_SIZE
from vllm_dvlm.synthetic.lavida_files import DREAM, KINDS, LLADA, Kind
from vllm_dvlm.synthetic.tiny_checkpoint import VISION_PREFIX, SeededTensors, built_once, save_weights

SEED = 20251111


class _Tensors(SeededTensors):
    """Draws of the LaViDa recordings; `seed` counts the sets of weights with the same keys."""

    def stream(self, key: str) -> np.random.RandomState:
        return np.random.RandomState((zlib.crc32(key.encode()) + SEED + 7919 * self.seed) % 2**32)

    def normal(self, name, shape, std, mean=0.0, key=None):
        drawn = self.stream(key or name).standard_normal(size=shape) * std + mean
        self[name] = torch.from_numpy((np.round(drawn * 4096.0) / 4096.0).astype(np.float32))
        return self[name]

    def keyed_linear(self, name: str, key: str, rows: int, columns: int, std: float, bias_std: float = 0.0) -> None:
        """Weight from stream `key` and, unless bias_std is 0, bias from stream `key` + "b"."""
        self.normal(name + ".weight", (rows, columns), std, key=key)
        if bias_std:
            self.normal(name + ".bias", (rows,), bias_std, key=key + "b")

    def keyed_norm(self, name: str, key: str, width: int, bias_std: float = 0.0) -> None:
        self.normal(name + ".weight", (width,), 0.1, 1.0, key)
        if bias_std:
            self.normal(name + ".bias", (width,), bias_std, key=key + "b")


def _add_llada(t: _Tensors) -> None:
    sizes, p = LLADA.sizes, "model.transformer."
    width, inner = sizes.hidden, sizes.intermediate
    t.normal(p + "wte.weight", (sizes.vocab_rows, width), 1.0)
    shapes = {
        "q_proj": (width, width, 0.31),
        "k_proj": (width, width, 0.31),
        "v_proj": (width, width, 0.27),
        "attn_out": (width, width, 0.27),
        "ff_proj": (inner, width, 0.18),
        "up_proj": (inner, width, 0.18),
        "ff_out": (width, inner, 0.10),
    }
    for i in range(sizes.layers):
        layer = f"{p}blocks.{i}."
        for name, (rows, columns, std) in shapes.items():
            t.keyed_linear(layer + name, layer + name, rows, columns, std)
        for name in ("attn_norm", "ff_norm"):
            t.keyed_norm(layer + name, layer + name, width)
    t.keyed_norm(p + "ln_f", p + "ln_f", width)
    _clear_rows(t.normal(p + "ff_out.weight", (sizes.vocab_rows, width), 0.70), LLADA)


def _add_dream(t: _Tensors) -> None:
    sizes = DREAM.sizes
    width, inner = sizes.hidden, sizes.intermediate
    kv_width = sizes.num_kv_heads * width // sizes.heads
    t.normal("model.embed_tokens.weight", (sizes.vocab_rows, width), 1.0, key="dream.embed")
    for i in range(sizes.layers):
        layer, key = f"model.layers.{i}.", f"dream.model.layers.{i}."
        for name, rows, std in (("q_proj", width, 0.31), ("k_proj", kv_width, 0.31), ("v_proj", kv_width, 0.27)):
            t.keyed_linear(f"{layer}self_attn.{name}", key + name, rows, width, std, 0.2)
        t.keyed_linear(layer + "self_attn.o_proj", key + "o", width, width, 0.27)
        t.keyed_linear(layer + "mlp.gate_proj", key + "gate", inner, width, 0.18)
        t.keyed_linear(layer + "mlp.up_proj", key + "up", inner, width, 0.18)
        t.keyed_linear(layer + "mlp.down_proj", key + "down", width, inner, 0.10)
        t.keyed_norm(layer + "input_layernorm", key + "n1", width)
        t.keyed_norm(layer + "post_attention_layernorm", key + "n2", width)
    t.keyed_norm("model.norm", "dream.norm", width)
    _clear_rows(t.normal("lm_head.weight", (sizes.vocab_rows, width), 0.70, key="dream.head"), DREAM)


def _clear_rows(head: torch.Tensor, kind: Kind) -> None:
    head[kind.num_tokens :] = 0.0
    head[kind.mask] = 0.0


def _add_vision(t: _Tensors, prefix: str, num_layers: int) -> None:
    sizes = LLADA.sizes
    width, inner, patch = sizes.vision_hidden, sizes.vision_intermediate, sizes.patch
    e = prefix + "embeddings."
    t.normal(e + "patch_embedding.weight", (width, 3, patch, patch), 0.09, key=e + "pe")
    t.normal(e + "patch_embedding.bias", (width,), 0.1, key=e + "pb")
    t.normal(e + "position_embedding.weight", ((TILE_SIZE // patch) ** 2, width), 0.6, key=e + "pos")
    for i in range(num_layers):
        layer = f"{prefix}encoder.layers.{i}."
        for name, std in (("k_proj", 0.25), ("v_proj", 0.25), ("q_proj", 0.25), ("out_proj", 0.2)):
            t.keyed_linear(f"{layer}self_attn.{name}", layer + name, width, width, std, 0.05)
        for name in ("layer_norm1", "layer_norm2"):
            t.keyed_norm(layer + name, layer + name, width, 0.05)
        t.keyed_linear(layer + "mlp.fc1", layer + "fc1", inner, width, 0.25, 0.05)
        t.keyed_linear(layer + "mlp.fc2", layer + "fc2", width, inner, 0.18, 0.05)
    t.keyed_norm(prefix + "post_layernorm", prefix + "pln", width, 0.05)


def _add_projector(t: _Tensors, width: int) -> None:
    vision = LLADA.sizes.vision_hidden
    t.normal("model.mm_projector.0.weight", (width, vision), 0.45, key=f"mmp0{width}")
    t.normal("model.mm_projector.0.bias", (width,), 0.1, key=f"mmp0b{width}")
    t.normal("model.mm_projector.2.weight", (width, width), 0.16, key=f"mmp2{width}")
    t.normal("model.mm_projector.2.bias", (width,), 0.1, key=f"mmp2b{width}")
    t.normal("model.image_newline", (width,), 1.0, key=f"image_newline{width}")


@functools.lru_cache(maxsize=2)  # 65 and 78 MB; the draws take most of a build's time
def tensors(kind: Kind) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by name. Not to be changed."""
    t = _Tensors(0)
    (_add_llada if kind is LLADA else _add_dream)(t)
    _add_vision(t, VISION_PREFIX, kind.sizes.vision_layers - 1)
    _add_projector(t, kind.sizes.hidden)
    return t


def digest(weights: dict[str, torch.Tensor]) -> str:
    """Hash of names and bytes, as `checkpoint_sha256` of the golden files."""
    lines = (f"{name} {hashlib.sha256(weights[name].numpy().tobytes()).hexdigest()}\n" for name in sorted(weights))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def build(folder: str | Path, kind: Kind) -> str:
    """Write the checkpoint folder, two shards and an index; return its digest."""
    folder = Path(folder)
    files.write_configs(folder, kind)
    weights = tensors(kind)
    save_weights(folder, weights, num_shards=2)
    decoy = _Tensors(1)
    _add_vision(decoy, "vision_model.", kind.sizes.vision_layers)
    save_file(dict(decoy), folder / files.VISION_FOLDER / "model.safetensors", {"format": "pt"})
    return digest(weights)


def checkpoint(tmp_root: str | Path, kind: Kind) -> Path:
    """Folder of the checkpoint below `tmp_root`, built on first use; a test that edits a file must copy it first."""
    return built_once(Path(tmp_root) / kind.name, functools.partial(build, kind=kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out_dir")
    parser.add_argument("kind", choices=KINDS)
    args = parser.parse_args()
    print(build(args.out_dir, KINDS[args.kind]))


if __name__ == "__main__":
    main()
