"""The recipe as a table, and the loop that runs it from any point."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import Batch, Window, draw_batch, draw_crowd, training_glyphs
from losses import Probes, Thinning, answer_loss, tower_losses
from model import DiffusionVLM
from tqdm import tqdm

from vllm_dvlm.synthetic.digit_questions import Glyphs

_SAVE_EVERY_S = 60


@dataclass(frozen=True)
class Stage:
    """A part of the recipe.

    Attributes:
        steps: at --minutes-scale 1.
        window: range of the grid's part that pictures show; None: the tower alone.
        lr: learning rate at begin and end, linear between.
        part: samples per forward pass; gradients of a batch's parts add up. Parts run side by side, and small ones
            stay in the cache.
        crowds: pictures full of digits beside each batch, for the tower alone: reading digits takes longest to learn.
        trains_tower: the pictures of the window train the tower, too; False: crowds alone.
    """

    name: str
    steps: int
    window: Window | None
    lr: tuple[float, float]
    batch: int = 128
    part: int = 64
    crowds: int = 16
    thinning: Thinning | None = None
    trains_tower: bool = True


@dataclass
class Run:
    """Everything a state file holds."""

    model: DiffusionVLM
    probes: Probes
    seed: int
    optimisers: list[torch.optim.Optimizer] = field(default_factory=list)
    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    history: list[tuple[int, int, float, float]] = field(default_factory=list)  # stage, step, answer loss, auxiliary
    resumed: bool = False

    def save(self, path: Path) -> None:
        content = {
            "model": self.model.state_dict(),
            "probes": self.probes.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "progress": (self.stage, self.step, self.seconds, self.history, self.resumed),
        }
        # Never half a file: a run may be stopped at any time.
        torch.save(content, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        content = torch.load(path)
        self.model.load_state_dict(content["model"])
        self.probes.load_state_dict(content["probes"])
        for optimiser, state in zip(self.optimisers, content["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.stage, self.step, self.seconds, self.history, self.resumed = content["progress"]


def build_optimisers(model: DiffusionVLM, probes: Probes) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks (three times fewer steps to the first look-ups), AdamW for the rest."""
    inside, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_block = ".layers." in name and parameter.dim() == 2
            (inside if is_block else others).append(parameter)
    others += list(probes.parameters())
    muon = torch.optim.Muon(inside, lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)]


def run_stages(
    run: Run,
    stages: Sequence[Stage],
    state: Path,
    after_stage: Callable[[Run, Stage], None],
    scale: float = 1.0,
    threads: int = 2,
) -> None:
    """Train from where `run` stands to the end, saving to `state` now and then."""
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        _run_stages(run, stages, state, after_stage, scale, pool)


def _run_stages(
    run: Run,
    stages: Sequence[Stage],
    state: Path,
    after_stage: Callable[[Run, Stage], None],
    scale: float,
    pool: Executor,
) -> None:
    glyphs = training_glyphs(run.seed)
    saved = time.monotonic()
    while run.stage < len(stages):
        stage = stages[run.stage]
        num_steps = max(1, round(stage.steps * scale))
        bar = tqdm(total=num_steps, initial=run.step, desc=stage.name, mininterval=2)
        while run.step < num_steps:
            start = time.monotonic()
            set_rate(run.optimisers, stage, run.step, num_steps)
            answer, auxiliary = train_step(run, stage, glyphs, pool)
            run.history.append((run.stage, run.step, answer, auxiliary))
            run.step += 1
            run.seconds += time.monotonic() - start
            bar.update()
            bar.set_postfix(answer=f"{answer:.3f}", auxiliary=f"{auxiliary:.3f}", refresh=False)
            if time.monotonic() - saved > _SAVE_EVERY_S:
                run.save(state)
                saved = time.monotonic()
        bar.close()
        after_stage(run, stage)
        run.stage, run.step = run.stage + 1, 0
        run.save(state)
        # Kept: to go on from here with another recipe, copy it over `state` and resume.
        shutil.copy(state, state.with_name(f"{state.stem}_{run.stage}{state.suffix}"))


def set_rate(optimisers: list[torch.optim.Optimizer], stage: Stage, step: int, num_steps: int) -> None:
    """Linear from the stage's first rate to its last, after a short warm-up."""
    share = step / num_steps
    rate = stage.lr[0] + (stage.lr[1] - stage.lr[0]) * share
    if stage.window is None:
        rate *= min(1.0, (step + 1) / 50)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate


def train_step(run: Run, stage: Stage, glyphs: Glyphs, pool: Executor) -> tuple[float, float]:
    """One optimiser step; (answer loss, auxiliary loss), mean over the batch.

    Parts of the batch run on the pool's threads, each with one core. Cores that share each operation instead wait for
    each other hundreds of times a step: fifty times slower where other programs run.
    """
    # By stage and step, so that a resumed run sees the batches it would have seen.
    rng = np.random.default_rng((run.seed, run.stage, run.step))
    grid = run.model.shape.grid
    if stage.window is None:
        jobs = [(part, None) for part in draw_crowd(rng, stage.batch, 4, grid, glyphs).split(stage.part)]
    else:
        jobs = [(part, stage) for part in draw_batch(rng, stage.batch, stage.window, grid, glyphs).split(stage.part)]
        jobs.append((draw_crowd(rng, stage.crowds, 4, grid, glyphs), None))
    # One seed for all parts: they drop the same number of visual tokens, so that they take equally long.
    seed = int(rng.integers(2**62))
    parameters = [p for optimiser in run.optimisers for g in optimiser.param_groups for p in g["params"]]

    def gradients(job: tuple[Batch, Stage | None]) -> tuple[list[torch.Tensor | None], float, float]:
        part, answers_of = job
        generator = torch.Generator().manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            through_tower = answers_of is None or answers_of.trains_tower
            visual, auxiliary, _ = tower_losses(run.model, run.probes, part, through_tower)
            answer = torch.zeros(())
            if answers_of is not None:
                answer = answer_loss(run.model, visual, part, answers_of.thinning, generator)
        share = len(part.cells) / (stage.batch if stage.window is None or answers_of else stage.crowds)
        loss = (answer + 0.3 * auxiliary) * share
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return found, answer.item() * share, auxiliary.item() * share if answers_of or stage.window is None else 0.0

    results = list(pool.map(gradients, jobs))
    # Added in the order of the parts, so that threads do not change the sums.
    for i, parameter in enumerate(parameters):
        parts = [found[i] for found, _, _ in results if found[i] is not None]
        parameter.grad = torch.stack(parts).sum(0) if parts else None
    answer, auxiliary = (sum(result[i] for result in results) for i in (1, 2))
    if not math.isfinite(answer + auxiliary):
        raise FloatingPointError(f"the loss is {answer} + {auxiliary} at step {run.step} of stage {stage.name}")
    for optimiser in run.optimisers:
        torch.nn.utils.clip_grad_norm_([p for g in optimiser.param_groups for p in g["params"]], 1.0)
        optimiser.step()
    return answer, auxiliary


def attention_in_float32() -> None:
    """Let attention run in float32 under autocast: its bfloat16 backward pass takes twice as long on a CPU."""
    fused = F.scaled_dot_product_attention

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return fused(q.float(), k.float(), v.float(), attn_mask=attn_mask)

    F.scaled_dot_product_attention = attend
