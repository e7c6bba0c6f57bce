"""LLaDA-V as a trainable module; its parameters have the names and shapes of the original checkpoint layout.

B = samples, N = patches, T = sequence length, D = text width, V = tower width, H = heads, E = head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `tower_layers` are the ones in use (the layout drops one more, the last)."""

    grid: int = 12
    patch: int = 14
    tower_width: int = 96
    tower_layers: int = 2
    tower_heads: int = 3
    tower_inner: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 336
    vocabulary: int = 128
    rope_theta: float = 10000.0


def _split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, T, H * E] -> [B, H, T, E]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _join_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


class TowerAttention(nn.Module):
    """SigLIP's attention, with biases."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (_split_heads(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(_join_heads(F.scaled_dot_product_attention(q, k, v)))


class TowerMLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TowerLayer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(shape.tower_width, eps=1e-6)
        self.self_attn = TowerAttention(shape.tower_width, shape.tower_heads)
        self.layer_norm2 = nn.LayerNorm(shape.tower_width, eps=1e-6)
        self.mlp = TowerMLP(shape.tower_width, shape.tower_inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Tower(nn.Module):
    """SigLIP without its last layer; [B, N, patch pixels] of any subset of cells to [B, N, V]."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, shape.tower_width, shape.patch, shape.patch)
        self.embeddings.position_embedding = nn.Embedding(shape.grid**2, shape.tower_width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(TowerLayer(shape) for _ in range(shape.tower_layers))
        # Part of the layout, never used: LLaDA-V takes the features before it.
        self.post_layernorm = nn.LayerNorm(shape.tower_width, eps=1e-6).requires_grad_(False)

    def forward(self, cells: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """cells: [B, N, patch, patch, 3] normalised; places: [B, N] rows of the position table."""
        kernel = self.embeddings.patch_embedding.weight.permute(0, 2, 3, 1).flatten(1)
        x = F.linear(cells.flatten(2), kernel, self.embeddings.patch_embedding.bias)
        x = x + self.embeddings.position_embedding(places)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class TextAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(width, width, bias=False))
        self.probe: torch.Tensor | None = None  # [B, H, C, T] attention of the last rows, when asked for
        self.probe_rows = 0

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = (_split_heads(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if self.probe_rows:
            scores = q[:, :, -self.probe_rows :].float() @ k.float().transpose(-1, -2)
            self.probe = (scores * q.shape[-1] ** -0.5).softmax(-1)
        return self.o_proj(_join_heads(F.scaled_dot_product_attention(q, k, v)))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


class TextMLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.width, eps=1e-5)
        self.self_attn = TextAttention(shape.width, shape.heads)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=1e-5)
        self.mlp = TextMLP(shape.width, shape.inner)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaDAV(nn.Module):
    """Tower, projector and bidirectional text model; `state_dict()` is the checkpoint."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.model.layers = nn.ModuleList(TextLayer(shape) for _ in range(shape.layers))
        self.model.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.model.mm_projector = nn.Sequential(
            nn.Linear(shape.tower_width, shape.width), nn.GELU(), nn.Linear(shape.width, shape.width)
        )
        self.model.image_newline = nn.Parameter(torch.zeros(shape.width))
        self.model.vision_tower = nn.Module()
        self.model.vision_tower.vision_tower = nn.Module()
        self.model.vision_tower.vision_tower.vision_model = Tower(shape)
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        half = shape.width // shape.heads // 2
        frequencies = shape.rope_theta ** -(torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        initialise(self)

    @property
    def tower(self) -> Tower:
        return self.model.vision_tower.vision_tower.vision_model

    def text(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] of embeddings [B, T, D] at rotary positions [T] or [B, T]."""
        angles = positions.float()[..., None] * self.frequencies
        if angles.dim() == 3:
            angles = angles[:, None]
        cos, sin = angles.cos(), angles.sin()
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model.norm(hidden))


def initialise(model: LLaDAV) -> None:
    """Small normal weights, but with three things in place that take long to be found.

    Positions: the table starts as sines of row and column, so that neighbours are near. Look-ups: queries and keys of
    the text model start equal, and outputs as the transpose of values, so that a token attends to tokens of the same
    content and takes over theirs. Words: the output layer starts as the embedding.
    """
    shape = model.shape
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            fan_in = parameter[0].numel()
            std = 1.0 if "embed_tokens" in name else fan_in**-0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                std *= 0.3
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(model.model.image_newline, std=1.0)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(0.3 * attention.v_proj.weight.T)
        model.lm_head.weight.copy_(model.model.embed_tokens.weight * shape.width**-0.5)
    quarter = shape.tower_width // 4
    frequencies = 0.5 * torch.pi * (2.0 / shape.grid) ** (torch.arange(quarter) / (quarter - 1))
    angles = torch.arange(shape.grid)[:, None] * frequencies  # [grid, quarter]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = line[:, None].expand(-1, shape.grid, -1)
    columns = line[None].expand(shape.grid, -1, -1)
    table = torch.cat([rows, columns], dim=-1).reshape(shape.grid**2, -1)
    with torch.no_grad():
        model.tower.embeddings.position_embedding.weight.copy_(table)
