"""Random-weight LLaDA-V checkpoint of any size, in the original folder layout, ready to serve.

    python -m vllm_dvlm.synthetic.random_checkpoint OUT --hidden 512 --layers 8 --intermediate 1536

Speed depends on shapes, not on trained values, so benches need no download. Weights follow the
tests' tiny checkpoint: channel 0 of the residual stream is a constant that no layer writes, so
column 0 of lm_head is a bias per token. Known words are likely; stop and mask token are practically
never said, so that every run has its full length. Replies are varied, or equal tokens would say little: all masked
positions have the same embedding, so sharp attention scores, which depend on the place, and strong layers tell them
apart.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_dvlm.synthetic import checkpoint_files as files
from vllm_dvlm.synthetic.checkpoint_files import Sizes

CONSTANT = 3.0  # value of residual channel 0
SCORE_GAIN = 4.0  # of queries and of keys: attention scores of std 16, so a row looks at few others
VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."


class _Draws(dict[str, torch.Tensor]):
    """Tensors by name from one generator.

    std is 1 / sqrt(inputs) times a gain, so that widths do not matter.
    """

    def __init__(self, seed: int, dtype: torch.dtype):
        super().__init__()
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self.generator).mul_(std).add_(mean)
        self[name] = drawn.to(self.dtype)
        return self[name]

    def linear(self, name: str, rows: int, columns: int, gain: float = 1.0, with_bias: bool = False) -> torch.Tensor:
        if with_bias:
            self.normal(name + ".bias", (rows,), 0.1)
        return self.normal(name + ".weight", (rows, columns), gain * columns**-0.5)

    def norm(self, name: str, width: int, with_bias: bool = False) -> None:
        self.normal(name + ".weight", (width,), 0.1, 1.0)
        if with_bias:
            self.normal(name + ".bias", (width,), 0.1)


def _add_text(t: _Draws, sizes: Sizes) -> None:
    width, inner = sizes.hidden, sizes.intermediate
    embedding = t.normal("model.embed_tokens.weight", (sizes.vocab_rows, width), 1.0)
    embedding[sizes.ids.mask] *= 0.5  # let the context decide at masked places
    embedding[:, 0] = CONSTANT
    gain = min(1.0, (4 / sizes.layers) ** 0.5)  # the residual stream grows with the number of layers
    for i in range(sizes.layers):
        layer = f"model.layers.{i}."
        t.linear(layer + "self_attn.q_proj", width, width, SCORE_GAIN)
        t.linear(layer + "self_attn.k_proj", width, width, SCORE_GAIN)
        t.linear(layer + "self_attn.v_proj", width, width)
        t.linear(layer + "self_attn.o_proj", width, width, 2.0 * gain)[0] = 0
        t.linear(layer + "mlp.gate_proj", inner, width)
        t.linear(layer + "mlp.up_proj", inner, width)
        t.linear(layer + "mlp.down_proj", width, inner, 3.0 * gain)[0] = 0
        t.norm(layer + "input_layernorm", width)
        t.norm(layer + "post_attention_layernorm", width)
    t.norm("model.norm", width)


def _add_output_head(t: _Draws, sizes: Sizes, logit_std: float) -> None:
    rows = sizes.vocab_rows
    scale, bias = torch.full((rows, 1), 0.15), torch.full((rows,), -16.0)
    words, ids = files.word_ids(sizes.ids), sizes.ids
    scale[words], bias[words] = logit_std, 0.0
    bias[[ids.end_of_turn, ids.mask]] = -40.0
    bias[ids.num_tokens :] = -40.0  # rows the tokenizer has no id for
    head = t.linear("lm_head", rows, sizes.hidden)
    head *= scale
    head[:, 0] = bias


def _add_vision(t: _Draws, sizes: Sizes, prefix: str, num_layers: int) -> None:
    width, inner, patch = sizes.vision_hidden, sizes.vision_intermediate, sizes.patch
    t.normal(
        prefix + "embeddings.patch_embedding.weight",
        (width, 3, patch, patch),
        (3 * patch**2) ** -0.5,
    )
    t.normal(prefix + "embeddings.patch_embedding.bias", (width,), 0.1)
    t.normal(
        prefix + "embeddings.position_embedding.weight",
        ((files.TILE_SIZE // patch) ** 2, width),
        0.7,
    )
    for i in range(num_layers):
        layer = f"{prefix}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            t.linear(f"{layer}self_attn.{name}", width, width, with_bias=True)
        t.norm(layer + "layer_norm1", width, with_bias=True)
        t.norm(layer + "layer_norm2", width, with_bias=True)
        t.linear(layer + "mlp.fc1", inner, width, with_bias=True)
        t.linear(layer + "mlp.fc2", width, inner, with_bias=True)
    t.norm(prefix + "post_layernorm", width, with_bias=True)


def _add_projector(t: _Draws, sizes: Sizes) -> None:
    width = sizes.hidden
    t.linear("model.mm_projector.0", width, sizes.vision_hidden, with_bias=True)
    t.linear("model.mm_projector.2", width, width, with_bias=True)[0] = 0
    t["model.mm_projector.2.bias"][0] = CONSTANT
    t.normal("model.image_newline", (width,), 1.0)[0] = CONSTANT


def random_tensors(
    sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.float32, logit_std: float = 3.6
) -> dict[str, torch.Tensor]:
    """The weights by their names in a LLaDA-V checkpoint; see `write_random_checkpoint`."""
    if sizes.vocab_rows < files.MIN_VOCAB_ROWS:
        raise ValueError(f"vocab_rows must be at least {files.MIN_VOCAB_ROWS}: bytes, words and special tokens.")
    for width, heads in (
        (sizes.hidden, 2 * sizes.heads),
        (sizes.vision_hidden, sizes.vision_heads),
    ):
        if width % heads:
            raise ValueError(f"A width of {width} is no multiple of {heads}: rotary heads have an even width.")
    t = _Draws(seed, dtype)
    _add_text(t, sizes)
    _add_output_head(t, sizes, logit_std)
    _add_projector(t, sizes)
    _add_vision(t, sizes, VISION_PREFIX, sizes.vision_layers - 1)
    return dict(t)


def write_random_checkpoint(
    folder: str | Path,
    sizes: Sizes = Sizes(),  # noqa: B008 - frozen
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    logit_std: float = 3.6,
) -> Path:
    """Write config, tokenizer and weights; return the folder.

    Args:
        sizes: `vision_layers` counts the last one, which the model does not use and the file does
            not hold.
        logit_std: spread of the known words' logits; a higher one is more confident, so that
            threshold decoding commits more.

    Raises ValueError if the vocabulary is smaller than the tokenizer needs or a width does not fit its
    heads.
    """
    folder, tensors = Path(folder), random_tensors(sizes, seed, dtype, logit_std)
    files.write_configs(folder, sizes, str(dtype).removeprefix("torch."))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    for field in dataclasses.fields(Sizes):
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=field.default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--logit-std", type=float, default=3.6)
    arguments = vars(parser.parse_args())
    sizes = Sizes(**{field.name: arguments.pop(field.name) for field in dataclasses.fields(Sizes)})
    dtype = getattr(torch, arguments.pop("dtype"))
    print(write_random_checkpoint(sizes=sizes, dtype=dtype, **arguments))


if __name__ == "__main__":
    main()
