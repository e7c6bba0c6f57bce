"""A LLaDA-V or LaViDa as a trainable module; its parameters have LLaDA-V's names and shapes.

B = samples, N = cells, P = patches, T = sequence length, L = last rows (question, assistant header, canvas), D = text
width, V = tower width, H = heads, E = head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vllm_dvlm.families.base import Family
from vllm_dvlm.families.llada_v import LLADA_V

# Weights of the first attention to the parts of a cell: sharp, but not to the last digit.
_SAME_CELL = 3.0
_SAME_PART = 5.0


@dataclass(frozen=True)
class Shape:
    """Family and sizes of a model; `tower_layers` are the ones in use (the layout drops one more, the last).

    grid: cells per side of a whole picture; each becomes one visual token.
    patch: pixels per side of a patch.
    splits: patches per side of a cell, whose projected features are pooled to their mean.
    """

    family: Family = LLADA_V
    grid: int = 12
    patch: int = 14
    splits: int = 1
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

    @property
    def has_prefix(self) -> bool:
        """The prompt attends to itself alone; False: to the canvas as well."""
        return self.family.attentions[0] == "prefix"

    @property
    def num_places(self) -> int:
        """Patches of a whole picture."""
        return (self.grid * self.splits) ** 2


@dataclass(frozen=True)
class Prefix:
    """What a text model with a prompt of its own attends to: the prompt to itself alone, the canvas to both.

    is_prompt: [B, T] bool.
    is_kept: [B, T] bool, what the canvas attends to, and the canvas; None: all. The prompt attends to pruned tokens as
        well: it is computed before they are pruned.
    positions: [T] or [B, T], rotary positions for the canvas; those of the prompt's own attention are the plain ones.
    num_last: L; all canvas rows are among the last L.
    """

    is_prompt: torch.Tensor
    num_last: int
    is_kept: torch.Tensor | None = None
    positions: torch.Tensor | None = None


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
    """SigLIP without its last layer; [B, P, patch pixels] of any subset of patches to [B, P, V]."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, shape.tower_width, shape.patch, shape.patch)
        self.embeddings.position_embedding = nn.Embedding(shape.num_places, shape.tower_width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(TowerLayer(shape) for _ in range(shape.tower_layers))
        # Part of the layout, never used: LLaDA-V takes the features before it.
        self.post_layernorm = nn.LayerNorm(shape.tower_width, eps=1e-6).requires_grad_(False)

    def forward(self, patches: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """patches: [B, P, patch, patch, 3] normalised; places: [B, P] rows of the position table."""
        kernel = self.embeddings.patch_embedding.weight.permute(0, 2, 3, 1).flatten(1)
        x = F.linear(patches.flatten(2), kernel, self.embeddings.patch_embedding.bias)
        x = x + self.embeddings.position_embedding(places)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class Rotation:
    """Rotary embedding at `positions`, [T] or [B, T]."""

    def __init__(self, positions: torch.Tensor, frequencies: torch.Tensor):
        angles = positions.float()[..., None] * frequencies
        if angles.dim() == 3:
            angles = angles[:, None]
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * self.cos - high * self.sin, high * self.cos + low * self.sin], dim=-1).to(x.dtype)


class TextAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(width, width, bias=False))
        self.probe: torch.Tensor | None = None  # [B, H, C, T] attention of the last rows, when asked for
        self.probe_rows = 0

    def forward(self, x: torch.Tensor, rotation: Rotation, view: tuple[Prefix, Rotation] | None) -> torch.Tensor:
        """view: what the canvas attends to, and the rotation for it; None: everything attends to everything."""
        q, k, v = (_split_heads(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        turned_q, turned_k = rotation(q), rotation(k)
        if self.probe_rows:
            scores = turned_q[:, :, -self.probe_rows :].float() @ turned_k.float().transpose(-1, -2)
            self.probe = (scores * q.shape[-1] ** -0.5).softmax(-1)
        if view is None:
            return self.o_proj(_join_heads(F.scaled_dot_product_attention(turned_q, turned_k, v)))
        prefix, rotation = view
        of_prompt = F.scaled_dot_product_attention(turned_q, turned_k, v, attn_mask=prefix.is_prompt[:, None, None])
        kept = None if prefix.is_kept is None else prefix.is_kept[:, None, None]
        last = slice(-prefix.num_last, None)
        of_canvas = F.scaled_dot_product_attention(rotation(q)[:, :, last], rotation(k), v, attn_mask=kept)
        of_last = torch.where(prefix.is_prompt[:, None, last, None], of_prompt[:, :, last], of_canvas)
        return self.o_proj(_join_heads(torch.cat([of_prompt[:, :, : -prefix.num_last], of_last], dim=2)))


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

    def forward(self, x: torch.Tensor, rotation: Rotation, view: tuple[Prefix, Rotation] | None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, view)
        return x + self.mlp(self.post_attention_layernorm(x))


class DiffusionVLM(nn.Module):
    """Tower, projector and text model; `state_dict()` is the checkpoint, in LLaDA-V's names."""

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

    def see(
        self, cells: torch.Tensor, places: torch.Tensor, through_tower: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the tower [B, N, V] and visual tokens [B, N, D].

        Args:
            cells: [B, N, pixels, pixels, 3] normalised.
            places: [B, N], cells of the whole grid, row by row.
            through_tower: gradients reach the tower.
        """
        splits, grid = self.shape.splits, self.shape.grid
        side = torch.arange(splits)
        patches = cells.unflatten(2, (splits, -1)).unflatten(4, (splits, -1)).transpose(3, 4).flatten(1, 3)
        rows = (places // grid * splits)[..., None, None] + side[:, None]
        columns = (places % grid * splits)[..., None, None] + side
        with torch.set_grad_enabled(torch.is_grad_enabled() and through_tower):
            features = self.tower(patches, (rows * grid * splits + columns).flatten(1))
        visual = self.model.mm_projector(features)
        # The mean of a cell is what LaViDa's bilinear resize to half the side gives.
        features, visual = (x.unflatten(1, (-1, splits**2)).mean(2) for x in (features, visual))
        return features, visual

    def text(self, x: torch.Tensor, positions: torch.Tensor, prefix: Prefix | None = None) -> torch.Tensor:
        """Hidden states [B, T, D] of embeddings [B, T, D] at rotary positions [T] or [B, T]."""
        rotation, view = Rotation(positions, self.frequencies), None
        if prefix is not None:
            moved = prefix.positions
            view = (prefix, rotation if moved is None else Rotation(moved, self.frequencies))
        for layer in self.model.layers:
            x = layer(x, rotation, view)
        return x

    def last_hidden(
        self,
        head: torch.Tensor,
        visual: torch.Tensor,
        tail: torch.Tensor,
        is_canvas: torch.Tensor,
        kept: torch.Tensor | None = None,
        has_gaps: bool = False,
    ) -> torch.Tensor:
        """Hidden states of the last rows, [B, L, D].

        Args:
            head, visual, tail: embeddings before the picture, of its visual tokens, and behind it, [B, rows, D].
            is_canvas: [B, L] bool, the canvas rows of `tail`.
            kept: [B, K], indices of the visual tokens left after pruning, ascending; None: all.
            has_gaps: survivors keep their rotary positions; False: they close up.
        """
        first, num, num_last = head.shape[1], visual.shape[1], tail.shape[1]
        positions = torch.arange(first + num + num_last)
        if not self.shape.has_prefix:
            if kept is not None:
                visual = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
                positions = positions[: first + visual.shape[1] + num_last]
                if has_gaps:
                    outer = torch.arange(first), torch.arange(num_last) + first + num
                    before, behind = (rows.expand(len(kept), -1) for rows in outer)
                    positions = torch.cat([before, kept + first, behind], dim=1)
            return self.text(torch.cat([head, visual, tail], dim=1), positions)[:, -num_last:]
        is_prompt = F.pad(~is_canvas, (first + num, 0), value=True)
        prefix = Prefix(is_prompt, num_last)
        if kept is not None:
            is_kept = torch.zeros(visual.shape[:2], dtype=torch.bool).scatter_(1, kept, True)
            is_kept = F.pad(F.pad(is_kept, (first, 0), value=True), (0, num_last), value=True)
            prefix = Prefix(is_prompt, num_last, is_kept, positions if has_gaps else is_kept.cumsum(1) - 1)
        return self.text(torch.cat([head, visual, tail], dim=1), positions, prefix)[:, -num_last:]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model.norm(hidden))


def initialise(model: DiffusionVLM) -> None:
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
    _place_cells(model.tower, shape)


def _place_cells(tower: Tower, shape: Shape) -> None:
    """Start the position table; where cells have several patches, let a head of the first layer attend to each of them.

    Nothing else tells the parts of a digit from those of the digit in the next cell.
    """
    num_parts = shape.splits**2
    spare = 8 if num_parts > 1 else 0  # channels that tell the parts of a cell apart
    quarter = (shape.tower_width - spare) // 4
    frequencies = 0.5 * torch.pi * (2.0 / shape.grid) ** (torch.arange(quarter) / (quarter - 1))
    angles = torch.arange(shape.grid)[:, None] * frequencies  # [grid, quarter]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = line[:, None].expand(-1, shape.grid, -1)
    columns = line[None].expand(shape.grid, -1, -1)
    table = torch.cat([rows, columns], dim=-1)
    with torch.no_grad():
        if num_parts == 1:
            tower.embeddings.position_embedding.weight.copy_(table.flatten(0, 1))
            return
        side = torch.arange(shape.splits) * 2.0 - 1.0  # two parts per side: -1 and 1
        part = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1)  # [2, 2, 2]
        names = part.repeat_interleave(spare // 2, dim=-1).repeat(shape.grid, shape.grid, 1)
        cells = table.repeat_interleave(shape.splits, 0).repeat_interleave(shape.splits, 1)
        tower.embeddings.position_embedding.weight.copy_(torch.cat([cells, names], dim=-1).flatten(0, 1))
        attention = tower.encoder.layers[0].self_attn
        picked = torch.arange(0, 4 * quarter, 4)[: shape.tower_width // shape.tower_heads - 2]
        for head, of in enumerate(part.flatten(0, 1)):
            first = head * (shape.tower_width // shape.tower_heads)
            rows = torch.arange(len(picked)) + first
            for layer in (attention.q_proj, attention.k_proj):
                layer.weight[first : first + shape.tower_width // shape.tower_heads] *= 0.1
                layer.weight[rows, picked] = _SAME_CELL
            for axis in range(2):
                row = first + len(picked) + axis
                attention.q_proj.bias[row] = _SAME_PART * of[axis]
                begin = 4 * quarter + axis * (spare // 2)
                attention.k_proj.weight[row, begin : begin + spare // 2] = 1.0
