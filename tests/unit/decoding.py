"""The official step rules in plain Python, position by position: the specification of ``denoise.step.take_step``.

Written from tests/golden/llada_v/README.md, points 17 to 31 and 38 to 45. Nothing of vllm_dvlm is used here.
"""

import random
from dataclasses import dataclass, field

MASK = 0
WORDS = range(1, 8)


@dataclass(frozen=True)
class Run:
    """One request: its settings and, from a seed, what the model says in every step."""

    canvas_len: int
    block_len: int
    steps_per_block: int
    refresh_interval: int = 1
    threshold: float | None = None
    suffix: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    mask_share: float = 0.0  # how often the mask token is predicted
    levels: int = 8  # distinct confidences; few make ties
    prompt_len: int = 5
    caches_prompt: bool = False
    seed: int = 0

    def says(self, block_start: int, step: int, position: int) -> tuple[int, float]:
        """(token, confidence) at a canvas position in a step of a block."""
        draw = random.Random(f"{self.seed}/{block_start}/{step}/{position}")
        confidence = draw.randint(0, self.levels) / self.levels
        # In threshold mode the sampler forbids the mask token once a block took a step per position (point 45).
        stalled = self.threshold is not None and step >= self.block_len
        if draw.random() < self.mask_share and not stalled:
            return MASK, confidence
        return draw.choice(WORDS), confidence


@dataclass
class Outcome:
    canvas: list[int]
    stop: int | None = None
    # (block_start, step in block, committed positions ascending) of every step.
    steps: list[tuple[int, int, list[int]]] = field(default_factory=list)


def num_by_threshold(confidences: list[float], num_open: int, factor: float) -> int:
    """Points 43 and 44. confidences: of the candidates, best first; num_open: candidates and those out of bounds."""
    number = 1
    while number < len(confidences) and confidences[number] >= 1 - factor / (number + 2):
        number += 1
    return num_open if number == num_open - 1 else number


def official(run: Run) -> Outcome:
    out = Outcome([MASK] * run.canvas_len)
    for start in range(0, run.canvas_len, run.block_len):
        if out.stop is not None and start >= out.stop:  # point 29
            continue
        block = range(start, start + run.block_len)
        num_masked = sum(out.canvas[p] == MASK for p in block)
        each, more = divmod(num_masked, run.steps_per_block)
        step = 0
        while True:
            masked = [p for p in range(run.canvas_len) if out.canvas[p] == MASK]
            if not any(p in block for p in masked):  # point 21 (b)
                break
            if out.stop is not None and not any(p < out.stop for p in masked):  # point 21 (a)
                break
            if run.threshold is None and step == run.steps_per_block:
                break
            refresh = step % run.refresh_interval == 0  # points 39 and 40
            seen = [p for p in masked if refresh or p >= start]
            bound = start + run.block_len if out.stop is None else out.stop  # point 26
            said = {p: run.says(start, step, p) for p in seen if p < bound}
            best_first = sorted(said, key=lambda p, said=said: (-said[p][1], p))
            if run.threshold is None:
                count = each + (step < more)  # point 20
            else:
                count = num_by_threshold([said[p][1] for p in best_first], len(seen), run.threshold)
            chosen = sorted(best_first[:count])
            for p in chosen:
                out.canvas[p] = said[p][0]
            out.steps.append((start, step, chosen))
            hits = [p for p in range(run.canvas_len) if out.canvas[p] in run.stop_ids]  # point 28
            if hits and (out.stop is None or hits[0] < out.stop):
                out.stop = hits[0]
            step += 1
    return out


def emitted(run: Run, outcome: Outcome) -> list[int]:
    """What the engine hands out: canvas before the stop, suffix (point 17), and last the stop token itself."""
    if outcome.stop is None:
        return outcome.canvas + list(run.suffix)
    return outcome.canvas[: outcome.stop] + list(run.suffix) + [outcome.canvas[outcome.stop]]
