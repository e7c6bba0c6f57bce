"""Dense LLaDA-V in plain PyTorch, loaded from a checkpoint folder in the original layout.

Source: tests/golden/llada_v/README.md, points 3, 10 and 16, and "The checkpoint". LaViDa builds on it: lavida_model.py.
Shapes: B = batch, T = sequence length, D = hidden width, H = heads, E = head width, S = image
tiles, V = rows of lm_head, C = query rows of a probe, N = key columns of a probe.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from transformers import SiglipVisionConfig, SiglipVisionModel

from vllm_dvlm.checkpoint import anyres

IMAGE_TOKEN_INDEX = -200  # placeholder id in prompt ids, one per image
VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
# siglip2-so400m-patch14-384; the main config of a release gives no sizes of the tower.
RELEASE_VISION = {
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "num_hidden_layers": 27,
}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Prompt:
    """Prompt after merging text and images."""

    embeddings: torch.Tensor  # [T, D], model dtype
    visual_spans: tuple[tuple[int, int], ...] = ()  # [first, end) of each image's tokens


class KVCache:
    """Keys and values of a sequence whose tail is recomputed and overwritten in each forward."""

    def __init__(self):
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor):
        """Store k, v [B, H, T, E] of positions start...; return those of the whole sequence."""
        if start == 0:
            self.layers[layer] = (k, v)
        all_k, all_v = self.layers[layer]
        if start:
            all_k[:, :, start:] = k
            all_v[:, :, start:] = v
        return all_k, all_v


class ConcatKVCache(KVCache):
    """As `KVCache`, at the cost of the original hook: prefix and new part are joined anew."""

    def update(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor):
        if start == 0:
            self.layers[layer] = (k, v)
            return k, v
        old_k, old_v = self.layers[layer]
        return torch.cat([old_k[:, :, :start], k], 2), torch.cat([old_v[:, :, :start], v], 2)


class AttentionProbe:
    """Softmax attention that `rows` pay to `columns`, mean over layers and heads (point 33).

    Batch 1. `whole_matrix` computes every row of every layer, as the original code does; otherwise
    only `rows` are computed, beside a fused attention.
    """

    def __init__(self, rows: slice, columns: torch.Tensor, whole_matrix: bool):
        self.rows, self.columns, self.whole_matrix = rows, columns, whole_matrix
        self.num_layers, self.total = 0, torch.zeros(())

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention output [1, H, T, E]; adds this layer to the sum."""
        queries = q if self.whole_matrix else q[:, :, self.rows]
        scores = (queries @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = scores.softmax(-1, dtype=torch.float32)
        probed = weights[0, :, self.rows] if self.whole_matrix else weights[0]
        self.total = self.total + probed[:, :, self.columns].mean(0)
        self.num_layers += 1
        if self.whole_matrix:
            return weights.to(v.dtype) @ v
        return F.scaled_dot_product_attention(q, k, v)

    def attention(self) -> torch.Tensor:
        """[C, N] float32."""
        return self.total / self.num_layers


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * weight


def _split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, T, D] -> [B, H, T, E]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the halves of x [..., T, E] by angles [T, E / 2]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _join_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


