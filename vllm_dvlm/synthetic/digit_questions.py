"""Questions about pictures of handwritten digits, drawn on the fly; what the demo model learns and is asked.

A picture is a square grid of cells, one per patch token of the model; a few cells hold a digit in one of eight
colours. Digits are scikit-learn's (UCI Optical Recognition of Handwritten Digits): the first `NUM_TRAINING` are for
training, the others are only ever seen in `held_out`. A question has exactly one right answer by construction.

Importing this is cheap; numpy and scikit-learn load with the first draw.

Shapes: B = pictures, K = digits per picture, R and C = rows and columns of cells.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

PATCH = 14  # pixels per cell side: the patch size of LLaDA-V's vision tower
GRID = 12  # cells per side of a held-out picture, which makes it 168 pixels wide: one tile, nothing is resized
NUM_DIGITS = 6  # digits per picture
NUM_TRAINING = 1500  # of scikit-learn's 1,797 digits
MAX_COUNT = 4  # "how many" is at least 1 and at most this

KINDS: tuple[str, ...] = ("colour", "digit", "where", "beside", "count")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 215, 40),
    "orange": (230, 130, 20),
    "purple": (140, 50, 190),
    "pink": (230, 140, 190),
    "white": (230, 230, 230),
}
SIDES = ("left", "right")
# Rows and columns have words of their own: as numbers, a row once written is taken for the digit to look up.
ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
)

_SPRITE = 12  # pixels per digit side; the rest of a cell is room to move
_MOVES = PATCH - _SPRITE + 1
NUM_PLACES = _MOVES**2  # places of a digit in its cell
_BACKGROUND = 16
_NOISE = 24  # added to every value: uniform in [0, _NOISE)
_NOISE_BANK = 1 << 22  # numbers drawn once; pictures take slices, which is ten times faster than drawing


@dataclass(frozen=True)
class Question:
    """A picture and a question with one right answer."""

    image: np.ndarray  # [H, W, 3] uint8
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Glyphs:
    """Handwritten digits ready to paint.

    Attributes:
        shapes: [S, PATCH, PATCH] uint8, ink 0 to 255.
        labels: [S] int64, 0 to 9; every digit occurs.
    """

    shapes: np.ndarray
    labels: np.ndarray

    def draw(self, rng: np.random.Generator, digits: np.ndarray) -> np.ndarray:
        """Ink of a random sample of each digit: `digits`' shape + [PATCH, PATCH] uint8."""
        import numpy as np

        order = np.argsort(self.labels, kind="stable")
        num_of = np.bincount(self.labels, minlength=10)
        begin = np.cumsum(num_of) - num_of
        return self.shapes[order[begin[digits] + (rng.random(digits.shape) * num_of[digits]).astype(np.int64)]]


@dataclass(frozen=True)
class Scenes:
    """What is in B pictures, and what is asked about each.

    Digit 0 of a picture is the one asked about (for "beside": 1 is the one beside it; for "count": the first
    `count` are the ones counted).
    """

    digits: np.ndarray  # [B, K] int64, 0 to 9
    colours: np.ndarray  # [B, K] int64, index into COLOURS
    rows: np.ndarray  # [B, K] int64, from 0 at the top
    columns: np.ndarray  # [B, K] int64, from 0 at the left
    kinds: np.ndarray  # [B] int64, index into KINDS
    sides: np.ndarray  # [B] int64, index into SIDES; read for "beside"
    counts: np.ndarray  # [B] int64; read for "count"

    def __len__(self) -> int:
        return len(self.kinds)

    def question(self, i: int) -> str:
        """Text of question `i`."""
        digit, colour = self.digits[i, 0], list(COLOURS)[self.colours[i, 0]]
        return {
            "colour": f"what colour is the {digit}?",
            "digit": f"which digit is {colour}?",
            "where": f"where is the {digit}?",
            "beside": f"what is {SIDES[self.sides[i]]} of the {digit}?",
            "count": f"how many {digit} are there?",
        }[KINDS[self.kinds[i]]]

    def answer(self, i: int) -> str:
        """Text of the right answer to question `i`; rows and columns count from the top left."""
        return {
            "colour": list(COLOURS)[self.colours[i, 0]],
            "digit": str(self.digits[i, 0]),
            "where": f"{ORDINALS[self.rows[i, 0]]} row {ORDINALS[self.columns[i, 0]]} column",
            "beside": str(self.digits[i, 1]),
            "count": str(self.counts[i]),
        }[KINDS[self.kinds[i]]]

    def relevant(self) -> np.ndarray:
        """Digits that an answer needs to see, [B, K] bool."""
        import numpy as np

        slot = np.arange(self.digits.shape[1])
        needed = np.where(self.kinds == KINDS.index("beside"), 2, 1)
        needed = np.where(self.kinds == KINDS.index("count"), self.counts, needed)
        return slot < needed[:, None]


