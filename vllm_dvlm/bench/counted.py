"""What a generation costs by count, for shapes that are not at hand: LLaDA-V's 8B model beside the one that is timed.

The formula is the engine's own (``steps.step_flops``); vocabulary logits, which it leaves out, are counted here.
"""

import dataclasses
from dataclasses import dataclass

from vllm_dvlm.steps import Plan, forward_flops, pruned_prompt_len, step_flops


@dataclass(frozen=True)
class Shape:
    """Sizes of a text model, named as in a checkpoint's config."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int


# The published LLaDA-V: LLaDA 8B.
LLADA_8B = Shape(4096, 32, 12288, 126464, 32, 32)


@dataclass(frozen=True)
class Generation:
    """One request in exact mode: one block, every step computes everything."""

    prompt_len: int
    num_visual: int
    canvas_len: int
    num_steps: int

    @property
    def plan(self) -> Plan:
        """Its course without pruning."""
        return Plan(self.prompt_len, self.canvas_len, 0, self.canvas_len, self.num_steps, 1)

    @property
    def logits_rows(self) -> int:
        """Rows of vocabulary logits over all steps: those still masked before each."""
        base, extra = divmod(self.canvas_len, self.num_steps)
        left, rows = self.canvas_len, 0
        for step in range(self.num_steps):
            rows += left
            left -= base + (step < extra)
        return rows


def flops(config: object, work: Generation, keep_ratio: float = 1.0, layer: int | None = None) -> int:
    """Multiply-adds of the text layers of a generation that prunes in its first step.

    layer: layers of the first step before the prompt is shortened; None if that happens behind the step.
    """
    plan = work.plan
    short = dataclasses.replace(plan, prompt_len=pruned_prompt_len(plan.prompt_len, work.num_visual, keep_ratio))
    pruned = None if keep_ratio == 1 else short
    first = step_flops(config, plan, plan.total_len, pruned, layer)
    return first + (work.num_steps - 1) * step_flops(config, short, short.total_len, None, None)


def prefix_speedup(config: Shape, work: Generation) -> float:
    """Times fewer multiply-adds if the prompt attends to itself alone and is computed once, without pruning.

    Vocabulary logits, of the positions still masked, are part of both sides.
    """
    plan = dataclasses.replace(work.plan, caches_prompt=True)
    first = step_flops(config, plan, plan.total_len, None, None)
    prefix = first + (work.num_steps - 1) * step_flops(config, plan, plan.canvas_len, None, None)
    logits = work.logits_rows * config.hidden_size * config.vocab_size
    return (flops(config, work) + logits) / (prefix + logits)


def ideal_speedup(config: object, work: Generation, keep_ratio: float) -> float:
    """Times fewer multiply-adds of the layers by pruning behind the first step."""
    return flops(config, work) / flops(config, work, keep_ratio)


def keep_ratio_for(config: object, work: Generation, saving: float, layer: int) -> float:
    """Highest keep ratio, in hundredths, at which pruning behind ``layer`` layers of the first step saves a share."""
    whole = flops(config, work)
    fitting = (p / 100 for p in range(99, 0, -1) if flops(config, work, p / 100, layer) <= (1 - saving) * whole)
    return next(fitting, 0.01)


def work_shares(config: Shape, work: Generation, every_position: bool = False) -> dict[str, float]:
    """Shares of an unpruned generation's multiply-adds: attention, vocabulary logits, and the rest of the layers.

    every_position: logits of every position in every step, as the official loop computes them; else of those still
    masked, as the engine does.
    """
    length = work.plan.total_len
    layers = work.num_steps * forward_flops(config, length, length)
    attention = work.num_steps * 2 * length * length * config.hidden_size * config.num_hidden_layers
    rows = work.num_steps * length if every_position else work.logits_rows
    logits = rows * config.hidden_size * config.vocab_size
    total = layers + logits
    return {"attention": attention / total, "logits": logits / total, "rest": (layers - attention) / total}
