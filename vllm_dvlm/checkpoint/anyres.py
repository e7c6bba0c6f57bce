"""Image layout of LLaVA-style "any resolution" models: tiles, token counts and token order.

Pure arithmetic first (front end and worker must agree on it without a message), then pixels, then
the arrangement of projected features. Numbers in brackets are points of the README in
tests/golden/llada_v; what pools or does not unpad: section "Image" of the one in tests/golden/lavida.
"""

# T = tiles of an image, H = W = tile side in pixels, P = patches per tile side, S = tokens per tile side (P
# unless pooled), N = visual tokens of an image, D = hidden size, h and w = rows and columns of the joined map.

import ast
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

# Padding colours of the two modes [6], [9]: the grid canvas is black, the square is the training
# code's mid grey.
_GRID_FILL = (0, 0, 0)
_SQUARE_FILL = (127, 127, 127)
# Channels of a map that are joined and shrunk together. The map of 36 tiles takes 430 MB in float32 at
# a width of 4,096; its channels do not depend on each other.
_CHANNELS_AT_ONCE = 256
# Shrinking starts only when it is worth it: the map is more than 1.1 times too long per side [13].
_SHRINK_ABOVE = 1.1


@dataclass(frozen=True)
class ImageLayoutConfig:
    """What a checkpoint says about turning an image into tiles and visual tokens.

    Attributes:
        mode: "anyres" (overview tile and a grid of tiles) or "pad" (one tile, image padded to a
            square).
        max_grid_tiles: N of "anyres_max_N": the joined map is shrunk to about N tiles; None is off.
        pinpoints: candidate grid canvases, (width, height) in pixels, in the checkpoint's order.
        tile_size: tile side in pixels.
        patches_per_side: patches per tile side.
        resample: Pillow resampling filter; bicubic is Pillow's default for RGB.
        mean, std: normalisation of value / 255, equal in all channels.
        pooled_side: side to which a tile's projected patch map is resized; None: it is not.
        unpads: True ("spatial_unpad"): padding is cut off the joined map and a newline token ends each of its
            rows, or the single tile; False ("spatial"): neither.
    """

    mode: str
    pinpoints: tuple[tuple[int, int], ...]
    tile_size: int
    patches_per_side: int
    max_grid_tiles: int | None = None
    resample: int = Image.Resampling.BICUBIC
    mean: float = 0.5
    std: float = 0.5
    pooled_side: int | None = None
    unpads: bool = True

    @classmethod
    def from_hf_config(
        cls,
        config,
        vision_config=None,
        *,
        pool_stride: int | None = None,
        merge_types: tuple[str, ...] = ("spatial_unpad",),
    ) -> "ImageLayoutConfig":
        """Read `image_aspect_ratio`, `image_grid_pinpoints`, `mm_patch_merge_type` and, unless given, `vision_config`.

        Raises ValueError, naming the key, for a value that is not supported.

        Args:
            pool_stride: patches per side that become one token, the last one perhaps smaller; None: no pooling.
            merge_types: values of `mm_patch_merge_type` that the model family has, its default first.
        """
        vision = vision_config if vision_config is not None else config.vision_config
        merge_type = _supported(config, "mm_patch_merge_type", *merge_types)
        _supported(config, "mm_newline_position", "grid")
        if pool_stride is not None:
            _supported(config, "mm_spatial_pool_mode", "bilinear")
        tile = _side(vision.image_size, "image_size")
        patches = tile // _side(vision.patch_size, "patch_size")
        mode, max_grid_tiles = parse_aspect_ratio(getattr(config, "image_aspect_ratio", None))
        pinpoints = getattr(config, "image_grid_pinpoints", None)
        if pinpoints is not None or mode == "anyres":
            pinpoints = parse_pinpoints(pinpoints, tile)
        return cls(
            mode=mode,
            pinpoints=pinpoints or (),
            tile_size=tile,
            patches_per_side=patches,
            max_grid_tiles=max_grid_tiles,
            pooled_side=None if pool_stride is None else -(-patches // pool_stride),
            unpads=merge_type == "spatial_unpad",
        )

    def with_aspect_ratio(self, value: object) -> "ImageLayoutConfig":
        """The same layout in another mode, named as in `image_aspect_ratio`.

        Raises ValueError if it is unknown, or needs pinpoints that the checkpoint does not have.
        """
        mode, max_grid_tiles = parse_aspect_ratio(value)
        if mode == "anyres" and not self.pinpoints:
            raise ValueError(f"image_aspect_ratio={value!r} needs image_grid_pinpoints, the checkpoint has none.")
        return replace(self, mode=mode, max_grid_tiles=max_grid_tiles)

    @property
    def tokens_per_side(self) -> int:
        """Visual tokens per tile side."""
        return self.patches_per_side if self.pooled_side is None else self.pooled_side

    @property
    def grid_limit(self) -> int:
        """The mode as one number that travels with an image: -1 "pad", 0 "anyres", N its max."""
        return -1 if self.mode == "pad" else self.max_grid_tiles or 0

    def with_grid_limit(self, grid_limit: int) -> "ImageLayoutConfig":
        """Inverse of `grid_limit`."""
        mode = "pad" if grid_limit < 0 else "anyres"
        return replace(self, mode=mode, max_grid_tiles=grid_limit if grid_limit > 0 else None)


def lavida_layout(config, vision_config=None) -> ImageLayoutConfig:
    """Layout of LaViDa: every second patch per side after the projector, padding kept if the checkpoint says so."""
    merges = ("spatial_unpad", "spatial")
    return ImageLayoutConfig.from_hf_config(config, vision_config, pool_stride=2, merge_types=merges)


@dataclass(frozen=True)
class ImageLayout:
    """Tiles and patch map of one image size; pairs are (rows, columns), None in "pad" mode.

    Attributes:
        grid_tiles: the grid of tiles.
        unpad_in, unpad_out: map of tokens before and after padding is cut off; equal if it is not.
        downsampled: patch map after shrinking, None if it is not shrunk.
        num_tiles: tiles that go through the vision tower, the overview tile included.
        num_visual_tokens: tokens in the prompt, newline tokens included.
    """

    num_tiles: int
    num_visual_tokens: int
    grid_tiles: tuple[int, int] | None = None
    unpad_in: tuple[int, int] | None = None
    unpad_out: tuple[int, int] | None = None
    downsampled: tuple[int, int] | None = None
    rows_cut: int = 0
    columns_cut: int = 0


def parse_aspect_ratio(value: object) -> tuple[str, int | None]:
    """Read `image_aspect_ratio`: ("anyres" or "pad", N of "anyres_max_N" or None).

    Raises ValueError for anything else.
    """
    if value == "pad":
        return "pad", None
    match = re.fullmatch(r"anyres(?:_max_([1-9]\d*))?", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"image_aspect_ratio={value!r} is not supported: use 'anyres', 'anyres_max_N' or 'pad'.")
    return "anyres", int(match[1]) if match[1] else None


def parse_pinpoints(value: object, tile_size: int) -> tuple[tuple[int, int], ...]:
    """Grid canvases as ((width, height), ...) from a list, its text, or the range form
    "(1x1),...,(6x6)".

    The range form means every width factor from the first to the last, outermost, with every height
    factor. Raises ValueError if nothing can be read or a side is not a multiple of tile_size.
    """
    if isinstance(value, str):
        factors = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)\s*x\s*(\d+)\)", value)]
        if factors:
            (w0, h0), (w1, h1) = factors[0], factors[-1]
            value = [(a * tile_size, b * tile_size) for a in range(w0, w1 + 1) for b in range(h0, h1 + 1)]
        else:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                value = None
    try:
        points = tuple((int(w), int(h)) for w, h in value)
    except (TypeError, ValueError):
        points = ()
    if not points:
        raise ValueError("image_grid_pinpoints must list [width, height] pairs or read like '(1x1),...,(6x6)'.")
    for point in points:
        if any(side < tile_size or side % tile_size for side in point):
            raise ValueError(f"image_grid_pinpoints: {point} is no multiple of the tile size {tile_size}.")
    return points


