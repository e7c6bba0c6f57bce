"""Training batches: scenes, pixels, prompt and canvas ids, all drawn from one seed per step.

B = samples, N = cells of the window shown, K = digits per picture, L = ids after the picture (question, assistant
header and canvas).
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
import vocabulary as words

from vllm_dvlm.synthetic import digit_questions as questions

# More of what takes longer to learn: colour, digit, where, beside, count.
_KIND_SHARES = (0.17, 0.17, 0.18, 0.22, 0.26)
NONE = 10  # stands for an empty cell beside the digits 0 to 9
_NUM_VARIANTS = 100  # copies of each training digit, all different
_GRAIN = 0.1  # standard deviation of the ink, where there is any


@dataclass(frozen=True)
class Window:
    """Pictures of a stage: size range of the part of the grid that they show, in cells, and digits, ends included."""

    smallest: int
    largest: int
    digits: tuple[int, int] = (questions.NUM_DIGITS, questions.NUM_DIGITS)


@dataclass(frozen=True)
class Batch:
    """One batch; every field's first dimension is B."""

    cells: torch.Tensor  # [B, N, patch, patch, 3] uint8
    places: torch.Tensor  # [B, N] int64, row of each cell in the tower's position table
    tail: torch.Tensor  # [B, L] int64, canvas places hold the answer, then end-of-turn tokens
    is_canvas: torch.Tensor  # [B, L] bool
    is_masked: torch.Tensor  # [B, L] bool
    objects: torch.Tensor  # [B, K] int64, index of each digit's cell in the window
    digits: torch.Tensor  # [B, K] int64
    colours: torch.Tensor  # [B, K] int64
    neighbours: torch.Tensor  # [B, K, 2] int64, digits in the cells to the left and to the right, NONE if empty
    relevant: torch.Tensor  # [B, K] bool: the answer needs this digit

    def split(self, size: int) -> list["Batch"]:
        """Parts of at most `size` samples."""
        parts = zip(*(getattr(self, field.name).split(size) for field in fields(self)), strict=True)
        return [Batch(*part) for part in parts]


def training_glyphs(seed: int) -> questions.Glyphs:
    """Varied copies of the training digits, the originals among them."""
    pictures, labels = questions.training_digits()
    generator = torch.Generator().manual_seed(seed)
    copies = [pictures]
    for _ in range(_NUM_VARIANTS - 1):
        copies.append(_varied(torch.from_numpy(pictures), generator).numpy())
    places = np.random.default_rng(seed).integers(questions.NUM_PLACES, size=_NUM_VARIANTS * len(labels))
    return questions.place_digits(np.concatenate(copies), np.tile(labels, _NUM_VARIANTS), places)


