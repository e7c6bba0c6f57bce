"""``vllm-dvlm show TRACE``: a picture of one traced request.

Left: each image with the dropped patches dimmed and a heat map of the importance; right: the canvas filling up step by
step. Reads only the trace (and the ``.npz`` beside it), the images and, for readable tokens, a tokenizer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

# Formats that show one step after another.
MOVING = (".gif", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("trace", type=Path, help="a trace file, <request id>.json")
    parser.add_argument("--image", type=Path, action="append", default=[], help="image file, one per image, in order")
    parser.add_argument("--model", help="checkpoint folder, to show token texts instead of ids")
    parser.add_argument("--out", type=Path, help="PNG, or moving .gif or .webp (default: the trace's name with .png)")
    parser.add_argument("--max-steps", type=int, default=32, help="canvas rows to draw; more steps are thinned out")


def run(args: argparse.Namespace) -> int:
    """Write the picture; prints its path."""
    trace = json.loads(args.trace.read_text())
    archive = args.trace.with_suffix(".npz")
    importance = np.load(archive)["importance"] if archive.exists() else None
    texts = _texts(trace, args.model)
    out = args.out or args.trace.with_suffix(".png")
    if out.suffix in MOVING:
        from vllm_dvlm.tools.show_animation import write

        _check_images(trace, args.image)
        write(trace, args.image, texts, out, args.max_steps)
        print(out)
        return 0
    draw(trace, importance, args.image, texts, out, args.max_steps)
    print(out)
    return 0


def _check_images(trace: dict[str, Any], image_files: list[Path]) -> list[dict[str, Any]]:
    """The images that the trace describes; ValueError with the remedy if the files do not match them."""
    images = [image for image in trace["images"] if image is not None]
    if image_files and len(image_files) != len(images):
        raise ValueError(f"the trace has {len(images)} image(s), --image names {len(image_files)}; name each once")
    return images


def token_maps(image: dict[str, Any], values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Split the values of one image's visual tokens into maps of places.

    Args:
        image: entry of the trace's ``images``.
        values: [N] one value per visual token, newline tokens included.

    Returns:
        (overview [rows, columns], grid [rows, columns] or None); newline tokens are left out.
    """
    rows, columns = image["overview"]
    overview = values[: rows * columns].reshape(rows, columns)
    if image["grid"] is None:
        return overview, None
    grid_rows, grid_columns = image["grid"]
    newlines = image.get("newlines", True)  # traces of the first release do not say
    grid = values[rows * columns :].reshape(grid_rows, grid_columns + newlines)[:, :grid_columns]
    return overview, grid


