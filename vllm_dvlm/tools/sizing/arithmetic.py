"""Bytes and floating point operations of a checkpoint, from its config alone. Imports neither torch nor vLLM.

Where the engine has the same number it is the engine's own function: courses of steps and counts of operations come
from ``steps``, visual tokens from the image layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_dvlm.steps import Plan, Position, Step, advance, num_scheduled_steps, pruned_prompt_len, round_up, step_at
from vllm_dvlm.steps import step_flops as multiply_adds

# vLLM's default block on GPUs.
BLOCK_SIZE = 16
LOGITS_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Card:
    """A GPU as its maker publishes it. gib: memory. gb_s: memory bandwidth, GB/s. tflops: dense bfloat16, TFLOP/s."""

    name: str
    gib: float
    gb_s: float
    tflops: float


# NVIDIA's data sheets: A10, L40S, A100 80GB SXM, H100 SXM, H200 SXM, B200 SXM.
CARDS = {
    card.name: card
    for card in (
        Card("A10", 24, 600, 125),
        Card("L40S", 48, 864, 362),
        Card("A100", 80, 2039, 312),
        Card("H100", 80, 3350, 989),
        Card("H200", 141, 4800, 989),
        Card("B200", 180, 8000, 2250),
    )
}


def text_parameters(config: Any) -> int:
    """Of embedding, layers, last norm and output layer."""
    width, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = width * (heads + 2 * kv_heads) + heads * width
    if config.attention_bias or config.qkv_bias:
        attention += heads + 2 * kv_heads
    if config.attention_bias:
        attention += width
    layer = attention + 3 * width * inner + 2 * width
    ends = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    return ends + config.num_hidden_layers * layer + width


def vision_parameters(config: Any) -> int:
    """Of the tower, without the layers behind the selected one, the projector and the newline."""
    vision = config.vision_config
    width, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    places = (vision.image_size // patch) ** 2
    embeddings = vision.num_channels * patch * patch * width + width + places * width
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    select = getattr(config, "mm_vision_select_layer", -2)
    layers = vision.num_hidden_layers + 1 + select if select < 0 else select
    projector = width * config.hidden_size + config.hidden_size**2 + 2 * config.hidden_size
    return embeddings + layers * layer + projector + config.hidden_size


def kv_bytes_per_token(config: Any, bytes_per_number: int = 2, head_multiple: int = 8) -> int:
    """Of keys and values in all layers. head_multiple: attention kernels pad heads to a multiple of it."""
    head = round_up(config.head_dim, head_multiple)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * bytes_per_number


@dataclass(frozen=True)
class Work:
    """A request: text and visual tokens of its prompt, canvas, block and steps of the whole canvas."""

    text: int
    visual: int
    canvas: int
    block: int
    steps: int

    @property
    def prompt(self) -> int:
        return self.text + self.visual

    def plan(self, refresh: int, caches_prompt: bool) -> Plan:
        """Its course; ValueError for lengths that do not divide."""
        blocks, rest = divmod(self.canvas, self.block)
        if rest or self.steps % blocks:
            raise ValueError(f"a canvas of {self.canvas} in {self.steps} steps has no whole blocks of {self.block}")
        return Plan(self.prompt, self.canvas, 0, self.block, self.steps // blocks, refresh, caches_prompt)


@dataclass(frozen=True)
class Recipe:
    """How a request is computed. refresh: 1 is the exact mode. keep: share of the visual tokens behind step one."""

    name: str
    refresh: int = 1
    caches_prompt: bool = False
    keep: float = 1.0


def recipes(attentions: tuple[str, ...], keeps: tuple[float, ...], refresh: int) -> list[Recipe]:
    """Of a family: its attentions, exact and cached, unpruned and at these keep ratios."""
    found = []
    for attention in attentions:
        if attention == "prefix":
            modes = [("prefix", 1, True)]
        else:
            front = "" if len(attentions) == 1 else f"{attention}, "
            modes = [(f"{front}exact", 1, False), (f"{front}refresh {refresh}", refresh, False)]
        for name, interval, caches in modes:
            found.append(Recipe(name, interval, caches))
            found += [Recipe(f"{name}, redvtp {keep:g}", interval, caches, keep) for keep in keeps if keep < 1]
    return found


def course(work: Work, recipe: Recipe) -> Iterator[tuple[Plan, Step, int, Plan | None]]:
    """Every step of a request that fills a canvas by the uniform schedule, left to right within each block.

    Yields (plan, step, rows of vocabulary logits, plan after pruning in this step or None).
    """
    plan = work.plan(recipe.refresh, recipe.caches_prompt)
    short = dataclasses.replace(plan, prompt_len=pruned_prompt_len(plan.prompt_len, work.visual, recipe.keep))
    position, is_first = Position(), True
    for _ in range(work.canvas // work.block):
        masked = work.block
        for count in num_scheduled_steps(work.block, plan.steps_per_block or 1):
            pruned = short if is_first and recipe.keep < 1 else None
            step = step_at(plan, position)
            if is_first and plan.caches_prompt:  # nothing is in the KV cache yet
                step = Step(0, plan.total_len, plan.total_len, is_refresh=False)
            yield plan, step, masked, pruned
            plan, is_first = (short if recipe.keep < 1 else plan), False
            position, masked = advance(plan, position, count), masked - count


@dataclass(frozen=True)
class Cost:
    """Of one answer. tflop: floating point operations / 10**12, a multiply-add counting twice. steps: (FLOP, tokens
    attended to, tokens computed) of each."""

    tflop: float
    steps: tuple[tuple[float, int, int], ...]


def cost(config: Any, work: Work, recipe: Recipe) -> Cost:
    """Text layers and the vocabulary logits of masked positions; the vision tower is apart (`tower_tflop`)."""
    found = []
    for plan, step, rows, pruned in course(work, recipe):
        adds = multiply_adds(config, plan, step.query_len, pruned, None) + rows * config.hidden_size * config.vocab_size
        found.append((2.0 * adds, step.kv_len, step.query_len))
    return Cost(sum(flop for flop, _, _ in found) / 1e12, tuple(found))


def tower_tflop(config: Any, tiles: int) -> float:
    """Of encoding one picture of so many tiles, projector included."""
    vision = config.vision_config
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    layer = patches * (4 * width * width + 2 * width * vision.intermediate_size) + 2 * patches * patches * width
    layers = vision.num_hidden_layers - 1
    projector = patches * (width * config.hidden_size + config.hidden_size**2)
    return 2.0 * tiles * (layers * layer + projector) / 1e12


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU of `ranks`. pool: what is left for KV."""

    weights: int
    activations: int
    pool: int


