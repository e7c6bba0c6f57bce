"""The recipe of each family: shape, stages, and what the model card says about them."""

from dataclasses import dataclass, replace

from data import Window
from losses import Thinning
from model import Shape
from stages import Stage

from vllm_dvlm.families.lavida import LAVIDA_LLADA

LAST_PLAIN = "whole grid"
ROBUST = "robustness"
STAGES = (
    Stage("tower", 2000, None, (6e-3, 3e-3), batch=64, part=32),
    Stage("small windows", 2400, Window(2, 4, digits=(2, 6)), (3e-3, 3e-3), part=32),
    Stage("larger windows", 300, Window(4, 8), (3e-3, 2e-3), part=64),
    Stage(LAST_PLAIN, 250, Window(12, 12), (2e-3, 2e-4), part=32, crowds=96),
    Stage(ROBUST, 350, Window(12, 12), (1.5e-3, 1e-4), part=32, crowds=96, thinning=Thinning(0.7)),
)
WHAT = {
    "tower": "windows of 4x4 cells, a digit in each, auxiliary losses alone",
    "small windows": "windows of 2 to 4 cells a side, anywhere in the grid, with 2 to 6 digits",
    "larger windows": "windows of 4 to 8 cells a side",
    LAST_PLAIN: "all 12x12 cells",
    ROBUST: "12x12 cells, visual tokens dropped at random in 70 % of steps, down to 8 %",
}


@dataclass(frozen=True)
class Recipe:
    """How one family's demo model is trained.

    title: what it is, for the card.
    layout: sentence of the card about pictures as tokens and about attention.
    """

    title: str
    layout: str
    shape: Shape
    stages: tuple[Stage, ...] = STAGES


RECIPES = {
    "llada_v": Recipe(
        "a small LLaDA-V",
        "12x12 cells of 14 pixels: 144 patch tokens and a newline token. Prompt and canvas are one bidirectional "
        "sequence.",
        Shape(),
    ),
    # The tower has four times the patches, so steps take longer; there are fewer. Whole pictures do not train it: it
    # has learnt to read digits before, and goes on with small windows full of them.
    "lavida": Recipe(
        "a small LaViDa",
        "12x12 cells of 14 pixels, four patches of 7 pixels each, pooled to one token after the projector: 144 tokens "
        "and a newline token. The prompt attends to itself alone and is computed once (trained with this attention "
        "only).",
        Shape(family=LAVIDA_LLADA, patch=7, splits=2, tower_heads=4),
        (
            STAGES[0],
            replace(STAGES[1], steps=2200),
            STAGES[2],
            replace(STAGES[3], steps=200, trains_tower=False),
            replace(STAGES[4], steps=260, trains_tower=False),
        ),
    ),
}


def shortened(stages: tuple[Stage, ...]) -> list[Stage]:
    """The same recipe with few steps of small batches, and windows instead of the whole grid."""
    num_steps = {"tower": 80, "small windows": 40}
    largest = Window(2, 5)
    return [
        replace(stage, steps=num_steps.get(stage.name, 5), window=stage.window and largest, batch=min(stage.batch, 64))
        for stage in stages
    ]
