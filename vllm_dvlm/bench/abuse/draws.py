"""Random prompts, pictures and options that a request may have; R1 adds those that it may not have.

Everything is drawn from the generator that is passed in.
"""

import base64
import io
import random
from typing import TYPE_CHECKING, Any

from vllm_dvlm.synthetic.checkpoint_files import MASK

if TYPE_CHECKING:
    from PIL.Image import Image

Options = dict[str, Any]

_WORDS = """what is in this picture how many cats are there the red house describe it briefly a long story about
water fire stone left right top bottom which color shape one two three near far old new""".split()  # noqa: SIM905
# Modes of Pillow with the formats that can hold them.
_KINDS = (
    ("RGB", ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")),
    ("RGBA", ("PNG", "WEBP", "TIFF")),
    ("L", ("PNG", "JPEG", "BMP", "GIF", "TIFF")),
    ("LA", ("PNG",)),
    ("P", ("PNG", "GIF", "BMP")),
    ("1", ("PNG", "BMP", "TIFF")),
    ("I;16", ("PNG", "TIFF")),
    ("CMYK", ("JPEG", "TIFF")),
    ("F", ("TIFF",)),
)
_SIZES = ((1, 1), (2, 300), (300, 2), (17, 23), (96, 64), (384, 384), (400, 200), (120, 500), (640, 480))
MIME = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tiff"}


def words(rng: random.Random, num: int) -> str:
    """Text of so many words of the checkpoint's tokenizer."""
    return " ".join(rng.choices(_WORDS, k=num))


def picture(rng: random.Random, size: tuple[int, int] | None = None, mode: str = "RGB") -> "Image":
    """Blocks of random colour."""
    from PIL import Image

    size = size or rng.choice(_SIZES)
    small = Image.frombytes("RGB", (6, 6), rng.randbytes(108)).resize(size, Image.Resampling.NEAREST)
    if mode == "I;16":
        return small.convert("I").point(lambda value: value * 200).convert("I;16")
    return small.convert("L").convert(mode) if mode in ("LA", "F") else small.convert(mode)


def picture_file(rng: random.Random) -> tuple[bytes, str]:
    """A picture of any mode, size and format, and its MIME type."""
    mode, formats = rng.choice(_KINDS)
    name = rng.choice(formats)
    out = io.BytesIO()
    more: dict[str, Any] = {}
    if name == "GIF" and rng.random() < 0.5:
        more = {"save_all": True, "append_images": [picture(rng, (30, 20)) for _ in range(2)]}
    if name == "JPEG" and rng.random() < 0.3:
        from PIL.Image import Exif

        exif = Exif()
        exif[0x0112] = rng.randint(0, 9)  # orientation; 0 and 9 do not exist
        more = {"exif": exif}
    picture(rng, mode=mode).save(out, name, **more)
    return out.getvalue(), f"image/{MIME[name]}"


def data_url(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def options(rng: random.Random, has_image: bool, longest: int, exact: bool = False) -> Options:
    """Valid options of a request in any combination.

    longest: canvas at most. exact: without cache; thresholds and pruning are part of it.
    """
    canvas = rng.randint(1, longest)
    block = rng.choice([b for b in range(1, canvas + 1) if canvas % b == 0])
    num_blocks = canvas // block
    found: Options = {
        "diffusion_canvas_length": canvas,
        "diffusion_block_length": block,
        "diffusion_max_steps": num_blocks * rng.randint(1, block + 1),
        "diffusion_remasking": rng.choice(["low_confidence", "low_confidence", "random", "entropy", "margin"]),
    }
    if rng.random() < 0.2:
        found["diffusion_threshold"] = rng.choice([0.5, 1, 1.0, 2.5])
    if rng.random() < 0.2:
        found["diffusion_suffix"] = rng.choice([" The end.", "\n", " ."])
    if rng.random() < 0.2:
        found["diffusion_draft"] = draft(rng, canvas)
    if not exact and rng.random() < 0.4:
        found["diffusion_refresh_interval"] = rng.choice([1, 2, 3, 8, 32])
    if rng.random() < (0.6 if has_image else 0.1):
        found["prune_method"] = rng.choice(["redvtp", "redvtp", "fastv", "fastv", "random", "uniform", "diversity"])
        found["prune_keep_ratio"] = rng.choice([0.05, 0.25, 0.5, 0.75, 1])
        found["prune_positions"] = rng.choice(["renumber", "keep"])
        if found["prune_method"] == "fastv":
            found["prune_layer"] = rng.randint(1, 3)
        if found["prune_method"] == "redvtp" and rng.random() < 0.3:
            found["prune_rows"] = rng.choice(["masked", "committed", "response_prompt", "all"])
    names = [name for name in found if rng.random() < 0.9 or name == "diffusion_canvas_length"]
    kept = {name: found[name] for name in names}
    if "prune_method" not in kept:
        return {name: value for name, value in kept.items() if not name.startswith("prune_")}
    return kept


def draft(rng: random.Random, canvas: int) -> list[int]:
    """Token ids for the start of a canvas, half of them to be filled, one at least."""
    ids = [rng.choice([MASK, rng.randint(260, 900)]) for _ in range(rng.randint(1, canvas))]
    ids[rng.randrange(len(ids))] = MASK
    return ids


def sampling(rng: random.Random) -> dict[str, Any]:
    """Valid parameters of vLLM's own; always seeded, since an unseeded request draws other noise in every run."""
    found: dict[str, Any] = {"temperature": 0, "seed": rng.randrange(2**31)}
    if rng.random() < 0.3:
        found["temperature"] = rng.choice([0.3, 0.8, 1.5])
    if rng.random() < 0.3:
        found["ignore_eos"] = True
    if rng.random() < 0.3:
        found["stop_token_ids"] = sorted(rng.sample(range(260, 900), rng.choice([1, 3, 60])))
    if rng.random() < 0.15:
        found["stop"] = rng.choice(["e", " the", [" a", "qq"]])
    return found
