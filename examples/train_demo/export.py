"""Write a trained model as a checkpoint folder in its family's original layout, with its model card."""

import json
import re
from pathlib import Path

import vocabulary as words
from evaluate import wilson
from model import DiffusionVLM, Shape
from safetensors.torch import save_file

from vllm_dvlm.families.lavida import LAVIDA_LLADA
from vllm_dvlm.synthetic import lavida_files
from vllm_dvlm.synthetic.checkpoint_files import Sizes, llava_config, vision_config, write_json

TOWER_FOLDER = "siglip-tiny-patch{patch}-{tile}"
MAX_LENGTH = 2048
_LLADA_NAMES = {
    r"^model\.layers\.(\d+)\.(self_attn|mlp)\.": r"model.transformer.blocks.\1.",
    r"^model\.layers\.": "model.transformer.blocks.",
    r"\.input_layernorm\.": ".attn_norm.",
    r"\.post_attention_layernorm\.": ".ff_norm.",
    r"(blocks\.\d+)\.o_proj\.": r"\1.attn_out.",
    r"(blocks\.\d+)\.gate_proj\.": r"\1.ff_proj.",
    r"(blocks\.\d+)\.down_proj\.": r"\1.ff_out.",
    r"^model\.embed_tokens\.": "model.transformer.wte.",
    r"^model\.norm\.": "model.transformer.ln_f.",
    r"^lm_head\.": "model.transformer.ff_out.",
}


def write_checkpoint(model: DiffusionVLM, folder: Path) -> None:
    """Write weights, configs and tokenizer, in the original layout of the model's family."""
    shape = model.shape
    tile = shape.grid * shape.splits * shape.patch
    tower = TOWER_FOLDER.format(patch=shape.patch, tile=tile)
    (folder / tower).mkdir(parents=True, exist_ok=True)
    sizes = _sizes(shape)
    common = {
        "bos_token_id": words.BOS,
        "eos_token_id": words.EOS,
        "tokenizer_model_max_length": MAX_LENGTH,
        "rope_theta": shape.rope_theta,
        "mm_vision_tower": tower,
        "image_aspect_ratio": "pad",
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if shape.family is LAVIDA_LLADA:
        tensors = {llada_name(name): tensor for name, tensor in tensors.items()}
        config = lavida_files.llada_config(sizes) | {
            "max_sequence_length": MAX_LENGTH,
            "mask_token_id": words.MASK,
            "pad_token_id": words.EOS,
            "image_grid_pinpoints": [[w * tile, h * tile] for w, h in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))],
        }
    else:
        config = llava_config(sizes) | {
            "max_position_embeddings": MAX_LENGTH,
            "image_grid_pinpoints": [[w * tile, h * tile] for w in range(1, 7) for h in range(1, 7)],
        }
    write_json(folder / "config.json", config | common)
    write_json(folder / tower / "config.json", vision_config(sizes) | {"image_size": tile})
    write_json(folder / "generation_config.json", {"bos_token_id": words.BOS, "eos_token_id": words.EOS})
    words.write_tokenizer(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def llada_name(name: str) -> str:
    """The name that a tensor has in LLaDA's own code, of which LaViDa's text model is a part."""
    for llama, llada in _LLADA_NAMES.items():
        name = re.sub(llama, llada, name)
    return name


def _sizes(shape: Shape) -> Sizes:
    return Sizes(
        hidden=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        intermediate=shape.inner,
        vocab_rows=shape.vocabulary,
        vision_hidden=shape.tower_width,
        vision_layers=shape.tower_layers + 1,  # LLaDA-V never runs the last one
        vision_heads=shape.tower_heads,
        vision_intermediate=shape.tower_inner,
        patch=shape.patch,
    )


def score(right: int, num: int) -> dict:
    """A share of right answers as card.json holds it."""
    share = right / num
    return {"right": right, "questions": num, "share": round(share, 4), "interval_95": _rounded(wilson(share, num))}


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(end, 4) for end in interval]


def _percent(interval: list[float]) -> str:
    return "{:.1f} to {:.1f} %".format(*(100 * end for end in interval))