def select_grid(width: int, height: int, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The grid canvas (width, height) that keeps most of the image's pixels, then wastes least,
    then comes first [5]."""
    best, best_rank = None, None
    for canvas_w, canvas_h in pinpoints:
        scale = min(canvas_w / width, canvas_h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        rank = (effective, effective - canvas_w * canvas_h)
        if best_rank is None or rank > best_rank:
            best, best_rank = (canvas_w, canvas_h), rank
    assert best is not None
    return best


@lru_cache(maxsize=4096)
def layout_of(width: int, height: int, layout: ImageLayoutConfig) -> ImageLayout:
    """Tiles and patch map of an image of `width` x `height` pixels [5], [11]-[15].

    Raises ValueError for an image without pixels and for one so thin that cutting off the padding
    leaves nothing.
    """
    if width < 1 or height < 1:
        raise ValueError(f"An image of {width}x{height} pixels cannot be used: send one with at least one pixel.")
    side, newline = layout.tokens_per_side, int(layout.unpads)
    if layout.mode == "pad":
        return ImageLayout(num_tiles=1, num_visual_tokens=side * side + newline)
    canvas_w, canvas_h = select_grid(width, height, layout.pinpoints)
    columns_of_tiles, rows_of_tiles = canvas_w // layout.tile_size, canvas_h // layout.tile_size
    h, w = full = rows_of_tiles * side, columns_of_tiles * side
    rows_cut, columns_cut = _padding(width, height, h, w) if layout.unpads else (0, 0)
    h, w = cut = h - 2 * rows_cut, w - 2 * columns_cut
    if h < 1 or w < 1:
        raise ValueError(
            f"An image of {width}x{height} pixels is too thin to leave a token: crop it, or scale "
            "it without keeping the ratio."
        )
    shrunk = None
    if layout.max_grid_tiles is not None and layout.unpads:
        times = math.sqrt(h * w / (layout.max_grid_tiles * side**2))
        if times > _SHRINK_ABOVE:
            h, w = shrunk = int(h // times), int(w // times)
    return ImageLayout(
        num_tiles=1 + rows_of_tiles * columns_of_tiles,
        num_visual_tokens=side * side + h * (w + newline),
        grid_tiles=(rows_of_tiles, columns_of_tiles),
        unpad_in=full,
        unpad_out=cut,
        downsampled=shrunk,
        rows_cut=rows_cut,
        columns_cut=columns_cut,
    )


def num_visual_tokens(width: int, height: int, layout: ImageLayoutConfig) -> int:
    """Visual tokens of an image, newline tokens included [14], [15]. Errors as `layout_of`."""
    return layout_of(width, height, layout).num_visual_tokens


@lru_cache(maxsize=64)
def largest_image(layout: ImageLayoutConfig, max_tiles: int | None = None) -> tuple[int, int]:
    """(width, height) of an image with the most visual tokens; budgets are sized by it.

    max_tiles: images of more tiles do not count; None: no limit.
    """
    return _most(layout, max_tiles, lambda found: (found.num_visual_tokens, found.num_tiles))


@lru_cache(maxsize=64)
def heaviest_image(layout: ImageLayoutConfig, max_tiles: int | None = None) -> tuple[int, int]:
    """(width, height) of an image with the most tiles, and of those the most visual tokens; what start-up profiling
    runs, since the memory of encoding an image follows its tiles.

    max_tiles: images of more tiles do not count; None: no limit.
    """
    return _most(layout, max_tiles, lambda found: (found.num_tiles, found.num_visual_tokens))


def _most(
    layout: ImageLayoutConfig, max_tiles: int | None, rank: Callable[[ImageLayout], tuple[int, int]]
) -> tuple[int, int]:
    """Size of the image of highest rank. Tries, per grid, images that fill it to every possible number of rows or
    columns."""
    side, tile = layout.tokens_per_side, layout.tile_size
    best, best_rank = (tile, tile), (-1, -1)
    for canvas_w, canvas_h in layout.pinpoints:
        rows, columns = canvas_h // tile * side, canvas_w // tile * side
        sizes = [(canvas_w, max(1, round(canvas_h * i / rows))) for i in range(1, rows + 1)]
        sizes += [(max(1, round(canvas_w * i / columns)), canvas_h) for i in range(1, columns)]
        for size in sizes:
            try:
                found = layout_of(*size, layout)
            except ValueError:
                continue
            if max_tiles is not None and found.num_tiles > max_tiles:
                continue
            if rank(found) > best_rank:
                best, best_rank = size, rank(found)
    return best


def preprocess(image: Image.Image, layout: ImageLayoutConfig) -> torch.Tensor:
    """Tiles of an image, overview first, then the grid row by row [6]-[9].

    Args:
        image: RGB, at least one pixel.

    Returns:
        [T, 3, H, W] float32, normalised.
    """
    tile = layout.tile_size
    if layout.mode == "pad":
        tiles = np.asarray(_square(image).resize((tile, tile), layout.resample))[None]
    else:
        canvas = _grid_canvas(image, layout)
        rows, columns = canvas.height // tile, canvas.width // tile
        grid = np.asarray(canvas).reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
        overview = np.asarray(image.resize((tile, tile), layout.resample))
        tiles = np.concatenate([overview[None], grid.reshape(rows * columns, tile, tile, 3)])
    values = _normalised_values(layout.mean, layout.std)[tiles.transpose(0, 3, 1, 2)]
    return torch.from_numpy(np.ascontiguousarray(values))


def arrange(
    features: torch.Tensor,
    size: tuple[int, int],
    layout: ImageLayoutConfig,
    image_newline: torch.Tensor,
) -> torch.Tensor:
    """Visual tokens of one image in prompt order [11]-[15].

    Args:
        features: [T, P * P, D], projected tile features, any float dtype.
        size: (width, height) of the original image.
        image_newline: [D], appended to every row of the map, and once in "pad" mode; unused if the layout does
            not unpad.

    Returns:
        [N, D] in the dtype of `features`.
    """
    found = layout_of(*size, layout)
    num_tiles, _, hidden = features.shape
    if num_tiles != found.num_tiles:
        raise ValueError(f"{num_tiles} tiles given, an image of {size} has {found.num_tiles}.")
    side = layout.tokens_per_side
    if layout.pooled_side is not None:
        features = _resize(features.unflatten(1, (layout.patches_per_side, -1)), (side, side)).flatten(1, 2)
    newline = image_newline.to(features)
    if found.grid_tiles is None:
        return torch.cat([features[0], newline[None]]) if layout.unpads else features[0]
    rows, columns = found.grid_tiles
    grid = features[1:].view(rows, columns, side, side, hidden).transpose(1, 2)
    (h, w), (top, left) = found.unpad_out, (found.rows_cut, found.columns_cut)
    height, width = found.downsampled or (h, w)
    tokens = features.new_empty(found.num_visual_tokens, hidden)
    tokens[: side * side] = features[0]
    lines = tokens[side * side :].view(height, width + layout.unpads, hidden)
    if layout.unpads:
        lines[:, width] = newline
    for first in range(0, hidden, _CHANNELS_AT_ONCE):
        channels = slice(first, first + _CHANNELS_AT_ONCE)
        part = grid[..., channels].reshape(rows * side, columns * side, -1)[top : top + h, left : left + w]
        if found.downsampled is not None:
            part = _resize(part[None], found.downsampled)[0]
        lines[:, :width, channels] = part
    return tokens


def _resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear, [M, h, w, D] to [M, *size, D] in the same dtype."""
    # float32 whatever the model's dtype: the weights of the four neighbours do not fit into bfloat16.
    wide = maps.permute(0, 3, 1, 2).float()
    wide = torch.nn.functional.interpolate(wide, size=size, mode="bilinear", align_corners=False)
    return wide.permute(0, 2, 3, 1).to(maps.dtype)


def _padding(width: int, height: int, h: int, w: int) -> tuple[int, int]:
    """(rows, columns) to cut at each side of an h x w map [12]; an odd difference leaves one padded
    line."""
    if width / height > w / h:
        return (h - int(height * (w / width))) // 2, 0
    return 0, (w - int(width * (h / height))) // 2


def _grid_canvas(image: Image.Image, layout: ImageLayoutConfig) -> Image.Image:
    """The image, scaled to fit and centred on its black grid canvas [6]."""
    width, height = image.size
    canvas_w, canvas_h = select_grid(width, height, layout.pinpoints)
    scale_w, scale_h = canvas_w / width, canvas_h / height
    if scale_w < scale_h:
        new = canvas_w, min(math.ceil(height * scale_w), canvas_h)
    else:
        new = min(math.ceil(width * scale_h), canvas_w), canvas_h
    canvas = Image.new("RGB", (canvas_w, canvas_h), _GRID_FILL)
    canvas.paste(image.resize(new, layout.resample), ((canvas_w - new[0]) // 2, (canvas_h - new[1]) // 2))
    return canvas


def _square(image: Image.Image) -> Image.Image:
    """The image, centred on a grey square of its longer side [9]."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), _SQUARE_FILL)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


@lru_cache(maxsize=8)
def _normalised_values(mean: float, std: float) -> np.ndarray:
    """[256] float32: a look-up by pixel value is exact and faster than arithmetic on every pixel
    [8]."""
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    return (scaled - np.float32(mean)) / np.float32(std)


def _supported(config, key: str, *values: str) -> str:
    """The config's value of `key`, the first of `values` if it has none. ValueError if it is none of them."""
    value = getattr(config, key, None)
    if value is None:
        return values[0]
    if value not in values:
        raise ValueError(f"{key}={value!r} is not supported, only {' or '.join(map(repr, values))}.")
    return value


def _side(value: object, name: str) -> int:
    """Side of a square given as one number or as two equal ones."""
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int):
        raise ValueError(f"vision_config.{name}={value!r} must be one positive number.")
    return value
