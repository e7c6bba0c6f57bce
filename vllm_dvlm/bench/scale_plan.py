"""What `bench scale` is asked for, checked before anything starts. Imports no Ray and no vLLM."""

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dvlm.bench import settings_grid
from vllm_dvlm.bench.scale_run import Client, Engine
from vllm_dvlm.bench.settings_grid import Setting

DEMO_KV_BYTES = 2**27
GOODPUT = ("e2el", "ttft")  # bounds that vLLM's client and the simulation both know


@dataclass(frozen=True)
class Plan:
    """replicas, ranks: of every configuration, each with each. per_replica: requests at once. simulate: replicas.

    check: replicas whose engines sleep. gpus: that this host has. bounds: of goodput, in milliseconds by name.
    """

    engine: Engine
    client: Client
    replicas: tuple[int, ...]
    ranks: tuple[int, ...]
    settings: tuple[Setting, ...]
    block: int
    steps: int
    num: int
    pairs: int
    per_replica: int
    limit: int
    simulate: tuple[int, ...]
    check: tuple[int, ...]
    gpus: int
    bounds: dict[str, float]

    def request_options(self, setting: Setting) -> dict[str, Any]:
        """Options of a request (`vllm_xargs`)."""
        return {
            "diffusion_canvas_length": self.client.output_len,
            "diffusion_max_steps": self.steps,
            "diffusion_block_length": self.block,
        } | setting.options()

    @property
    def num_runs(self) -> int:
        """Of the client against real engines."""
        alone = 2 * self.pairs + 1
        return len(self.ranks) * len(self.settings) * (alone + len(self.replicas) - 1)


def counts(text: str, option: str) -> tuple[int, ...]:
    """ "1,2" as numbers in ascending order. ValueError for anything else."""
    try:
        found = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise ValueError(f"{option} {text!r}: write numbers with commas between them, such as 1,2") from None
    if found[0] < 1:
        raise ValueError(f"{option} {text!r}: every number must be at least 1")
    return tuple(found)


def image_size(text: str) -> tuple[int, int]:
    """ "168x336" as (height, width). ValueError for anything else."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise ValueError(f"--image {text!r}: write HEIGHTxWIDTH in pixels, such as 168x168")
    return int(height), int(width)


def bounds(texts: Sequence[str]) -> dict[str, float]:
    """ "e2el:2000" ... as milliseconds by name. ValueError for anything else."""
    found = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = 0.0
        if name not in GOODPUT or found[name] <= 0:
            raise ValueError(f"--goodput {text!r}: write e2el:MS (whole answer) or ttft:MS (first token)")
    return found


def check_room(replicas: Sequence[int], ranks: Sequence[int], gpus: int, cores: int) -> None:
    """ValueError for a configuration that has no room here: a rank needs a GPU, or a core where there is none."""
    has, kind = (gpus, "GPU") if gpus else (cores, "core")
    for count in replicas:
        for each in ranks:
            if count * each > has:
                raise ValueError(
                    f"--replicas {count} with --tp {each} needs {count * each} {kind}s and this machine has {has}: "
                    f"measure fewer and add --simulate {count}, or name a larger Ray cluster by RAY_ADDRESS"
                )


def check_ranks(config: Any, ranks: Sequence[int]) -> None:
    """ValueError for a number of ranks that does not divide the heads of a checkpoint's text model or vision tower."""
    heads = {"text model": config.num_attention_heads}
    if config.vision_config is not None:
        heads["vision tower"] = config.vision_config.num_attention_heads
    for name, count in heads.items():
        if wrong := [each for each in ranks if count % each]:
            raise ValueError(
                f"--tp {wrong[0]}: the {name} of this checkpoint has {count} heads, which {wrong[0]} ranks cannot "
                "share; leave it out or name another --model"
            )


