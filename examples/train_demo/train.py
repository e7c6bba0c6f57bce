"""Train a demo model: a small LLaDA-V or LaViDa that answers questions about pictures of digits.

    python examples/train_demo/train.py --out FOLDER [--family lavida]

Writes the checkpoint, its model card and the loss curve to FOLDER, and the checkpoint from before the robustness stage
to FOLDER/before_robustness. Progress is saved every minute: --resume goes on from there.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from evaluate import Pruning, answers
from export import score, write_card, write_checkpoint
from losses import Probes
from model import DiffusionVLM, Shape
from recipes import LAST_PLAIN, RECIPES, WHAT, shortened
from stages import Run, Stage, attention_in_float32, build_optimisers, run_stages

from vllm_dvlm.synthetic import digit_questions as questions

STATE = "training_state.pt"


def main() -> None:
    """Train, or go on training, and write everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=RECIPES, default="llada_v")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes-scale", type=float, default=1.0, help="scales the steps of every stage")
    parser.add_argument("--short", action="store_true", help="half a minute: learns a little, proves the way")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)  # parts of a batch run side by side instead
    attention_in_float32()
    args.out.mkdir(parents=True, exist_ok=True)
    recipe, num_questions = RECIPES[args.family], 1000
    stages = recipe.stages
    if args.short:
        stages, num_questions = shortened(stages), 20
    run = start(recipe.shape, args.seed)
    state = args.out / STATE
    resumed = args.resume and state.exists()
    if resumed:
        run.load(state)

    def after_stage(run: Run, stage: Stage) -> None:
        if stage.name in (LAST_PLAIN, stages[-1].name):
            robust = stage.thinning is not None
            folder = args.out if robust else args.out / "before_robustness"
            facts = {"resumed": run.resumed, "seed": args.seed, "threads": args.threads, "family": args.family}
            finish(run, folder, robust, num_questions, stages, facts)

    run.resumed = run.resumed or resumed
    run_stages(run, stages, state, after_stage, args.minutes_scale, args.threads)


def start(shape: Shape, seed: int) -> Run:
    """An untrained model."""
    torch.manual_seed(seed)
    model = DiffusionVLM(shape)
    probes = Probes(shape.tower_width, shape.width, shape.grid)
    return Run(model, probes, seed, build_optimisers(model, probes))


def finish(run: Run, folder: Path, robust: bool, num_questions: int, stages: Sequence[Stage], facts: dict) -> None:
    """Write one checkpoint with its card and loss curve, and print its figures."""
    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(run.model, folder)
    asked = questions.held_out(num_questions, seed=1)
    scores, pruned = {}, {}
    found = answers(run.model, asked)
    right = [answer == question.answer for question, answer in zip(asked, found, strict=True)]
    for kind in questions.KINDS:
        of_kind = [ok for question, ok in zip(asked, right, strict=True) if question.kind == kind]
        scores[kind] = score(sum(of_kind), len(of_kind))
    scores["all"] = score(sum(right), len(right))
    part = asked[: num_questions // 4]
    for method in ("redvtp", "random"):
        for keep_ratio in (0.5, 0.25, 0.1):
            found = answers(run.model, part, Pruning(method, keep_ratio))
            num_right = sum(a == q.answer for q, a in zip(part, found, strict=True))
            pruned[f"{method} {keep_ratio}"] = score(num_right, len(part))
    run.seconds += time.monotonic() - begin
    recipe = RECIPES[facts["family"]]
    losses = [row[2] for row in run.history if stages[row[0]].window is not None]
    facts |= {
        "title": f"Digit questions: {recipe.title}" + ("" if robust else ", before robustness training"),
        "model": recipe.title,
        "layout": recipe.layout,
        "robust": robust,
        "scores": scores,
        "pruned": pruned,
        "minutes": round(run.seconds / 60, 1),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "stages": [
            (stage.name, sum(row[0] == i for row in run.history), WHAT[stage.name])
            for i, stage in enumerate(stages[: run.stage + 1])
        ],
        "loss_first": round(float(np.mean(losses[:10])), 4),
        "loss_last": round(float(np.mean(losses[-10:])), 4),
    }
    write_card(folder, facts)
    draw_curve(run, stages, folder / "loss.png")
    for name, numbers in (scores | pruned).items():
        print(f"{folder.name} {name}: {100 * numbers['share']:.1f} %  {numbers['interval_95']}", flush=True)


def draw_curve(run: Run, stages: Sequence[Stage], path: Path) -> None:
    """Both losses by step, stages marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4))
    history = np.array(run.history)
    steps = np.arange(len(history))
    width = max(1, len(history) // 200)
    for column, label in ((2, "answer"), (3, "auxiliary (sum)")):
        shown = np.convolve(history[:, column], np.ones(width) / width, mode="valid")
        axes.plot(steps[: len(shown)], np.maximum(shown, 1e-3), label=label, linewidth=1)
    for i in range(run.stage + 1):
        first = int(np.argmax(history[:, 0] == i))
        axes.axvline(first, color="grey", linewidth=0.5)
        axes.text(first, axes.get_ylim()[1], " " + stages[i].name, fontsize=7, rotation=90, va="top")
    axes.set(yscale="log", xlabel="step", ylabel="loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
