"""Typed access to the recorded runs in tests/golden/llada_v; fields: see the README there."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent / "llada_v"
IMAGE_FOLDER = FOLDER / "images"

# Settings of the recorded runs -> names of our request options.
_OPTION_OF_SETTING = {
    "gen_length": "diffusion_canvas_length",
    "steps": "diffusion_max_steps",
    "block_length": "diffusion_block_length",
    "cfg_scale": "diffusion_cfg_scale",
    "generation_suffix": "diffusion_suffix",
    "prefix_refresh_interval": "diffusion_refresh_interval",
    "threshold": "diffusion_threshold",
}
_SERVER_SETTINGS = {"image_aspect_ratio"}  # not a request option


@dataclass(frozen=True)
class Case:
    """One recorded file. `raw` is the whole JSON object."""

    name: str
    raw: dict[str, Any] = field(repr=False)

    @property
    def mode(self) -> str:
        """plain, redvtp, fast_dllm or preprocess."""
        return self.raw["mode"]

    @property
    def settings(self) -> dict[str, Any]:
        return self.raw["settings"]

    @property
    def build_args(self) -> dict[str, int]:
        """Arguments of vllm_dvlm.synthetic.tiny_checkpoint.checkpoint."""
        return self.raw["checkpoint"]["build_args"]

    @property
    def is_informative(self) -> bool:
        """True: records a defect of the original; not meant to be matched."""
        return self.raw.get("informative", False)

    @property
    def image_aspect_ratio(self) -> str:
        given = self.raw if self.mode == "preprocess" else self.settings
        return given.get("image_aspect_ratio", "anyres_max_4")

    @property
    def uses_guidance(self) -> bool:
        return bool(self.mode != "preprocess" and self.settings.get("cfg_scale"))

    @property
    def image_records(self) -> list[dict[str, Any]]:
        return [self.raw["image"]] if self.mode == "preprocess" else self.raw.get("images", [])

    @property
    def visual_spans(self) -> list[tuple[int, int]]:
        """[first, end) of each image in the merged prompt."""
        return [(record["span"][0], record["span"][1]) for record in self.image_records]

    @property
    def prompt_ids(self) -> list[int]:
        """Ids before merging, -200 per image."""
        return self.raw["prompt_ids"]

    @property
    def prompt_len(self) -> int:
        """Merged length, visual tokens included."""
        return self.raw["prompt_len"]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.raw["steps"]

    @property
    def final_ids(self) -> list[int]:
        return self.raw["final_ids"]

    @property
    def stopped_at(self) -> int | None:
        return self.raw["stopped_at"]

    @property
    def pruning(self) -> dict[str, Any] | None:
        return self.raw.get("pruning")

    @functools.cached_property
    def importance(self) -> np.ndarray:
        """[visual tokens] float32; RedVTP cases only."""
        with np.load(FOLDER / f"{self.name}.npz") as arrays:
            return arrays["importance"]


@functools.cache
def load(name: str) -> Case:
    """The case with this file name (without .json)."""
    return Case(name, json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Every recorded case, by name."""
    return tuple(load(path.stem) for path in sorted(FOLDER.glob("*.json")))


def by_prefix(letters: str) -> list[Case]:
    """Cases whose name begins with one of `letters`, e.g. "abcde".

    Raises ValueError if a letter names none.
    """
    found = [case for case in all_cases() if case.name[0] in letters]
    if missing := set(letters) - {case.name[0] for case in found}:
        raise ValueError(f"No golden case begins with {', '.join(sorted(missing))}.")
    return found


def by_mode(*modes: str) -> list[Case]:
    """Cases of these modes. ValueError if a mode names none."""
    found = [case for case in all_cases() if case.mode in modes]
    if missing := set(modes) - {case.mode for case in found}:
        raise ValueError(f"No golden case has mode {', '.join(sorted(missing))}.")
    return found


def extra_args(case: Case) -> dict[str, Any]:
    """Request options that repeat the run. ValueError for a setting without a counterpart."""
    options: dict[str, Any] = {}
    for setting, value in case.settings.items():
        if setting in _OPTION_OF_SETTING:
            if value is not None:
                options[_OPTION_OF_SETTING[setting]] = value
        elif setting == "keep_ratio":
            options |= {"prune_method": "redvtp", "prune_keep_ratio": value}
        elif setting not in _SERVER_SETTINGS:
            raise ValueError(f"{case.name}: the setting {setting} has no option.")
    return options


def prompt_text(case: Case) -> str:
    """Text after the conversation template, `<image>` where an image stands."""
    return case.raw["prompt_text"]


def question(case: Case) -> str:
    """What the user wrote."""
    return case.raw["question"]


def images(case: Case) -> list[Image.Image]:
    """RGB images of the prompt, in order."""
    opened = []
    for record in case.image_records:
        with Image.open(IMAGE_FOLDER / record["file"]) as image:
            opened.append(image.convert("RGB"))
    return opened
