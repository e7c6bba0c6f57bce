"""`vllm-dvlm size MODEL`: weights, KV, requests in flight and operations of a checkpoint; arithmetic, not measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_dvlm.bench.common import Row, format_table
from vllm_dvlm.families import FAMILIES
from vllm_dvlm.tools.sizing import arithmetic as sizes

PICTURES = ((384, 384), (1024, 768))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; all sizes are of one GPU."""
    names = ", ".join(f'"{family.published_name}"' for family in FAMILIES.values())
    parser.add_argument("model", metavar="MODEL", help=f"checkpoint folder or hub name, or one of {names}")
    parser.add_argument("--card", choices=sizes.CARDS, default="H100", help="GPU for memory and times (default H100)")
    parser.add_argument("--gpu-gib", type=float, help="its memory, if it has another")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92, help="as vLLM's (default 0.92)")
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, help="GPUs of an engine")
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384, help="most tokens of a step")
    parser.add_argument("--image", metavar="WxH", help="picture of a request (default: the one of most visual tokens)")
    parser.add_argument("--text-tokens", type=int, default=100, help="of a prompt, beside the picture (default 100)")
    parser.add_argument("--canvas", type=int, default=64, help="canvas length (default 64)")
    parser.add_argument("--block", type=int, help="block length (default: the canvas)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: half of the canvas)")
    parser.add_argument("--refresh", type=int, default=32, help="refresh interval of cached rows (default 32)")
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[0.5, 0.25], help="of redvtp")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")


def config_of(model: str) -> Any:
    """The config of a published name, a folder or a hub name. ValueError if there is none."""
    from vllm_dvlm.checkpoint import configuration

    for family in FAMILIES.values():
        if model.casefold() in (family.published_name.casefold(), family.name.casefold()):
            return configuration.published_config(family)
    try:
        config = configuration.load_config(model)
    except OSError as error:
        known = ", ".join(family.published_name for family in FAMILIES.values())
        message = f"{model} is no checkpoint folder and cannot be fetched ({error}); known by name: {known}"
        raise ValueError(message) from None
    configuration.resolve_vision_config(config)
    return config


def picture_of(text: str | None, layout: Any) -> tuple[int, int]:
    """ "1024x768", or the picture of most visual tokens. ValueError for anything else."""
    from vllm_dvlm.checkpoint.anyres import largest_image

    if text is None:
        return largest_image(layout)
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise ValueError(f"--image {text!r}: write WIDTHxHEIGHT in pixels, such as 1024x768")
    return int(width), int(height)