def choose_settings(
    attentions: Sequence[str], refresh: int, ratios: Sequence[float], patterns: Sequence[str] | None
) -> tuple[Setting, ...]:
    """Exact and cached, each unpruned and with redvtp; or those whose names fit a pattern. ValueError for none."""
    everything = settings_grid.grid([], [refresh], 1.0, sorted(set(ratios)), attentions)
    default = [
        s
        for s in everything
        if s.mode.threshold is None and s.positions == "renumber" and s.method in ("none", "redvtp")
    ]
    return tuple(settings_grid.choose(everything, default, patterns, []))


def num_gpus() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def plan_of(arguments: argparse.Namespace) -> Plan:
    """From parsed options. ValueError, which names the remedy, for those that cannot be met."""
    from vllm_dvlm.bench.question_job import model_of
    from vllm_dvlm.checkpoint.configuration import load_config

    slots = arguments.max_num_seqs
    per_replica = 2 * slots if arguments.concurrency_per_replica is None else arguments.concurrency_per_replica
    output_len = arguments.output_len
    steps = output_len if arguments.steps is None else arguments.steps
    block = max(1, output_len // 2) if arguments.block_length is None else arguments.block_length
    least_one = {
        "--max-num-seqs": slots,
        "--concurrency-per-replica": per_replica,
        "--output-len": output_len,
        "--block-length": block,
        "--steps": steps,
        "--input-len": arguments.input_len,
        "--images": arguments.images,
        "--num": arguments.num,
        "--pairs": arguments.pairs,
    }
    if wrong := [name for name, value in least_one.items() if value < 1]:
        raise ValueError(f"{', '.join(wrong)} must be at least 1")
    if output_len % block:
        raise ValueError(f"--block-length {block} must divide --output-len {output_len}")
    if arguments.refresh < 2:
        raise ValueError("--refresh must be at least 2: 1 is the exact mode, which is measured anyway")
    if any(not 0 < ratio < 1 for ratio in arguments.keep_ratios):
        raise ValueError("--keep-ratios must lie in (0, 1): unpruned is measured anyway")
    # One replica is what others are compared with.
    replicas = tuple(sorted({1, *counts(arguments.replicas, "--replicas")})) if arguments.replicas else None
    ranks = counts(arguments.tp, "--tp")
    simulate = counts(arguments.simulate, "--simulate") if arguments.simulate else ()
    model = model_of(arguments.model)
    try:
        config = load_config(model)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"no config of a checkpoint that can be served at {model}: {error}; name a folder or hub name with --model"
        ) from None
    gpus, cores = num_gpus(), len(os.sched_getaffinity(0))
    if replicas is None:
        replicas = tuple(sorted({1, max(1, (gpus or cores) // max(ranks))}))
    if "RAY_ADDRESS" not in os.environ:
        check_room(replicas, ranks, gpus, cores)
    check_ranks(config, ranks)
    limits = bounds(arguments.goodput)
    options = list(arguments.rest)
    if not gpus and not any(word.startswith("--kv-cache-memory-bytes") for word in options):
        options += ["--kv-cache-memory-bytes", str(DEMO_KV_BYTES)]
    settings = choose_settings(config.family.attentions, arguments.refresh, arguments.keep_ratios, arguments.settings)
    client = Client(
        model=model,
        input_len=arguments.input_len,
        output_len=output_len,
        images=arguments.images,
        image=image_size(arguments.image),
        bounds=tuple(f"{name}:{value:g}" for name, value in limits.items()),
        seed=arguments.seed,
        dataset=tuple(shlex.split(arguments.dataset or "")),
    )
    return Plan(
        engine=Engine(model, slots, max(replicas), bool(gpus), tuple(options)),
        client=client,
        replicas=replicas,
        ranks=ranks,
        settings=settings,
        block=block,
        steps=steps,
        num=arguments.num,
        pairs=arguments.pairs,
        per_replica=per_replica,
        limit=max(64, 4 * per_replica),
        simulate=simulate,
        check=() if arguments.no_check or not simulate else counts(arguments.check, "--check"),
        gpus=gpus,
        bounds=limits,
    )
