"""A traced request as a moving picture: patches dim in the step that prunes, the canvas fills up cell by cell."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vllm_dvlm.tools.show import canvas_history, token_maps

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, PICTURE, MARGIN, CELL_H, FONT = 860, 300, 12, 20, 12
FRAME_MS, LAST_MS = 160, 2000
BACKGROUND, INK, MASKED, VEIL = (255, 255, 255), (30, 30, 30), (226, 229, 233), (120, 128, 145)


def write(
    trace: dict[str, Any], image_files: Sequence[Path], texts: dict[int, str], out: Path, max_steps: int = 32
) -> None:
    """Write a GIF or WebP, a frame per step (thinned out to `max_steps`) behind one of the empty canvas."""
    step_of, confidence = canvas_history(trace)
    token_at = {p: i for step in trace["steps"] for p, i in zip(step["pos"], step["ids"], strict=True)}
    num = len(trace["steps"])
    shown = sorted({-1, *np.linspace(0, num - 1, min(num, max_steps)).round().astype(int).tolist()})
    pictures = _pictures(trace, image_files)
    labels = [texts.get(token_at.get(position, -1), "") for position in range(len(step_of))]
    frames = [_frame(trace, pictures, labels, step_of, confidence, step) for step in shown]
    height = max(frame.height for frame in frames)
    frames = [_on(frame, height) for frame in frames]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _on(frame: Image.Image, height: int) -> Image.Image:
    whole = Image.new("RGB", (WIDTH, height), BACKGROUND)
    whole.paste(frame, (0, 0))
    return whole


def _pictures(trace: dict[str, Any], files: Sequence[Path]) -> list[tuple[Image.Image, Image.Image]]:
    """Each picture as it is and with the dropped patches under a veil."""
    pruning, offset, found = trace["pruning"], 0, []
    images = [image for image in trace["images"] if image is not None]
    for number, (image, (first, end)) in enumerate(zip(images, trace["visual_spans"], strict=False)):
        if number >= len(files):
            break
        picture = Image.open(files[number]).convert("RGB")
        picture.thumbnail((PICTURE, PICTURE))
        kept = np.ones(end - first, dtype=bool)
        if pruning is not None:
            local = np.asarray(pruning["kept_local_indices"]) - offset
            kept[:] = False
            kept[local[(local >= 0) & (local < end - first)]] = True
        visible = np.zeros((picture.height, picture.width), dtype=bool)
        for part in token_maps(image, kept):
            if part is not None:
                scaled = Image.fromarray(part.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
                visible |= np.asarray(scaled) > 0
        pixels = np.asarray(picture)
        veiled = (0.2 * pixels + 0.8 * np.array(VEIL)).astype(np.uint8)
        found.append((picture, Image.fromarray(np.where(visible[..., None], pixels, veiled))))
        offset += end - first
    return found


def _frame(
    trace: dict[str, Any],
    pictures: list[tuple[Image.Image, Image.Image]],
    labels: list[str],
    step_of: np.ndarray,
    confidence: np.ndarray,
    step: int,
) -> Image.Image:
    """What stands after a step, counted from 0; -1: before the first."""
    font, small = ImageFont.load_default(FONT + 2), ImageFont.load_default(FONT)
    frame = Image.new("RGB", (WIDTH, 4000), BACKGROUND)
    canvas = ImageDraw.Draw(frame)
    pruning = trace["pruning"]
    masked = int(((step_of < 0) | (step_of > step)).sum())
    title = f"step {step + 1} of {len(trace['steps'])}, {masked} of {len(step_of)} masked"
    if pruning is not None and step >= 0:
        blocks = f"KV blocks {pruning['kv_blocks_before']} to {pruning['kv_blocks_after']}"
        title += f"; {pruning['keep_count']} of {pruning['num_visual']} visual tokens kept, {blocks}"
    canvas.text((MARGIN, MARGIN), title, INK, font)
    y = top = MARGIN + CELL_H + MARGIN
    for whole, pruned in pictures:
        frame.paste(pruned if step >= 0 else whole, (MARGIN, y))
        y += whole.height + MARGIN
    left = MARGIN + (PICTURE + MARGIN if pictures else 0)
    x, row = left, top
    for position, label in enumerate(labels):
        is_written = 0 <= step_of[position] <= step
        text = label if is_written else "·"
        width = int(canvas.textlength(text, small)) + 10
        if x + width > WIDTH - MARGIN and x > left:
            x, row = left, row + CELL_H + 4
        canvas.rounded_rectangle((x, row, x + width, row + CELL_H), 4, _colour(confidence[position], is_written))
        canvas.text((x + 5, row + 3), text, INK, small)
        x += width + 4
    return frame.crop((0, 0, WIDTH, max(y, row + CELL_H + MARGIN)))


def _colour(confidence: float, is_written: bool) -> tuple[int, int, int]:
    """From red, unsure, to green, sure; grey where nothing is written."""
    if not is_written:
        return MASKED
    hue = 0.36 * (0.0 if np.isnan(confidence) else float(confidence))
    red, green, blue = colorsys.hls_to_rgb(hue, 0.77, 0.65)
    return round(255 * red), round(255 * green), round(255 * blue)
