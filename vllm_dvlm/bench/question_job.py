"""What `bench quality` and `bench frontier` share: arguments, settings, where the demo lies. Light to import."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from vllm_dvlm.bench import child, settings_grid
from vllm_dvlm.bench.common import add_output_arguments
from vllm_dvlm.bench.pruning_job import CACHED
from vllm_dvlm.bench.settings_grid import Setting
from vllm_dvlm.families.base import Family

DEMO = Path("examples") / "demo_model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(child.Job):
    """Settings of a measurement by questions.

    canvas, num_steps, block: of every request, in tokens and denoising steps; block None is the whole canvas.
    batch: most requests in flight; pool_prompts: KV pool in unpruned requests of the longest prompt, None for ample.
    repeats, alone: of `frontier`: parts that the questions are cut into, and questions of each that are asked alone.
    """

    model: str
    data: str | None
    num: int
    batch: int
    canvas: int
    num_steps: int
    block: int | None
    settings: tuple[Setting, ...]
    answers: str | None = None
    pool_prompts: int | None = None
    repeats: int = 1
    alone: int = 0

    def request_options(self, setting: Setting) -> dict[str, Any]:
        """Options of a request (`extra_args`, `vllm_xargs`)."""
        options: dict[str, Any] = {"diffusion_canvas_length": self.canvas, "diffusion_max_steps": self.num_steps}
        if self.block is not None:
            options["diffusion_block_length"] = self.block
        return options | setting.options()

    @property
    def data_name(self) -> str:
        """Where the questions come from, for the description of a run."""
        return "digit_questions.held_out" if self.data is None else Path(self.data).name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that both commands have."""
    add_output_arguments(parser)
    parser.add_argument("--model", help=f"checkpoint folder or hub name (default: {DEMO})")
    parser.add_argument("--data", metavar="FILE.jsonl", help="questions (default: the demo's held-out ones)")
    parser.add_argument("--num", type=int, default=1000, help="questions (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and of random pruning")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", type=int, default=16, help="most requests in flight (default 16)")
    parser.add_argument("--canvas-length", type=int, default=8)
    parser.add_argument("--steps", type=int, help="denoising steps of the canvas (default: one per position)")
    parser.add_argument("--block-length", type=int, help="default: the canvas is one block")
    parser.add_argument(
        "--refresh", type=int, nargs="+", default=[2, CACHED], help="refresh intervals besides 1, for full attention"
    )
    parser.add_argument("--threshold", type=float, default=1.0, help="factor of the threshold modes")
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=list(settings_grid.KEEP_RATIOS))
    parser.add_argument("--fastv-layers", type=int, nargs="+", help="default: the first, half, three quarters")
    parser.add_argument("--settings", nargs="+", metavar="PATTERN", help='such as "redvtp_*"; "all" is every one')
    parser.add_argument("--list-settings", action="store_true", help="print names (chosen ones with *) and end")
    parser.add_argument("--answers", metavar="FILE.jsonl", help="write every answer of every setting")


def model_of(name: str | None) -> str:
    """The checkpoint: as asked for, or the demo model in the working folder or beside the package.

    ValueError if neither is there.
    """
    if name is not None:
        return name
    for root in (Path(), Path(__file__).resolve().parents[2]):
        if (root / DEMO / "config.json").is_file():
            return str(root / DEMO)
    raise ValueError(f"{DEMO} is not here: name a checkpoint with --model.")


def family_and_layers(model: str) -> tuple[Family, int]:
    """Family and number of text layers of a checkpoint. ValueError if its config cannot be read."""
    from vllm_dvlm.checkpoint.configuration import load_config

    try:
        config = load_config(model)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"No config of a checkpoint that can be served at {model}: {error}") from None
    return config.family, config.num_hidden_layers


def job_of(arguments: argparse.Namespace, default: Any, with_cache: bool = False, **more: Any) -> Job:
    """Settings from parsed arguments; `default` chooses from the grid (`settings_grid`), `more` are fields of `Job`.

    with_cache: what reads the KV of earlier steps most, unpruned, is measured in any case.

    ValueError for arguments that cannot be met.
    """
    steps = arguments.canvas_length if arguments.steps is None else arguments.steps
    counts = {
        "--num": arguments.num,
        "--threads": arguments.threads,
        "--batch": arguments.batch,
        "--canvas-length": arguments.canvas_length,
        "--steps": steps,
        "--block-length": arguments.block_length or 1,
        "--refresh": min(arguments.refresh),
    }
    if wrong := [name for name, value in counts.items() if value < 1]:
        raise ValueError(f"{', '.join(wrong)} must be at least 1.")
    if any(not 0 < ratio < 1 for ratio in arguments.keep_ratios):
        raise ValueError("--keep-ratios must lie in (0, 1): unpruned is measured anyway.")
    if arguments.threshold <= 0:
        raise ValueError("--threshold must be positive.")
    if arguments.data is not None and not Path(arguments.data).is_file():
        raise ValueError(f"--data: {arguments.data} is no file.")
    model = model_of(arguments.model)
    family, num_layers = family_and_layers(model)
    layers = arguments.fastv_layers or settings_grid.prune_layers(num_layers)
    if any(not 0 < layer < num_layers for layer in layers):
        raise ValueError(f"--fastv-layers must be from 1 to {num_layers - 1}.")
    everything = settings_grid.grid(
        sorted(set(layers)),
        arguments.refresh,
        arguments.threshold,
        sorted(set(arguments.keep_ratios)),
        family.attentions,
    )
    always = [everything[0], *([Setting(settings_grid.cached_mode(everything))] if with_cache else [])]
    settings = settings_grid.choose(everything, default(everything), arguments.settings, always)
    if arguments.list_settings:
        for setting in everything:
            print("*" if setting in settings else " ", setting.name)
    return Job(
        model=model,
        data=arguments.data,
        num=arguments.num,
        seed=arguments.seed,
        threads=arguments.threads,
        batch=arguments.batch,
        canvas=arguments.canvas_length,
        num_steps=steps,
        block=arguments.block_length,
        settings=tuple(settings),
        answers=arguments.answers,
        **more,
    )
