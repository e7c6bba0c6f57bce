"""From tiles to visual tokens: SigLIP tower, projector and newline vector, as modules that vLLM
loads.

Source: tests/golden/llada_v/README.md, points 10 to 15, and tests/golden/lavida/README.md, "Image".
"""

# T = tiles, H = W = tile side in pixels, P = patches per tile side, N = visual tokens of one image,
# D = hidden size of the language model, V = hidden size of the tower.

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.siglip import SiglipVisionModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.model_executor.models.vision import is_vit_use_data_parallel, run_dp_sharded_vision_model

from vllm_dvlm.checkpoint.anyres import arrange
from vllm_dvlm.checkpoint.configuration import resolve_vision_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Tiles per pass through the tower. Its MLP holds about 20 MiB a tile at full size in float32, and a
# pass of this many already fills a GPU; a batch of requests may bring hundreds. Small images share a
# pass, a larger one has its own: no more than one large image's features exist at a time.
_TILES_PER_PASS = 16


class VisionStack(nn.Module):
    """Vision tower, projector and `image_newline` of a LLaVA-style checkpoint.

    Children are `vision_tower`, `mm_projector` and `image_newline`; `weights_mapper` maps
    checkpoint names to them. The tower runs all its layers but the last and no closing norm [10];
    the checkpoint may contain those or not.
    """

    def __init__(self, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        vision_config = resolve_vision_config(config)
        self.layout = config.image_layout(vision_config)
        self.is_shared_out = is_vit_use_data_parallel() and get_tensor_model_parallel_world_size() > 1
        self.vision_tower = SiglipVisionModel(
            vision_config,
            quant_config=None,
            num_hidden_layers_override=vision_config.num_hidden_layers - 1,
            require_post_norm=False,
            prefix=maybe_prefix(prefix, "vision_tower"),
        )
        self.mm_projector = build_projector(config.mm_projector_type, vision_config.hidden_size, config.hidden_size)
        # Zeros, since a checkpoint whose layout has no newline tokens may be without it.
        self.image_newline = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)

    @staticmethod
    def weights_mapper(prefix: str = "vision.") -> WeightsMapper:
        """Checkpoint names to names of a model that holds this module under `prefix`."""
        return WeightsMapper(
            orig_to_new_prefix={
                "model.vision_tower.vision_tower.": prefix + "vision_tower.",
                "model.mm_projector.": prefix + "mm_projector.",
                "model.image_newline": prefix + "image_newline",
            }
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors under the names of the children; `image_newline` may be missing where the layout has no use for
        it."""
        loaded = AutoWeightsLoader(self).load_weights(weights)
        return loaded if self.layout.unpads else loaded | {"image_newline"}

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[T, 3, H, W] of any float dtype to projected patch features, [T, P * P, D] in the
        weights' dtype."""
        features = None
        for first in range(0, len(pixel_values), _TILES_PER_PASS):
            part = self.mm_projector(self._encode(pixel_values[first : first + _TILES_PER_PASS]))
            if len(part) == len(pixel_values):
                return part
            if features is None:
                features = part.new_empty(len(pixel_values), *part.shape[1:])
            features[first : first + len(part)] = part
        return features

    def _encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """One pass through the tower; where each rank holds it whole, each takes its share of the tiles."""
        if self.is_shared_out:
            return run_dp_sharded_vision_model(tiles, self.vision_tower)
        return self.vision_tower(tiles)

    def embed(
        self,
        pixel_values: torch.Tensor,
        num_tiles: Sequence[int],
        image_sizes: Sequence[tuple[int, int]],
        grid_limits: Sequence[int] | None = None,
    ) -> list[torch.Tensor]:
        """Visual tokens of several images, of one request or of many.

        Args:
            pixel_values: [T, 3, H, W], tiles of all images one after another.
            num_tiles: tiles of each image; they sum to T.
            image_sizes: (width, height) of each original image.
            grid_limits: `ImageLayoutConfig.grid_limit` each image was cut with; None: the
                checkpoint's for all.

        Returns:
            One [N, D] per image, newline tokens included.
        """
        if grid_limits is None:
            grid_limits = [self.layout.grid_limit] * len(num_tiles)
        images = [
            (tiles, size, self.layout.with_grid_limit(limit))
            for tiles, size, limit in zip(pixel_values.split(list(num_tiles)), image_sizes, grid_limits, strict=True)
        ]
        found: list[torch.Tensor] = []
        first = start = 0
        for i, count in enumerate([*num_tiles, _TILES_PER_PASS + 1]):
            group = images[first:i]
            num = sum(len(tiles) for tiles, _, _ in group)
            if group and num + count > _TILES_PER_PASS:
                features = self(pixel_values[start : start + num]).split([len(tiles) for tiles, _, _ in group])
                found += [
                    arrange(own, size, layout, self.image_newline)
                    for own, (_, size, layout) in zip(features, group, strict=True)
                ]
                del features
                first, start = i, start + num
        return found

    def embed_multimodal(self, **kwargs: object) -> list[torch.Tensor]:
        """`embed` for the fields of `TileMultiModalProcessor`, as vLLM hands them to a model.

        Returns an empty list where there is no image.
        """
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        if not isinstance(pixel_values, torch.Tensor):
            pixel_values = torch.cat(list(pixel_values))
        # These three stay on the host (`keep_on_cpu`), so reading them waits for nothing.
        num_tiles, sizes, limits = (
            torch.as_tensor(kwargs[name]).cpu() for name in ("num_tiles", "image_sizes", "grid_limits")
        )
        return self.embed(
            pixel_values.flatten(0, -4),
            num_tiles.flatten().tolist(),
            [(w, h) for w, h in sizes.view(-1, 2).tolist()],
            limits.flatten().tolist(),
        )


def build_projector(kind: str, vision_width: int, width: int) -> nn.Module:
    """Projector by its name in `mm_projector_type`; replicated on every rank, it is small.

    "linear" is one layer named `mm_projector`, "mlpNx_gelu" N layers named `mm_projector.0`, `.2`,
    ... with the exact GELU between them [10]. ValueError for anything else.
    """
    if kind == "linear":
        return nn.Linear(vision_width, width)
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        raise ValueError(f"mm_projector_type={kind!r} is not supported: use 'linear' or 'mlpNx_gelu'.")
    layers: list[nn.Module] = [nn.Linear(vision_width, width)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)