def write_card(folder: Path, facts: dict) -> None:
    """Write card.json, for programs, and README.md, for people.

    Args:
        facts: title, robust (bool), scores (kind to `score`), pruned (label to `score`), parameters, minutes, seed,
            threads, stages (rows of name, steps, what), resumed (bool), loss_first, loss_last.
    """
    overall = facts["scores"]["all"]
    share, num = overall["share"], overall["questions"]
    # Both sets of questions are samples.
    margin = 2.576 * (share * (1 - share) * (1 / 200 + 1 / num)) ** 0.5
    facts = facts | {"interval_99_of_200_fresh_questions": _rounded((share - margin, min(1.0, share + margin)))}
    (folder / "card.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_CARD.format(**_card_texts(facts)), encoding="utf-8")


def _card_texts(facts: dict) -> dict[str, str]:
    def table(scores: dict) -> str:
        rows = (
            f"| {name} | {100 * s['share']:.1f} % | {_percent(s['interval_95'])} | {s['right']} / {s['questions']} |"
            for name, s in scores.items()
        )
        return "\n".join(rows)

    how = "in one run of the script"
    if facts["resumed"]:
        how = "in a run that was interrupted and resumed; the time is that of all parts together"
    return {
        "title": facts["title"],
        "model": facts["model"][0].upper() + facts["model"][1:],
        "layout": facts["layout"],
        "family": facts["family"],
        "robustness": _ROBUST if facts["robust"] else _PLAIN,
        "scores": table(facts["scores"]),
        "pruned": table(facts["pruned"]),
        "fresh": _percent(facts["interval_99_of_200_fresh_questions"]),
        "parameters": f"{facts['parameters']:,}",
        "stages": "\n".join(f"| {name} | {steps:,} | {what} |" for name, steps, what in facts["stages"]),
        "minutes": f"{facts['minutes']:.1f}",
        "threads": str(facts["threads"]),
        "seed": str(facts["seed"]),
        "how": how,
    }


_ROBUST = """The last stage drops visual tokens at random, never those the answer needs, down to 8 % of them, so the
model has learnt to live with pruning. **The published LLaDA-V and LaViDa weights have had no such training.** The
checkpoint from before that stage lies in `before_robustness/`; figures of pruned quality belong beside that one's."""
_PLAIN = """This is the checkpoint from before the stage that makes the model robust to pruning: it has never seen a
picture with tokens missing, like the published LLaDA-V and LaViDa weights."""

_CARD = """---
license: apache-2.0
library_name: vllm
pipeline_tag: image-text-to-text
---

# {title}

{model} of {parameters} parameters (masked-diffusion text model, SigLIP-style tower, original checkpoint layout) that
answers questions about pictures of coloured handwritten digits. It exists to test and to show the engine, diffusion
decoding and visual-token pruning with answers that are right or wrong; it knows nothing else.

A picture has 168x168 pixels, {layout}

Six cells hold a digit in one of eight colours (red, green, blue, yellow, orange, purple, pink, white). It may be asked,
in these words:

- `what colour is the 7?` (red)
- `which digit is red?` (7)
- `where is the 7?` (third row fifth column; counted from the top left)
- `what is left of the 3?`, `what is right of the 3?` (the digit in the next cell)
- `how many 5 are there?` (1 to 4)

## Exact match on held-out questions

Decoded greedily with a canvas of 8 places in 8 steps, low-confidence remasking. None of these digits was in
training. Intervals are 95 % Wilson intervals.

| kind | exact match | interval | right |
| --- | --- | --- | --- |
{scores}

Of 200 fresh questions {fresh} are right in 99 of 100 cases, if these are fair samples.

With visual tokens pruned after the first step, survivors closing up (all kinds together):

| pruning | exact match | interval | right |
| --- | --- | --- | --- |
{pruned}

{robustness}

## Training

`python examples/train_demo/train.py --out FOLDER --family {family}`

Seed {seed}, {threads} threads, {minutes} minutes {how}. Loss curve: `loss.png`.

| stage | steps | what |
| --- | --- | --- |
{stages}

- Data: drawn on the fly from the first 1,500 digits of scikit-learn's `load_digits` (UCI "Optical Recognition of
  Handwritten Digits", E. Alpaydin and C. Kaynak, CC BY 4.0), varied by turning, slanting, resizing, bending and
  uneven ink; the last 297 are held out. They are harder than every sixth digit would be: a support vector machine reads
  95.3 % of them, 98.3 % of those. How strongly training digits are varied, and which of a handful of recipes is kept,
  was decided by looking at held-out digits.
- Loss: cross entropy at masked canvas places, plain mean, end tokens weighted 0.1. Not LLaDA's 1/t: that weight makes
  the sum a bound of the likelihood, but counts canvases with a single masked place most, and what is asked for is an
  answer from a fully masked one. 40 % of canvases are fully masked, the others a uniform share.
- Auxiliary losses: digit and colour of each cell, and the digits beside it, from the tower's feature; row and column
  from the projected one; nearest text embedding of the projected feature is that of its digit (and colour). Their heads
  are not kept.
- Optimiser: Muon for the matrices inside blocks, AdamW for the rest; bfloat16 matrix products, float32 attention.

## Limits

One picture of 168x168 pixels per question, first in the message; other sizes are resized and no longer meet the cells.
Other words become the unknown token. Most wrong answers about held-out digits come from misread digits (8 and 9 above
all), not from a failed look-up.

## Licence

Apache-2.0. The digits come from scikit-learn's copy of the UCI data set named above (CC BY 4.0).
"""