class TextModel:
    """Text stack: RMSNorm, bidirectional attention, rotary halves, SwiGLU; biases of q, k and v if there are any."""

    def __init__(self, config: dict, tensors: Tensors):
        self.num_heads = config["num_attention_heads"]
        self.num_kv_heads = config.get("num_key_value_heads") or self.num_heads
        self.eps, self.theta = config["rms_norm_eps"], config["rope_theta"]
        self.num_layers = config["num_hidden_layers"]
        self.embedding, self.head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
        self.norm = tensors["model.norm.weight"]
        self.layers = [self._layer(tensors, f"model.layers.{i}.") for i in range(self.num_layers)]
        width = self.embedding.shape[1]
        kv_width = width // self.num_heads * self.num_kv_heads
        self.widths = [width, kv_width, kv_width]  # of q, k and v
        half = width // self.num_heads // 2
        exponents = torch.arange(half, dtype=torch.float32) / half
        self.frequencies = 1.0 / self.theta**exponents  # [E / 2]; this order of operations, bit for bit

    @staticmethod
    def _layer(tensors: Tensors, prefix: str) -> Tensors:
        """Joined projections: one product instead of three or two, the same numbers."""
        biases = [tensors[name] for n in "qkv" if (name := f"{prefix}self_attn.{n}_proj.bias") in tensors]
        return ({"qkv_bias": torch.cat(biases)} if biases else {}) | {
            "norm1": tensors[prefix + "input_layernorm.weight"],
            "qkv": torch.cat([tensors[f"{prefix}self_attn.{n}_proj.weight"] for n in "qkv"]),
            "out": tensors[prefix + "self_attn.o_proj.weight"],
            "norm2": tensors[prefix + "post_attention_layernorm.weight"],
            "gate_up": torch.cat([tensors[f"{prefix}mlp.{n}_proj.weight"] for n in ("gate", "up")]),
            "down": tensors[prefix + "mlp.down_proj.weight"],
        }

    def rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [T, E / 2] of float32 positions [T]."""
        angles = torch.outer(positions, self.frequencies)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self,
        x: torch.Tensor,
        start: int = 0,
        cache: KVCache | None = None,
        probe: AttentionProbe | None = None,
        rotary_start: int | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, D] before the last norm.

        `x` [B, T, D] are embeddings at positions start, start + 1, ...; with start > 0 the `cache`
        holds what lies before. `rotary_start`: position of the first for RoPE, if not `start`.
        """
        first = start if rotary_start is None else rotary_start
        positions = torch.arange(first, first + x.shape[1], dtype=torch.float32)
        cos, sin = self.rotation(positions, x.dtype)
        for i, layer in enumerate(self.layers):
            normed = _rms_norm(x, layer["norm1"], self.eps)
            q, k, v = F.linear(normed, layer["qkv"], layer.get("qkv_bias")).split(self.widths, -1)
            q, k, v = _split_heads(q, self.num_heads), *(_split_heads(t, self.num_kv_heads) for t in (k, v))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if self.num_kv_heads != self.num_heads:
                # Before the cache: the rows of a cached prefix are widened once, not in every forward.
                k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
            if cache is not None:
                k, v = cache.update(i, start, k, v)
            attend = F.scaled_dot_product_attention if probe is None else probe.attend
            x = x + F.linear(_join_heads(attend(q, k, v)), layer["out"])
            gate, up = F.linear(_rms_norm(x, layer["norm2"], self.eps), layer["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., V] float32 of hidden states [..., D] as `forward` returns them."""
        return F.linear(_rms_norm(hidden, self.norm, self.eps), self.head).float()


class VisionModel:
    """transformers' SigLIP tower without last layer and post-norm, then the two-layer projector (point 10)."""

    def __init__(self, config: dict, tensors: Tensors):
        own = {n.removeprefix(VISION_PREFIX): t for n, t in tensors.items() if n.startswith(VISION_PREFIX)}
        stored = {int(n.split(".")[2]) for n in own if n.startswith("encoder.layers.")}
        # A file saved before the loader cut the tower still holds the last layer; it must not be
        # used.
        self.num_layers = min(len(stored), config.get("num_hidden_layers", len(stored) + 1) - 1)
        intermediate, hidden = own["encoder.layers.0.mlp.fc1.weight"].shape
        sizes = {"num_hidden_layers": self.num_layers, "hidden_size": hidden, "intermediate_size": intermediate}
        siglip = SiglipVisionModel(SiglipVisionConfig(**config | sizes | {"vision_use_head": False}))
        siglip.post_layernorm = torch.nn.Identity()
        siglip.load_state_dict({name: own[name] for name in siglip.state_dict()}, assign=True)
        self.siglip = siglip.eval()
        self.projector = {n: tensors["model.mm_projector." + n] for n in ("0.weight", "0.bias", "2.weight", "2.bias")}
        self.image_newline = tensors["model.image_newline"]  # [D]

    def tower(self, pixels: torch.Tensor) -> torch.Tensor:
        """[S, 729, vision width] of normalised pixels [S, 3, 384, 384]."""
        return self.siglip(pixels).last_hidden_state

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """[..., D] of tower outputs."""
        p = self.projector
        return F.linear(F.gelu(F.linear(features, p["0.weight"], p["0.bias"])), p["2.weight"], p["2.bias"])


class ReferenceModel:
    """Text stack and vision tower of one checkpoint folder, on the CPU."""

    read_layout = staticmethod(anyres.ImageLayoutConfig.from_hf_config)

    def __init__(self, folder: Path, config: dict, vision_config: dict, tensors: Tensors):
        self.folder, self.config, self.vision_config = folder, config, vision_config
        self.text, self.vision = TextModel(config, tensors), VisionModel(vision_config, tensors)
        self.dtype = self.text.embedding.dtype

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "ReferenceModel":
        """Read config and weights (one file or an index of shards) from `folder`."""
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        # The tower's own folder gives sizes only: its weights differ from the trained ones.
        vision_file = folder / config["mm_vision_tower"] / "config.json"
        vision_config = json.loads(vision_file.read_text()) if vision_file.exists() else RELEASE_VISION
        tensors: Tensors = {}
        for file in sorted(folder.glob("model*.safetensors")):
            with safe_open(file, "pt") as weights:
                tensors |= {name: weights.get_tensor(name).to(dtype) for name in weights.keys()}  # noqa: SIM118 - no mapping
        return cls(folder, config, vision_config.get("vision_config", vision_config), tensors)

    def embed(self, token_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """[T, D] in the model's dtype."""
        return F.embedding(torch.as_tensor(token_ids, dtype=torch.long), self.text.embedding)

    @torch.inference_mode()
    def image_features(
        self, images: Sequence[Image.Image], aspect_ratio: str | None = None, **config_keys: str
    ) -> list[torch.Tensor]:
        """Visual tokens [N, D] of each image in sequence order, row ends included (points 5-15).

        `config_keys` take the place of keys of config.json.
        """
        config = self.config | ({"image_aspect_ratio": aspect_ratio} if aspect_ratio else {}) | config_keys
        layout = self.read_layout(SimpleNamespace(**config), SimpleNamespace(**self.vision_config))
        features = []
        for image in images:
            pixels = anyres.preprocess(image, layout).to(self.dtype)
            tokens = self.vision.project(self.vision.tower(pixels))
            features.append(anyres.arrange(tokens, image.size, layout, self.vision.image_newline))
        return features

    @torch.inference_mode()
    def merge(self, prompt_ids: Sequence[int], features: Sequence[torch.Tensor] = ()) -> Prompt:
        """Put image features in place of the placeholders (point 16)."""
        if prompt_ids.count(IMAGE_TOKEN_INDEX) != len(features):
            raise ValueError(f"{len(features)} images for {prompt_ids.count(IMAGE_TOKEN_INDEX)} placeholders.")
        parts, spans, length, todo = [], [], 0, iter(features)
        for token in prompt_ids:
            part = next(todo) if token == IMAGE_TOKEN_INDEX else self.embed([token])
            if token == IMAGE_TOKEN_INDEX:
                spans.append((length, length + len(part)))
            parts.append(part)
            length += len(part)
        limit = self.config.get("tokenizer_model_max_length") or length
        return Prompt(torch.cat(parts)[:limit], tuple(spans))


SYSTEM_TEXT = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)


def conversation(question: str) -> str:
    """Prompt text of one user turn, `<image>` where images stand (points 1 and 2)."""
    text = "<|startoftext|>"
    for role, content in (("system", SYSTEM_TEXT), ("user", question.strip())):
        text += f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
    return text + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def prompt_token_ids(tokenizer, prompt_text: str) -> list[int]:
    """Ids of a prompt after the conversation template; one -200 per image (point 3).

    Pieces between images are tokenised alone. When the text begins with BOS, the original code
    takes it for added by the tokenizer and drops the first token of every later piece; so do we.
    """
    first, *rest = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in prompt_text.split("<image>")]
    has_bos = bool(first) and first[0] == tokenizer.bos_token_id
    ids = list(first)
    for piece in rest:
        ids += [IMAGE_TOKEN_INDEX, *piece[has_bos:]]
    return ids
