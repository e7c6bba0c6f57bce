"""Forward pass and losses of one batch.

B = samples, N = cells, K = digits per picture, L = ids after the picture, D = text width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import vocabulary as words
from data import NONE, Batch
from model import DiffusionVLM
from torch import nn

from vllm_dvlm.synthetic.digit_questions import COLOURS

# Most canvas places hold the end token, which is learnt at once.
_END_WEIGHT = 0.1
_DIGIT_IDS = torch.tensor([words.IDS[str(digit)] for digit in range(10)])
_COLOUR_IDS = torch.tensor([words.IDS[colour] for colour in COLOURS])


class Probes(nn.Module):
    """Linear readers for the auxiliary losses; thrown away after training."""

    def __init__(self, tower_width: int, width: int, grid: int):
        super().__init__()
        self.digit, self.colour = nn.Linear(tower_width, 10), nn.Linear(tower_width, len(COLOURS))
        self.left, self.right = nn.Linear(tower_width, NONE + 1), nn.Linear(tower_width, NONE + 1)
        self.row, self.column = nn.Linear(width, grid), nn.Linear(width, grid)


@dataclass(frozen=True)
class Thinning:
    """Visual tokens dropped in training, so that the model learns to answer after pruning.

    Attributes:
        share: of steps that drop any.
        least: smallest share kept; the share kept is uniform in [least, 1].
        gaps: share of the thinned steps in which survivors keep their rotary positions instead of closing up.
    """

    share: float
    least: float = 0.08
    gaps: float = 0.25


def pixels(cells: torch.Tensor) -> torch.Tensor:
    """uint8 to the values of LLaDA-V's image processor, [-1, 1]."""
    return cells.float() / 127.5 - 1


def tower_losses(
    model: DiffusionVLM, probes: Probes, batch: Batch, through_tower: bool = True
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Visual tokens [B, N, D], the sum of the auxiliary losses, and each of them for the log.

    Tower: digit and colour of a cell can be read off its feature, and the digits beside it. Projector: so can row and
    column, because after pruning nothing else tells where a token was; and of all digit (colour) words, the embedding
    of the right one is nearest, without which the text model takes long to find out what the features mean.

    through_tower: gradients reach the tower; False: the projector alone.
    """
    features, visual = model.see(pixels(batch.cells), batch.places, through_tower)
    visual = visual.float()
    at = torch.arange(len(batch.objects))[:, None]
    seen, shown = features.float()[at, batch.objects], visual[at, batch.objects]
    place, grid = batch.places[at, batch.objects], model.shape.grid
    table = model.model.embed_tokens.weight
    parts = {
        "digit": _mean(probes.digit(seen), batch.digits, smoothing=0.1),
        "colour": _mean(probes.colour(seen), batch.colours),
        "left": _mean(probes.left(seen), batch.neighbours[..., 0]),
        "right": _mean(probes.right(seen), batch.neighbours[..., 1]),
        "row": _mean(probes.row(shown), place // grid),
        "column": _mean(probes.column(shown), place % grid),
        "digit word": _mean(_cosines(shown, table[_DIGIT_IDS]), batch.digits),
        "colour word": _mean(_cosines(shown, table[_COLOUR_IDS]), batch.colours),
        # As long as embeddings are: else the text model's layers hardly change them.
        "length": (visual.square().mean(-1).sqrt() - 1).square().mean(),
    }
    return visual, sum(parts.values()), parts


def _cosines(features: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Cosine of each feature [B, K, D] and each embedding [W, D], sharpened; dot products could grow by length."""
    return 16 * F.normalize(features, dim=-1) @ F.normalize(embeddings, dim=-1).T


def _mean(logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), label_smoothing=smoothing)


def thin(num: int, batch: Batch, thinning: Thinning, generator: torch.Generator) -> tuple[torch.Tensor | None, bool]:
    """Choose which of `num` visual tokens are kept: at random, but always those the answer needs.

    Returns:
        (kept indices [B, kept], ascending, or None: all; True if survivors keep their rotary positions).
    """
    draw = torch.rand(3, generator=generator).tolist()
    if draw[0] >= thinning.share:
        return None, False
    kept = max(8, int(num * (thinning.least + draw[1] * (1 - thinning.least))))
    if kept >= num:
        return None, False
    keys = torch.rand((len(batch.tail), num), generator=generator)
    keys.scatter_add_(1, batch.objects, 2.0 * batch.relevant)
    return keys.topk(kept, dim=1).indices.sort(dim=1).values, draw[2] < thinning.gaps


def answer_loss(
    model: DiffusionVLM,
    visual: torch.Tensor,
    batch: Batch,
    thinning: Thinning | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Cross entropy at the masked canvas places.

    Plain mean over masked places, not LLaDA's 1/t: that weight makes the sum a likelihood bound, but gives the most
    weight to canvases with one masked place, and what we ask for is an answer from a fully masked one.
    """
    num = len(batch.tail)
    visual = torch.cat([visual, model.model.image_newline.expand(num, 1, -1)], dim=1)
    kept, has_gaps = None, False
    if thinning is not None:
        kept, has_gaps = thin(visual.shape[1], batch, thinning, generator)
    head = torch.tensor(words.before_image()).expand(num, -1)
    tail = torch.where(batch.is_masked, words.MASK, batch.tail)
    embed = model.model.embed_tokens
    hidden = model.last_hidden(embed(head), visual, embed(tail), batch.is_canvas, kept, has_gaps)
    masked = batch.is_masked
    logits = model.logits(hidden[masked]).float()
    targets = batch.tail[masked]
    weight = torch.where(targets == words.EOT, _END_WEIGHT, 1.0)
    return (F.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum().clamp(min=1)