def run(arguments: argparse.Namespace) -> int:
    """Print the tables. ValueError for arguments that cannot be met."""
    found = numbers(arguments)
    ranks = f", {found['ranks']} GPUs an engine" if found["ranks"] > 1 else ""
    where = f"{found['model']} on {found['card']}, {found['gpu_gib']:g} GiB{ranks}"
    print(f"{where}; bfloat16; arithmetic, not measured", end="\n\n")
    for name in ("memory", "pictures", "in flight", "recipes"):
        print(format_table(found[name]), end="\n\n")
    print(
        "FLOP: text layers and vocabulary logits of masked positions; a multiply-add counts twice. ms: a step takes\n"
        "the longer of its operations at the card's peak and of reading weights and KV once (roofline): a bound."
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def numbers(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it. ValueError for arguments that cannot be met."""
    from vllm_dvlm.checkpoint.anyres import layout_of

    positive = ("tensor_parallel_size", "max_num_batched_tokens", "canvas", "refresh")
    for name in positive:
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if any(not 0 < keep < 1 for keep in arguments.keep_ratios):
        raise ValueError("--keep-ratios must lie in (0, 1): unpruned is in the table anyway")
    config = config_of(arguments.model)
    card, ranks = sizes.CARDS[arguments.card], arguments.tensor_parallel_size
    if config.num_attention_heads % ranks:
        raise ValueError(f"-tp {ranks} does not divide the {config.num_attention_heads} heads of this checkpoint")
    gib = card.gib if arguments.gpu_gib is None else arguments.gpu_gib
    layout = config.image_layout(config.vision_config)
    size = picture_of(arguments.image, layout)
    work = sizes.Work(
        arguments.text_tokens,
        layout_of(*size, layout).num_visual_tokens,
        arguments.canvas,
        arguments.block or arguments.canvas,
        arguments.steps or max(1, arguments.canvas // 2),
    )
    has = sizes.memory(config, gib, arguments.gpu_memory_utilization, ranks, arguments.max_num_batched_tokens)
    if has.pool <= 0:
        raise ValueError(
            f"weights and activations take {(has.weights + has.activations) / 2**30:.1f} GiB, so {gib:g} GiB leave no "
            "room for KV: name a larger card, or more GPUs with -tp"
        )
    keeps = (1.0, *sorted(set(arguments.keep_ratios), reverse=True))
    attentions = tuple(config.family.attentions)
    return {
        "model": config.family.published_name if not Path(arguments.model).exists() else Path(arguments.model).name,
        "card": card.name,
        "gpu_gib": gib,
        "ranks": ranks,
        "memory": [_memory_row(config, has)],
        "pictures": [_picture_row(config, layout, each) for each in dict.fromkeys((*PICTURES, size))],
        "in flight": [_in_flight_row(config, work, keep, has.pool, ranks) for keep in keeps],
        "recipes": [
            _recipe_row(config, work, recipe, card, has.pool, ranks)
            for recipe in sizes.recipes(attentions, keeps[1:], arguments.refresh)
        ],
    }


def _memory_row(config: Any, has: sizes.Memory) -> Row:
    return {
        "parameters": f"{(sizes.text_parameters(config) + sizes.vision_parameters(config)) / 1e9:.2f} B",
        "weights GiB": round(has.weights / 2**30, 1),
        "activations GiB": round(has.activations / 2**30, 1),
        "KV pool GiB": round(has.pool / 2**30, 1),
        "KV KiB/token": round(sizes.kv_bytes_per_token(config) / 1024, 1),
        "embedding KiB/token": round(config.hidden_size * 2 / 1024, 1),
        "logits chunk MiB": sizes.LOGITS_CHUNK_BYTES // 2**20,
    }


def _picture_row(config: Any, layout: Any, size: tuple[int, int]) -> Row:
    from vllm_dvlm.checkpoint.anyres import layout_of

    found = layout_of(*size, layout)
    return {
        "picture": "x".join(map(str, size)),
        "tiles": found.num_tiles,
        "visual tokens": found.num_visual_tokens,
        "KV MiB": round(found.num_visual_tokens * sizes.kv_bytes_per_token(config) / 2**20),
        "embeddings MiB": round(found.num_visual_tokens * config.hidden_size * 2 / 2**20, 1),
        "tower TFLOP": round(sizes.tower_tflop(config, found.num_tiles), 2),
    }


def _in_flight_row(config: Any, work: sizes.Work, keep: float, pool: int, ranks: int) -> Row:
    prompt = sizes.pruned_prompt_len(work.prompt, work.visual, keep) if keep < 1 else work.prompt
    return {
        "keep ratio": f"{keep:g}",
        "prompt": prompt,
        "KV MiB a request": round((prompt + work.canvas) * sizes.kv_bytes_per_token(config) / 2**20),
        "requests in flight": sizes.in_flight(config, work, keep, pool, ranks),
    }


def _recipe_row(config: Any, work: sizes.Work, recipe: sizes.Recipe, card: sizes.Card, pool: int, ranks: int) -> Row:
    cost = sizes.cost(config, work, recipe)
    num = max(1, sizes.in_flight(config, work, recipe.keep, pool, ranks))
    alone = sizes.roofline_ms(config, cost, card, 1, ranks)
    first = sizes.roofline_ms(config, sizes.Cost(0, cost.steps[:1]), card, 1, ranks)
    return {
        "recipe": recipe.name,
        "steps": len(cost.steps),
        "TFLOP an answer": round(cost.tflop, 1),
        "first step ms": round(first, 1),
        "later step ms": round((alone - first) / max(1, len(cost.steps) - 1), 1),
        "answer ms": round(alone),
        "answers/s, pool full": round(1000 * num / sizes.roofline_ms(config, cost, card, num, ranks), 1),
    }
