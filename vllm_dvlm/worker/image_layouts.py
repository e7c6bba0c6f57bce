"""Where a request's visual tokens lie in its images: for pictures and for methods that prune by place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_dvlm.checkpoint.anyres import layout_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.multimodal.inputs import MultiModalFeatureSpec

    from vllm_dvlm.checkpoint.anyres import ImageLayoutConfig
    from vllm_dvlm.steps import VisualSpan


def describe_images(features: list[MultiModalFeatureSpec], layout: ImageLayoutConfig) -> list[dict[str, Any] | None]:
    """Where the visual tokens of each image lie in it, for pictures.

    Per image: ``size`` [width, height]; ``overview`` rows and columns of the overview tile's tokens, which come first;
    ``grid`` rows and columns of the map of the tiles (None in pad mode); ``newlines`` whether one newline token follows
    each row of the grid, or the overview without a grid. None for an image whose data did not travel to this worker.
    """
    found: list[dict[str, Any] | None] = []
    for feature in features:
        if feature.data is None:
            found.append(None)
            continue
        width, height = (int(x) for x in feature.data["image_sizes"].data.flatten())
        limit = int(feature.data["grid_limits"].data.flatten()[0])
        place = layout_of(width, height, layout.with_grid_limit(limit))
        side = layout.tokens_per_side
        grid = place.downsampled or place.unpad_out
        found.append(
            {
                "size": [width, height],
                "overview": [side, side],
                "grid": list(grid) if grid else None,
                "newlines": layout.unpads,
            }
        )
    return found


def visual_places(images: Sequence[dict[str, Any] | None], spans: Sequence[VisualSpan]) -> np.ndarray:
    """Row and column of every visual token of a request in the tile or map that it belongs to, from 0.

    A newline token stands in the column behind the last one. Tokens of an image that is not described count as one
    long row.

    Args:
        images: one entry of ``describe_images`` per span.

    Returns:
        [N, 2] int64, N tokens of all spans together.
    """
    places: list[np.ndarray] = []
    for image, span in zip(images, spans, strict=True):
        if image is None:
            places.append(_raster(1, len(span)))
            continue
        rows, columns = image["overview"]
        places.append(_raster(rows, columns))
        if image["grid"] is not None:
            places.append(_raster(image["grid"][0], image["grid"][1] + image["newlines"]))
        elif image["newlines"]:
            places.append(np.array([[rows - 1, columns]]))  # the only one
    return np.concatenate(places)


def _raster(rows: int, columns: int) -> np.ndarray:
    """Places of a map row by row, [rows * columns, 2] int64."""
    return np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)