def held_out(num: int, seed: int = 0, grid: int = GRID) -> list[Question]:
    """`num` questions about digits that training never shows, the same for the same arguments.

    Kinds take turns, so their shares differ by one at most. Each question has a picture of its own.

    Args:
        grid: cells per side, at most as many as there are `ORDINALS`; the demo model's tile has `GRID`.

    Raises ValueError for a grid that is too small or too large.
    """
    import numpy as np

    if grid > len(ORDINALS):
        raise ValueError(f"grid is {grid}; rows and columns have names up to {len(ORDINALS)}")

    rng = np.random.default_rng((seed, 0xD161))
    scenes = draw_scenes(rng, np.arange(num) % len(KINDS), grid, grid)
    glyphs = held_out_glyphs()
    images: list[np.ndarray] = []
    for start in range(0, num, 64):  # a thousand pictures at once would take half a gigabyte while being drawn
        part = slice(start, min(start + 64, num))
        images += list(join_cells(paint(rng, _take(scenes, part), grid, grid, glyphs)))
    return [Question(images[i], scenes.question(i), scenes.answer(i), KINDS[scenes.kinds[i]]) for i in range(num)]


def draw_scenes(
    rng: np.random.Generator, kinds: np.ndarray, rows: int, columns: int, num_digits: int = NUM_DIGITS
) -> Scenes:
    """Scenes for questions of the given kinds.

    Args:
        kinds: [B], index into KINDS.
        rows, columns: cells; at least num_digits cells and two columns.
        num_digits: digits per picture, at least 2.

    Raises ValueError for a grid that is too small.
    """
    import numpy as np

    if not 2 <= num_digits <= rows * columns or columns < 2:
        raise ValueError(f"A grid of {rows}x{columns} cells cannot hold {num_digits} digits, two of them side by side.")
    num = len(kinds)
    # Others differ from digit 0 in the property that is asked for; adding 1 to 9 modulo 10 is uniform over those.
    digits = rng.integers(10, size=(num, num_digits))
    other_digits = (digits[:, :1] + rng.integers(1, 10, size=(num, num_digits))) % 10
    colours = rng.integers(len(COLOURS), size=(num, num_digits))
    other_colours = (colours[:, :1] + rng.integers(1, len(COLOURS), size=(num, num_digits))) % len(COLOURS)
    counts = rng.integers(1, min(MAX_COUNT, num_digits) + 1, size=num)
    slot = np.arange(num_digits)
    same = np.where(kinds == KINDS.index("count"), counts, 1)[:, None]
    by_colour = (kinds == KINDS.index("digit"))[:, None]
    digits = np.where(by_colour, digits, np.where(slot < same, digits[:, :1], other_digits))
    colours = np.where(by_colour & (slot > 0), other_colours, colours)
    sides = rng.integers(len(SIDES), size=num)
    cells = _draw_cells(rng, kinds == KINDS.index("beside"), sides, rows, columns, num_digits)
    return Scenes(digits, colours, cells // columns, cells % columns, np.asarray(kinds), sides, counts)


def _draw_cells(
    rng: np.random.Generator, paired: np.ndarray, sides: np.ndarray, rows: int, columns: int, num_digits: int
) -> np.ndarray:
    """Distinct cells, [B, K]; where `paired`, 1 stands beside 0, and half the time 2 stands on its other side."""
    import numpy as np

    num = len(paired)
    keys = rng.random((num, rows * columns))
    step = np.where(sides == SIDES.index("left"), -1, 1)
    column = rng.integers(columns - 1, size=num) + (step < 0)
    first = rng.integers(rows, size=num) * columns + column
    opposite = column - step
    has_opposite = (num_digits > 2) & paired & (opposite >= 0) & (opposite < columns) & (rng.random(num) < 0.5)
    # The smallest keys come first.
    keys[paired, first[paired]] = -3
    keys[paired, (first + step)[paired]] = -2
    keys[has_opposite, (first - step)[has_opposite]] = -1
    cells = np.argpartition(keys, num_digits - 1, axis=1)[:, :num_digits]
    order = np.take_along_axis(keys, cells, axis=1).argsort(axis=1)
    return np.take_along_axis(cells, order, axis=1)


def paint(rng: np.random.Generator, scenes: Scenes, rows: int, columns: int, glyphs: Glyphs) -> np.ndarray:
    """Pixels of the scenes by cell, [B, R, C, PATCH, PATCH, 3] uint8, light noise included."""
    import numpy as np

    num = len(scenes)
    tints = np.array(list(COLOURS.values()), dtype=np.uint16)[scenes.colours] - _BACKGROUND  # [B, K, 3]
    ink = glyphs.draw(rng, scenes.digits)[..., None] * tints[:, :, None, None] // 255
    bank, size = _noise_bank(), rows * columns * PATCH * PATCH * 3
    starts = rng.integers(_NOISE_BANK - size, size=num)
    pictures = np.stack([bank[start : start + size] for start in starts])
    pictures = pictures.reshape(num, rows, columns, PATCH, PATCH, 3)
    pictures += np.uint8(_BACKGROUND)
    pictures[np.arange(num)[:, None], scenes.rows, scenes.columns] += ink.astype(np.uint8)
    return pictures


def join_cells(cells: np.ndarray) -> np.ndarray:
    """[B, R, C, PATCH, PATCH, 3] to pictures [B, R * PATCH, C * PATCH, 3]."""
    num, rows, columns = cells.shape[:3]
    return cells.swapaxes(2, 3).reshape(num, rows * PATCH, columns * PATCH, 3)


def _take(scenes: Scenes, part: slice) -> Scenes:
    return Scenes(**{name: values[part] for name, values in vars(scenes).items()})


def training_digits() -> tuple[np.ndarray, np.ndarray]:
    """(pictures [1500, 8, 8] float32 in [0, 1], labels [1500] int64)."""
    pictures, labels = _digits()
    return pictures[:NUM_TRAINING], labels[:NUM_TRAINING]


def held_out_digits() -> tuple[np.ndarray, np.ndarray]:
    """(pictures [297, 8, 8] float32 in [0, 1], labels [297] int64)."""
    pictures, labels = _digits()
    return pictures[NUM_TRAINING:], labels[NUM_TRAINING:]


@functools.cache
def held_out_glyphs() -> Glyphs:
    """Every held-out digit at every place in its cell."""
    import numpy as np

    pictures, labels = held_out_digits()
    moves = np.arange(NUM_PLACES)
    return place_digits(
        np.repeat(pictures, NUM_PLACES, axis=0), np.repeat(labels, NUM_PLACES), np.tile(moves, len(labels))
    )


def place_digits(pictures: np.ndarray, labels: np.ndarray, places: np.ndarray) -> Glyphs:
    """Enlarge digits to the size they have in a picture and put each at a place in its cell.

    Args:
        pictures: [S, 8, 8] float32 in [0, 1].
        labels: [S] int64.
        places: [S] int64, 0 to NUM_PLACES - 1, row by row.
    """
    import numpy as np

    # Linear interpolation as a matrix, applied to both sides.
    at = (np.arange(_SPRITE) + 0.5) * 8 / _SPRITE - 0.5
    weight = np.clip(1 - np.abs(at[:, None] - np.arange(8)), 0, 1).astype(np.float32)
    weight /= weight.sum(axis=1, keepdims=True)
    large = (weight @ pictures @ weight.T * 255).astype(np.uint8)
    shapes = np.zeros((len(large), PATCH, PATCH), dtype=np.uint8)
    for place in range(NUM_PLACES):
        y, x = divmod(place, _MOVES)
        here = places == place
        shapes[here, y : y + _SPRITE, x : x + _SPRITE] = large[here]
    return Glyphs(shapes, labels)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All of scikit-learn's digits: ([1797, 8, 8] float32 in [0, 1], labels [1797] int64)."""
    import numpy as np
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target.astype(np.int64)


@functools.cache
def _noise_bank() -> np.ndarray:
    """[_NOISE_BANK] uint8."""
    import numpy as np

    return np.random.default_rng(0).integers(_NOISE, size=_NOISE_BANK, dtype=np.uint8)
