"""Exact match on held-out questions, decoded in PyTorch as the engine does, with and without pruning.

B = questions, C = canvas length, N = visual tokens (newline token included), T = sequence length.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import vocabulary as words
from losses import pixels
from model import DiffusionVLM

from vllm_dvlm.synthetic import digit_questions as questions

CANVAS = 8
_CHUNK = 50  # questions per forward pass


@dataclass(frozen=True)
class Pruning:
    """`method` is redvtp or random; prunes after the first step, survivors close up."""

    method: str
    keep_ratio: float


@torch.inference_mode()
def answers(
    model: DiffusionVLM, asked: list[questions.Question], pruning: Pruning | None = None, steps: int = CANVAS
) -> list[str]:
    """The model's answers, in order: low-confidence remasking, greedy, `steps` steps for a canvas of `CANVAS`."""
    by_length = defaultdict(list)
    for i, question in enumerate(asked):
        by_length[len(words.encode(question.question))].append(i)
    found = [""] * len(asked)
    for group in by_length.values():
        for start in range(0, len(group), _CHUNK):
            part = group[start : start + _CHUNK]
            for i, ids in zip(part, _decode(model, [asked[i] for i in part], pruning, steps).tolist(), strict=True):
                ids = ids[: ids.index(words.EOT)] if words.EOT in ids else ids
                found[i] = words.decode(ids)
    return found


def exact_match(model: DiffusionVLM, asked: list[questions.Question], **how) -> dict[str, float]:
    """Share of right answers by kind, and "all"."""
    right = defaultdict(list)
    for question, answer in zip(asked, answers(model, asked, **how), strict=True):
        for name in (question.kind, "all"):
            right[name].append(answer == question.answer)
    return {name: sum(values) / len(values) for name, values in right.items()}


def wilson(share: float, num: int) -> tuple[float, float]:
    """95 % interval of a share that was measured on `num` questions."""
    z = 1.959964
    centre = share + z * z / (2 * num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return (centre - half) / (1 + z * z / num), (centre + half) / (1 + z * z / num)


def visual_tokens(model: DiffusionVLM, asked: list[questions.Question]) -> torch.Tensor:
    """[B, N, D], newline token last."""
    side = model.shape.grid
    images = torch.stack([torch.from_numpy(question.image) for question in asked])
    cells = images.unflatten(1, (side, -1)).unflatten(3, (side, -1)).transpose(2, 3).flatten(1, 2)
    places = torch.arange(side * side).expand(len(asked), -1)
    _, visual = model.see(pixels(cells), places)
    return torch.cat([visual, model.model.image_newline.expand(len(asked), 1, -1)], dim=1)


def _decode(model: DiffusionVLM, asked: list[questions.Question], pruning: Pruning | None, steps: int) -> torch.Tensor:
    """Canvases [B, C] of questions with the same number of tokens."""
    num, embed, family = len(asked), model.model.embed_tokens, model.shape.family
    visual, kept = visual_tokens(model, asked), None
    head = embed(torch.tensor(words.before_image())).expand(num, -1, -1)
    texts = torch.tensor([(*words.encode(question.question), *words.after_question()) for question in asked])
    is_canvas = F.pad(torch.zeros(texts.shape, dtype=torch.bool), (0, CANVAS), value=True)
    forbidden = [words.IDS[text] for text in family.tokens.forbidden]
    canvas = torch.full((num, CANVAS), words.MASK)
    limit = torch.full((num, 1), CANVAS)  # first end token, where it bounds the canvas
    place = torch.arange(CANVAS)
    for step in range(steps):
        prunes = pruning is not None and step == 0
        for layer in model.model.layers:
            layer.self_attn.probe_rows = CANVAS if prunes else 0
        tail = embed(torch.cat([texts, canvas], dim=1))
        logits = model.logits(model.last_hidden(head, visual, tail, is_canvas, kept)[:, -CANVAS:])
        logits[..., forbidden] = -torch.inf
        confidence, tokens = logits.double().softmax(-1).max(-1)
        confidence[(canvas != words.MASK) | (place >= limit)] = -1
        best = confidence.topk(CANVAS // steps, dim=1)
        chosen = torch.zeros_like(canvas, dtype=torch.bool).scatter_(1, best.indices, best.values >= 0)
        if not chosen.any():
            break
        canvas = torch.where(chosen, tokens, canvas)
        if family.stops_bound_canvas:
            limit = torch.where(canvas == words.EOT, place, CANVAS).amin(1, keepdim=True)
        if prunes:
            kept = _kept(model, visual, canvas == words.MASK, head.shape[1], pruning)
    return canvas


def _kept(
    model: DiffusionVLM, visual: torch.Tensor, is_masked: torch.Tensor, start: int, pruning: Pruning
) -> torch.Tensor:
    """Indices of the visual tokens that stay, [B, kept]; `is_masked` [B, C] after the first step's commit."""
    num_visual = visual.shape[1]
    if pruning.method == "random":
        importance = torch.rand(visual.shape[:2], generator=torch.Generator().manual_seed(0))
    else:
        attention = torch.stack([layer.self_attn.probe for layer in model.model.layers]).mean((0, 2))  # [B, C, T]
        rows = is_masked[..., None].float()
        importance = (attention[..., start : start + num_visual] * rows).sum(1) / rows.sum(1)
    num_kept = max(1, int(num_visual * pruning.keep_ratio))
    return importance.topk(num_kept, dim=1).indices.sort(dim=1).values