def canvas_history(trace: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """When and how surely each canvas position was unmasked.

    Returns:
        (step per position [C] int, -1 if never; confidence per position [C] float, nan if never).
    """
    length = trace["options"]["diffusion_canvas_length"]
    step_of = np.full(length, -1)
    confidence = np.full(length, np.nan)
    for number, step in enumerate(trace["steps"]):
        for position, value in zip(step["pos"], step["conf"], strict=True):
            step_of[position] = number
            confidence[position] = value
    return step_of, confidence


def _texts(trace: dict[str, Any], model: str | None) -> dict[int, str]:
    ids = {i for step in trace["steps"] for i in step["ids"]}
    if model is None:
        return {i: str(i) for i in ids}
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    return {i: tokenizer.decode([i]).strip() or "␣" for i in ids}


def draw(
    trace: dict[str, Any],
    importance: np.ndarray | None,
    image_files: list[Path],
    texts: dict[int, str],
    out: Path,
    max_steps: int = 32,
) -> None:
    """Draw the picture. ValueError with the remedy if images and trace do not match."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    images = _check_images(trace, image_files)
    pruning = trace["pruning"]
    num_rows = max(1, len(images))
    figure = plt.figure(figsize=(15, 1 + 4.2 * num_rows), layout="constrained")
    grid = figure.add_gridspec(num_rows, 3, width_ratios=(1, 1.15, 1.8))
    offset = 0
    for i, (image, (first, end)) in enumerate(zip(images, trace["visual_spans"], strict=False)):
        num = end - first
        kept = np.ones(num, dtype=bool)
        if pruning is not None:
            local = np.asarray(pruning["kept_local_indices"]) - offset
            kept[:] = False
            kept[local[(local >= 0) & (local < num)]] = True
        picture = _load(image_files[i]) if image_files else None
        _draw_kept(figure.add_subplot(grid[i, 0]), picture, image, kept)
        heat = figure.add_subplot(grid[i, 1])
        if importance is not None:
            _draw_heat(figure, heat, image, importance[offset : offset + num])
        else:
            heat.axis("off")
        offset += num
    _draw_canvas(figure.add_subplot(grid[:, 2]), trace, texts, max_steps)
    figure.suptitle(_title(trace))
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _title(trace: dict[str, Any]) -> str:
    text = f"{trace['request_id']}: {trace['num_forward_passes']} denoising steps"
    pruning = trace["pruning"]
    if pruning is None:
        return text + ", nothing pruned"
    return (
        f"{text}, {pruning['method']} kept {pruning['keep_count']} of {pruning['num_visual']} visual tokens, "
        f"KV blocks {pruning['kv_blocks_before']} → {pruning['kv_blocks_after']}"
    )


def _load(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def _draw_kept(axes: Any, picture: np.ndarray | None, image: dict[str, Any], kept: np.ndarray) -> None:
    """The image, dropped patches dimmed. Several tokens show a place (overview and grid): one kept is enough."""
    from PIL import Image

    width, height = image["size"]
    if picture is None:
        picture = np.full((height, width, 3), 200, dtype=np.uint8)
    shape = picture.shape[1], picture.shape[0]
    shown = np.zeros(picture.shape[:2], dtype=bool)
    for part in token_maps(image, kept):
        if part is not None:
            scaled = Image.fromarray(part.astype(np.uint8) * 255).resize(shape, Image.Resampling.NEAREST)
            shown |= np.asarray(scaled) > 0
    axes.imshow(np.where(shown[..., None], picture, 225 + picture // 10))
    axes.set_title(f"{int(kept.sum())} of {len(kept)} visual tokens kept")
    axes.axis("off")


def _draw_heat(figure: Any, axes: Any, image: dict[str, Any], importance: np.ndarray) -> None:
    """Importance of the finest map there is, on a logarithmic scale: it spans orders of magnitude."""
    overview, grid = token_maps(image, importance)
    values = np.log10(np.maximum(overview if grid is None else grid, 1e-12))
    width, height = image["size"]
    handle = axes.imshow(values, extent=(0, width, height, 0), aspect="equal", cmap="magma")
    axes.set_title("importance (log10)")
    axes.axis("off")
    figure.colorbar(handle, ax=axes, fraction=0.046)


def _draw_canvas(axes: Any, trace: dict[str, Any], texts: dict[int, str], max_steps: int) -> None:
    """One row per step: what stood where, new tokens in the colour of their confidence."""
    step_of, confidence = canvas_history(trace)
    token_at = {p: i for step in trace["steps"] for p, i in zip(step["pos"], step["ids"], strict=True)}
    num_steps = len(trace["steps"])
    drawn = np.unique(np.linspace(0, num_steps - 1, min(num_steps, max_steps)).round().astype(int))
    rows = np.full((len(drawn), len(step_of)), np.nan)
    for row, step in enumerate(drawn):
        done = (step_of >= 0) & (step_of <= step)
        rows[row, done] = confidence[done]
    handle = axes.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.figure.colorbar(handle, ax=axes, label="confidence", fraction=0.03)
    size = max(4, min(8, 320 // max(1, len(step_of))))
    for row, step in enumerate(drawn):
        for position in np.flatnonzero(step_of == step):
            text = texts.get(token_at[position], "")[:8].replace("$", r"\$")
            axes.text(position, row, text, ha="center", va="center", fontsize=size, color="white", rotation=90)
    axes.set_yticks(range(len(drawn)), [str(step + 1) for step in drawn], fontsize=7)
    axes.set_xlabel("canvas position")
    axes.set_ylabel("denoising step")
    axes.set_title("the canvas filling up")
