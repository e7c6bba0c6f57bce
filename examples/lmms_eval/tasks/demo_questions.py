"""Images of the task `demo_questions`; lmms-eval imports this by the name in the YAML file."""

from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path("questions")


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture of a question, from a path relative to the folder of questions."""
    return [Image.open(FOLDER / doc["image"]).convert("RGB")]