def memory(
    config: Any, gib: float, utilization: float, ranks: int, step_tokens: int, bytes_per_number: int = 2
) -> Memory:
    """Of a GPU with this memory; `step_tokens`: most tokens of a step (--max-num-batched-tokens).

    Activations are the widest tensors of a layer (gate, up and their product beside hidden states and residual) for
    that many tokens, and one chunk of vocabulary logits twice.
    """
    weights = (text_parameters(config) // ranks + vision_parameters(config)) * bytes_per_number
    inner = 3 * config.intermediate_size // ranks
    activations = step_tokens * (inner + 6 * config.hidden_size) * bytes_per_number + 2 * LOGITS_CHUNK_BYTES
    return Memory(weights, activations, int(gib * 2**30 * utilization) - weights - activations)


def in_flight(config: Any, work: Work, keep: float, pool: int, ranks: int = 1, bytes_per_number: int = 2) -> int:
    """Requests that a pool holds once they have pruned: their blocks, and the prompt embeddings kept beside them."""
    prompt = pruned_prompt_len(work.prompt, work.visual, keep) if keep < 1 else work.prompt
    kv = round_up(prompt + work.canvas, BLOCK_SIZE) * kv_bytes_per_token(config, bytes_per_number) // ranks
    return max(0, pool) // (kv + prompt * config.hidden_size * bytes_per_number)


def roofline_ms(config: Any, found: Cost, card: Card, num: int = 1, ranks: int = 1, bytes_per_number: int = 2) -> float:
    """Milliseconds of an answer's steps if nothing but arithmetic and memory took time, of `num` requests together.

    A step takes the longer of its operations at the card's peak and of reading the weights once and every request's KV.
    """
    weights = text_parameters(config) * bytes_per_number / ranks
    kv = kv_bytes_per_token(config, bytes_per_number) / ranks
    return sum(
        max(num * flop / ranks / (1e9 * card.tflops), (weights + num * keys * kv) / (1e6 * card.gb_s))
        for flop, keys, _ in found.steps
    )