def _varied(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[S, 8, 8] turned by up to 26 degrees, slanted, resized, moved, bent, bolder or thinner, with uneven ink.

    So much because the held-out digits are unlike the others: with light variation the same tower reads 94 % of them.
    """
    num = len(pictures)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(num, generator=generator) * 2 - 1) * limit

    angle, slant, width, height = uniform(0.45), uniform(0.5), 1 + uniform(0.3), 1 + uniform(0.3)
    rows = torch.stack([angle.cos() * width, (slant - angle.sin()) * width, uniform(0.2)], dim=1)
    columns = torch.stack([angle.sin() * height, angle.cos() * height, uniform(0.2)], dim=1)
    grid = F.affine_grid(torch.stack([rows, columns], dim=1), (num, 1, 8, 8), align_corners=False)
    bend = torch.randn(num, 2, 3, 3, generator=generator) * 0.15
    grid = grid + F.interpolate(bend, size=8, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    moved = F.grid_sample(pictures[:, None], grid, align_corners=False)[:, 0].clamp(0, 1)
    inked = moved ** (1.1 + uniform(0.5))[:, None, None]
    grain = torch.randn(inked.shape, generator=generator) * _GRAIN
    return torch.where(inked > 0.02, inked + grain, inked).clamp(0, 1)


def draw_batch(
    rng: np.random.Generator, num: int, window: Window, grid: int, glyphs: questions.Glyphs, full_mask: float = 0.4
) -> Batch:
    """A batch of questions of all kinds about windows of one size, anywhere in the grid.

    Canvas and question together have one length per batch, so a short question has a longer canvas: no padding, and
    the model meets canvases of 6 to 16 places.

    Args:
        full_mask: share of canvases with every place masked; the others mask a uniform share of their places.
    """
    low, high = window.smallest, window.largest
    rows = int(rng.integers(low, high + 1))
    num_digits = int(rng.integers(window.digits[0], window.digits[1] + 1))
    least = max(low, 2, -(-num_digits // rows))
    columns = int(rng.integers(least, max(high, least) + 1))
    kinds = rng.choice(len(questions.KINDS), size=num, p=_KIND_SHARES)
    scenes = questions.draw_scenes(rng, kinds, rows, columns, num_digits)
    top, left = rng.integers(grid - rows + 1, size=num), rng.integers(grid - columns + 1, size=num)
    cells = questions.paint(rng, scenes, rows, columns, glyphs).reshape(num, rows * columns, 14, 14, 3)
    row_places = top[:, None] + np.arange(rows)
    column_places = left[:, None] + np.arange(columns)
    places = (row_places[:, :, None] * grid + column_places[:, None]).reshape(num, -1)
    objects = scenes.rows * columns + scenes.columns
    # Rows and columns of the answer are those of the whole grid.
    named = replace(scenes, rows=scenes.rows + top[:, None], columns=scenes.columns + left[:, None])
    tail, is_canvas = _tails(named, num_extra=int(rng.integers(8)))
    share = np.where(rng.random(num) < full_mask, 1.0, rng.random(num))
    is_masked = is_canvas & (rng.random(tail.shape) < share[:, None])
    arrays = (cells, places, tail, is_canvas, is_masked, objects, scenes.digits, scenes.colours)
    arrays += (_neighbours(scenes, rows, columns), scenes.relevant())
    return Batch(*(torch.from_numpy(array) for array in arrays))


def _neighbours(scenes: questions.Scenes, rows: int, columns: int) -> np.ndarray:
    """Digits left and right of each digit, [B, K, 2]."""
    num = len(scenes)
    digit_at = np.full((num, rows, columns + 2), NONE)
    first = np.arange(num)[:, None]
    digit_at[first, scenes.rows, scenes.columns + 1] = scenes.digits
    sides = (scenes.columns, scenes.columns + 2)
    return np.stack([digit_at[first, scenes.rows, side] for side in sides], axis=2)


def _tails(scenes: questions.Scenes, num_extra: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids after the picture [B, L], and which of them are canvas [B, L]."""
    asked = [words.encode(scenes.question(i)) for i in range(len(scenes))]
    length = max(map(len, asked)) + len(words.after_question()) + 6 + num_extra
    tail = np.full((len(asked), length), words.EOT, dtype=np.int64)
    is_canvas = np.zeros((len(asked), length), dtype=bool)
    for i, question in enumerate(asked):
        ids = (*question, *words.after_question())
        answer = words.encode(scenes.answer(i))
        tail[i, : len(ids)] = ids
        tail[i, len(ids) : len(ids) + len(answer)] = answer
        is_canvas[i, len(ids) :] = True
    return tail, is_canvas


def draw_crowd(rng: np.random.Generator, num: int, side: int, grid: int, glyphs: questions.Glyphs) -> Batch:
    """A digit in each cell of a small window and no question: for training the tower alone."""
    shape = (num, side * side)
    digits, colours = rng.integers(10, size=shape), rng.integers(len(questions.COLOURS), size=shape)
    cell = np.broadcast_to(np.arange(side * side), shape)
    none = np.zeros(num, dtype=np.int64)
    scenes = questions.Scenes(digits, colours, cell // side, cell % side, none, none, none)
    cells = questions.paint(rng, scenes, side, side, glyphs).reshape(*shape, 14, 14, 3)
    top, left = rng.integers(grid - side + 1, size=(2, num, 1))
    places = (top + cell // side) * grid + left + cell % side
    empty = np.zeros((num, 0), dtype=np.int64)
    off = np.zeros((num, 0), dtype=bool)
    arrays = (cells, places, empty, off, off, cell.copy(), digits, colours)
    arrays += (_neighbours(scenes, side, side), np.zeros(shape, dtype=bool))
    return Batch(*(torch.from_numpy(array) for array in arrays))
