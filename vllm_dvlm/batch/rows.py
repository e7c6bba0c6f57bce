"""Lines of an input file as requests in OpenAI's batch format.

Two kinds of lines are read: those of `vllm run-batch`, `{"custom_id", "method", "url", "body"}`, which pass unchanged,
and plain ones, `{"id", "image", "question", ...options}`, from which a chat request is made. Light to import.
"""

import base64
import json
import mimetypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

CHAT = "/v1/chat/completions"
MAX_LINE_BYTES = 256 * 2**20
# Options of ours, which travel in `vllm_xargs`.
OWN_PREFIXES = ("diffusion_", "prune_")
_PLAIN = ("id", "image", "images", "question")


class BadRow(ValueError):
    """A line that cannot become a request; the text says why."""


@dataclass(frozen=True)
class Line:
    """A line that is not empty.

    number: from 1, as editors count. name: its id, or "line-NUMBER" where it has none. content: the object; None if it
    is not one, and `problem` says why.
    """

    number: int
    name: str
    content: dict[str, Any] | None
    problem: str = ""


def read(path: Path) -> Iterator[Line]:
    """Lines one by one, so that a file of any size may be read; ValueError for one longer than `MAX_LINE_BYTES`."""
    with path.open("rb") as file:
        number = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(data) > MAX_LINE_BYTES:
                raise ValueError(f"{path.name}, line {number} is longer than {MAX_LINE_BYTES} bytes")
            if data.strip():
                yield _line(number, data)


def _line(number: int, data: bytes) -> Line:
    name = f"line-{number}"
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        return Line(number, name, None, f"no JSON: {error}")
    if not isinstance(content, dict):
        return Line(number, name, None, f"a JSON object is wanted, not {type(content).__name__}")
    given = content.get("custom_id", content.get("id"))
    if given is None:
        return Line(number, name, content)
    if not isinstance(given, (str, int)) or isinstance(given, bool):
        return Line(number, name, None, f"the id must be a text or a number, not {given!r}")
    try:
        str(given).encode()
    except UnicodeEncodeError:
        return Line(number, name, None, f"the id {given!r} holds half a character")
    return Line(number, str(given), content)


def request_of(line: Line, model: str, folder: Path, known_fields: frozenset[str]) -> dict[str, Any]:
    """The request of a line, in OpenAI's batch format; BadRow if there is none.

    Args:
        model: name that the server would have; plain lines carry none.
        folder: relative image paths start here.
        known_fields: fields of a chat request that a plain line may set.
    """
    if line.content is None:
        raise BadRow(line.problem)
    if "body" in line.content or "url" in line.content:
        return line.content | {"custom_id": line.name}
    body = _body(line.content, folder, known_fields)
    return {"custom_id": line.name, "method": "POST", "url": CHAT, "body": {"model": model} | body}


def _body(row: dict[str, Any], folder: Path, known_fields: frozenset[str]) -> dict[str, Any]:
    question = row.get("question")
    if not isinstance(question, str) or not question:
        raise BadRow('"question" must be a text (or the line one of OpenAI\'s batch format, with "url" and "body")')
    images = row.get("images", row.get("image", []))
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise BadRow('"image" must be a path or URL, or a list of them')
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _url(name, folder)}} for name in images]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]}
    own: dict[str, Any] = {}
    for key, value in row.items():
        if key in _PLAIN:
            continue
        if key.startswith(OWN_PREFIXES):
            own[key] = value
        elif key in known_fields and key != "messages":
            body[key] = value
        else:
            raise BadRow(f"{key!r} is no option of a request; remove it")
    if not isinstance(body.get("vllm_xargs") or {}, dict):
        raise BadRow('"vllm_xargs" must be an object')
    if own:
        body["vllm_xargs"] = (body.get("vllm_xargs") or {}) | own
    return body


def _url(image: str, folder: Path) -> str:
    """A data or web URL as it is; the file of a path or `file:` URL as a data URL."""
    try:
        scheme = urlsplit(image).scheme
        if scheme in ("data", "http", "https"):
            return image
        path = Path(unquote(urlsplit(image).path)) if scheme == "file" else folder / image
        data = path.read_bytes()
    except OSError as error:
        raise BadRow(f"the image {image} cannot be read: {error.strerror}") from None
    except ValueError as error:  # no address, or no name of a file
        raise BadRow(f"the image {image!r} cannot be read: {error}") from None
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def error_line(name: str, message: str, code: int = 400) -> str:
    """The output line of a row that never reached an engine, or that none could answer."""
    error = {"message": message, "type": "BadRequestError" if code < 500 else "InternalServerError", "code": code}
    return json.dumps(
        {"id": None, "custom_id": name, "response": {"status_code": code, "body": None}, "error": {"error": error}}
    )
