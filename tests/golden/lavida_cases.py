"""Typed access to the recorded runs in tests/golden/lavida; fields: see the README there."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vllm_dvlm.synthetic.lavida_files import DREAM, LLADA, Kind

FOLDER = Path(__file__).parent / "lavida"
VARIANTS = ("lavida", "lavida-dream", "redvtp-repaired", "redvtp-as-released")

# Settings of the recorded calls -> names of our request options; the others: `extra_args`.
_OPTION_OF_SETTING = {
    "max_new_tokens": "diffusion_canvas_length",
    "block_length": "diffusion_block_length",
    "steps": "diffusion_max_steps",
    "step_ratio": "diffusion_step_ratio",
    "schedule": "diffusion_schedule",
}
_REMASKING = {"entrophy": "entropy", "topk_margin": "margin", "maskgit_plus": "low_confidence"}
_SAMPLING_SETTINGS = {"temperature", "top_k", "top_p"}  # as vLLM's own parameters
_FIXED_SETTINGS = {"alg_temp": 0.0}  # no option: always this value


@dataclass(frozen=True)
class Case:
    """One recorded file. `raw` is the whole JSON object."""

    name: str
    raw: dict[str, Any] = field(repr=False)

    @property
    def variant(self) -> str:
        """One of VARIANTS."""
        return self.raw["variant"]

    @property
    def records_defect(self) -> bool:
        """True: the released fork never shows the model the image; not meant to be matched."""
        return self.variant == "redvtp-as-released"

    @property
    def kind(self) -> Kind:
        """Which checkpoint it ran on (vllm_dvlm.synthetic.tiny_lavida)."""
        return DREAM if self.variant == "lavida-dream" else LLADA

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the reference's call."""
        return self.raw["settings"]

    @property
    def config_overrides(self) -> dict[str, Any]:
        """config.json keys that differ from the checkpoint's in this run."""
        return self.raw["config_overrides"]

    @property
    def prompt_text(self) -> str:
        """Text after the conversation template, `<image>` where the image stands."""
        return self.raw["prompt_text"]

    @property
    def prompt_ids(self) -> list[int]:
        """Ids before merging, -200 for the image."""
        return self.raw["input_ids"]

    @property
    def prompt_len(self) -> int:
        """Merged length, visual tokens included."""
        return self.raw["prefix_length"]

    @property
    def image_record(self) -> dict[str, Any] | None:
        """File, size, views, visual tokens and span of the image."""
        return self.raw.get("image")

    @property
    def visual_spans(self) -> list[tuple[int, int]]:
        """[first, end) of each image in the merged prompt."""
        return [tuple(self.image_record["visual_span"])] if self.image_record else []

    @property
    def draft_ids(self) -> list[int] | None:
        """Start of the canvas before step 0, mask tokens to be filled; None without a draft."""
        return self.raw.get("draft_ids")

    @property
    def counts(self) -> list[list[int]]:
        """Positions unmasked per step, one list per block; Dream has one block."""
        counts = self.raw["num_transfer_tokens"]
        return [counts] if self.kind is DREAM else counts

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.raw["steps"]

    @property
    def final_ids(self) -> list[int]:
        """The whole canvas after the last step."""
        return self.raw["final_ids"]

    @property
    def first_token(self) -> int | None:
        """Canvas token 0 where it comes from the prompt's last row (Dream with a prefix)."""
        record = self.raw.get("first_token_from_prefill")
        return record and record["token"]

    @property
    def forward_log(self) -> list[tuple[int, int]]:
        """(query rows, cached rows) of each model call that the result depends on.

        RedVTP's code calls the model twice per step; the second call of a step is left out.
        """
        log = [(rows, cached) for rows, cached in self.raw["forward_log"]]
        return log[::2] if "redvtp" in self.variant else log

    @property
    def kept_indices(self) -> list[int] | None:
        """Visual tokens that RedVTP keeps, 0 = the first visual token; None without pruning."""
        record = self.raw.get("importance")
        return record and record["kept"]

    def array(self, key: str) -> np.ndarray | None:
        """float32 array of the case's npz file ("merged_embeds", "importance"), None if it has none."""
        if key not in self.raw.get("arrays", {}).get("keys", {}):
            return None
        with np.load(FOLDER / self.raw["arrays"]["file"]) as arrays:
            return arrays[key]


@functools.cache
def load(name: str) -> Case:
    """The case with this file name (without .json)."""
    return Case(name, json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Every recorded case, by name."""
    index = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
    return tuple(load(entry["name"]) for entry in index["cases"])


def by_variant(*variants: str) -> list[Case]:
    """Cases of these variants. ValueError if a variant names none."""
    found = [case for case in all_cases() if case.variant in variants]
    if missing := set(variants) - {case.variant for case in found}:
        raise ValueError(f"No golden case has variant {', '.join(sorted(missing))}.")
    return found


@dataclass(frozen=True)
class CountsRow:
    """One row of num_transfer_tokens.json: what a schedule unmasks in a block of `masks`."""

    schedule: str | None
    shift: float | None
    masks: int
    steps: int
    counts: list[int]
    depends_on_float32: bool


@functools.cache
def counts_table() -> tuple[CountsRow, ...]:
    """Every row of num_transfer_tokens.json."""
    table = json.loads((FOLDER / "num_transfer_tokens.json").read_text(encoding="utf-8"))
    return tuple(CountsRow(*row) for row in table["rows"])


def extra_args(case: Case) -> dict[str, Any]:
    """Request options that repeat the run. ValueError for a setting without a counterpart."""
    options: dict[str, Any] = {}
    for setting, value in case.settings.items():
        if setting in _SAMPLING_SETTINGS or setting == "top_k_source":
            continue
        if setting in _FIXED_SETTINGS:
            if value != _FIXED_SETTINGS[setting]:
                raise ValueError(f"{case.name}: {setting}={value!r} has no option.")
        elif setting in ("remasking", "alg"):
            options["diffusion_remasking"] = _REMASKING.get(value, value)
        elif setting == "prefix_lm":
            options["diffusion_attention"] = "prefix" if value else "full"
        elif setting == "draft":
            options |= {"diffusion_draft": case.draft_ids} if value else {}
        elif setting == "step_per_block":
            blocks = case.settings["max_new_tokens"] // case.settings["block_length"]
            options |= {"diffusion_max_steps": blocks * value} if value is not None else {}
        elif setting == "schedule_kwargs":
            options |= {"diffusion_schedule_shift": value["shift"]} if value else {}
        elif setting in _OPTION_OF_SETTING:
            options |= {_OPTION_OF_SETTING[setting]: value} if value is not None else {}
        else:
            raise ValueError(f"{case.name}: the setting {setting} has no option.")
    if case.raw.get("keep_ratio") is not None:
        options |= {"prune_method": "redvtp", "prune_keep_ratio": case.raw["keep_ratio"]}
    return options


def sampling_args(case: Case) -> dict[str, Any]:
    """Parameters of vLLM's own with which the run was made; None is off."""
    return {name: value for name, value in case.settings.items() if name in _SAMPLING_SETTINGS}


def image(case: Case) -> Image.Image | None:
    """RGB image of the prompt."""
    if case.image_record is None:
        return None
    with Image.open(FOLDER / case.image_record["file"]) as opened:
        return opened.convert("RGB")
