"""Questions about images with known answers: from a JSONL file, or the demo's held-out set; and writing such a file.

One object per line, paths relative to the file:

    {"image": "cats.png", "question": "How many cats are there?", "answer": "two", "kind": "count"}
    {"images": ["a.png", "data:image/png;base64,..."], "question": "Which is red?", "answer": ["left", "the left one"]}

`kind` is optional. Light to import: images are opened where they are needed.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_BYTES = 64 * 2**20
# As for images over HTTP: a file of a few kB may announce a picture that takes GBs.
MAX_IMAGE_PIXELS = 64 * 2**20
MAX_LINE_CHARS = 2 * MAX_IMAGE_BYTES
NO_KIND = "all"
_FIELDS = ("image", "images", "question", "answer", "kind")


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    images: encoded pictures, each a path or the bytes of a file; not decoded, so that a large set fits into memory.
    answers: accepted answers; one of them has to be met.
    sizes: (width, height) of each image, in pixels.
    """

    question: str
    answers: tuple[str, ...]
    kind: str
    images: tuple[Path | bytes, ...]
    sizes: tuple[tuple[int, int], ...]

    def open_images(self) -> list[Image]:
        """Decoded pictures, in the order of the question."""
        return [decode_image(source) for source in self.images]


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A line that is left out, and why."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


def decode_image(source: Path | bytes) -> Image:
    """Decode a picture. ValueError, with the reason, if it is missing, broken or too large."""
    from PIL import Image as Pillow

    name = source.name if isinstance(source, Path) else "data URL"
    try:
        if isinstance(source, Path):
            if source.stat().st_size > MAX_IMAGE_BYTES:
                raise ValueError(f"image {name} has more than {MAX_IMAGE_BYTES >> 20} MiB")
            source = source.read_bytes()
        elif len(source) > MAX_IMAGE_BYTES:
            raise ValueError(f"image in a {name} has more than {MAX_IMAGE_BYTES >> 20} MiB")
        with Pillow.open(io.BytesIO(source)) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"image {name} of {image.width}x{image.height} pixels is too large to decode")
            return image.copy()  # decodes
    except FileNotFoundError:
        raise ValueError(f"image {name} does not exist") from None
    except Pillow.DecompressionBombError as error:  # Pillow's own limit, which an engine in this process lifts
        raise ValueError(f"image {name} is too large to decode: {error}") from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"image {name} cannot be read: {error}") from None


def load_jsonl(path: Path) -> tuple[list[Item], list[BadRow]]:
    """Good rows and bad ones. ValueError if the file is missing or no row is good; empty lines do not count."""
    if not path.is_file():
        raise ValueError(f"{path} is no file.")
    items: list[Item] = []
    bad: list[BadRow] = []
    for number, line in _lines(path):
        try:
            items.append(_item(line, path.parent))
        except ValueError as error:
            bad.append(BadRow(number, str(error)))
    if not items:
        first = f"; {bad[0]}" if bad else ""
        raise ValueError(f"{path} holds no usable question{first}.")
    return items, bad


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, with their numbers from 1; of a longer one than allowed only the beginning."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_CHARS):
            number += 1
            whole = line
            while not whole.endswith(b"\n") and (whole := file.readline(MAX_LINE_CHARS)):
                pass
            if line.strip():
                yield number, line


def _item(line: bytes, folder: Path) -> Item:
    """A row. ValueError with the reason."""
    if len(line) >= MAX_LINE_CHARS:
        raise ValueError(f"longer than {MAX_LINE_CHARS >> 20} MiB")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are ValueErrors, too
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"an object is expected, not {_type_name(row)}")
    if unknown := sorted(set(row) - set(_FIELDS)):
        raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(_FIELDS)}")
    question, kind = _text(row, "question"), _text(row, "kind") if row.get("kind") is not None else NO_KIND
    answers = row.get("answer")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError("'answer' must be text or a list of accepted texts, none of them empty")
    images = tuple(_source(value, folder) for value in _image_fields(row))
    sizes = tuple(decode_image(source).size for source in images)
    return Item(question, tuple(answers), kind, images, sizes)


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} is missing" if value is None else f"{name!r} must be text that is not empty")
    return value


def _image_fields(row: dict[str, Any]) -> list[str]:
    if (row.get("image") is None) == (row.get("images") is None):
        raise ValueError("either 'image' or 'images' must be there")
    values = [row["image"]] if row.get("image") is not None else row["images"]
    if not isinstance(values, list) or not values or not all(isinstance(value, str) and value for value in values):
        raise ValueError("'image' must be a path or data URL, 'images' a list of them")
    return values


def _source(value: str, folder: Path) -> Path | bytes:
    if not value.startswith("data:"):
        return folder / value
    head, comma, data = value.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("a data URL must be of the form data:image/...;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"data URL: {error}") from None


def _type_name(value: Any) -> str:
    return {list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def load_items(path: str | None, num: int, seed: int) -> tuple[list[Item], list[BadRow]]:
    """Questions of a run: the first `num` good rows of a file, or `num` of the demo's held-out set.

    ValueError as in `load_jsonl`, or if `num` is not positive.
    """
    if num < 1:
        raise ValueError("--num must be at least 1.")
    if path is not None:
        items, bad = load_jsonl(Path(path))
        return items[:num], bad
    return [_demo_item(question) for question in _demo_questions(num, seed)], []


def _demo_questions(num: int, seed: int) -> list[Any]:
    from vllm_dvlm.synthetic import digit_questions

    return digit_questions.held_out(num, seed)


def _demo_item(question: Any) -> Item:
    height, width = question.image.shape[:2]
    return Item(question.question, (question.answer,), question.kind, (_png(question.image),), ((width, height),))


def _png(pixels: Any) -> bytes:
    """pixels: [H, W, 3] uint8."""
    from PIL import Image as Pillow

    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_jsonl(folder: Path, items: Iterable[Item]) -> Path:
    """Write pictures and `questions.jsonl` in the format that `load_jsonl` reads; the path of the latter.

    Pictures given as bytes become files; paths are written as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    path = folder / "questions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, item in enumerate(items):
            names = []
            for index, source in enumerate(item.images):
                if isinstance(source, bytes):
                    suffix = f"_{index}" if index else ""
                    name = f"images/{number:05d}{suffix}{_extension(source)}"
                    (folder / name).write_bytes(source)
                else:
                    name = str(source.resolve())
                names.append(name)
            row: dict[str, Any] = {"image": names[0]} if len(names) == 1 else {"images": names}
            row |= {"question": item.question, "answer": list(item.answers)}
            if len(item.answers) == 1:
                row["answer"] = item.answers[0]
            if item.kind != NO_KIND:
                row["kind"] = item.kind
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def _extension(data: bytes) -> str:
    return ".png" if data.startswith(b"\x89PNG") else ".jpg" if data.startswith(b"\xff\xd8") else ".img"
