"""Pruning with and without cached keys in plain PyTorch, written for the tests of the engine.

Independent of the engine where it matters: keys are cached *before* the rotary embedding and turned at every use, so
nothing is ever moved or re-rotated; attention matrices are whole; the sequence is rebuilt by indexing. Weights and
single operations are those of ``vllm_dvlm.reference.model``, which the goldens check.

T = tokens of the sequence, R = computed rows, D = hidden width, H = heads, E = head width, N = visual tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from tests.golden import cases
from vllm_dvlm.reference.loops import EOT_ID, FORBIDDEN_IDS, MASK_ID, num_passing, num_unmasked_per_step
from vllm_dvlm.reference.model import Prompt, ReferenceModel


@dataclass
class Result:
    """What a run did. distances: smallest gaps on which a choice of the run hung."""

    canvas: list[int] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)  # pos, ids, conf, query_len, seq_len
    kept: list[int] | None = None
    importance: torch.Tensor | None = None
    distances: dict[str, float] = field(default_factory=dict)

    def at_most(self, name: str, value: float) -> None:
        self.distances[name] = min(self.distances.get(name, float("inf")), value)


def case_prompt(model: ReferenceModel, case: cases.Case) -> Prompt:
    """Merged prompt of a golden case."""
    features = model.image_features(cases.images(case), case.image_aspect_ratio)
    return model.merge(case.prompt_ids, features)


class Decoder:
    """One request: prompt rows with their rotary positions, canvas, and the keys and values of the last refresh."""

    def __init__(
        self,
        model: ReferenceModel,
        prompt: Prompt,
        options: dict[str, Any],
        importance: torch.Tensor | None = None,
        refresh_also: Collection[int] = (),
        is_prefix: bool = False,
        forbidden: Collection[int] = FORBIDDEN_IDS,
        draft: Collection[int] = (),
    ) -> None:
        """importance: [N] given from outside, for methods that read no attention. refresh_also: numbers of steps.

        is_prefix: the prompt attends to itself only and is computed in the first step and those of ``refresh_also``.
        """
        self.model, self.text, self.options = model, model.text, options
        self.importance, self.refresh_also = importance, refresh_also
        self.is_prefix, self.forbidden = is_prefix, list(forbidden)
        self.rows = prompt.embeddings  # [prompt, D]
        self.visual = torch.cat([torch.arange(*span) for span in prompt.visual_spans])
        self.canvas = torch.full((options["diffusion_canvas_length"],), MASK_ID)
        self.canvas[: len(draft)] = torch.tensor([*draft], dtype=torch.int64)
        self.given = self.canvas != MASK_ID
        self.angles = torch.arange(self.prompt_len + len(self.canvas))  # rotary positions of the sequence
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] = []  # per layer unrotated keys, values [T, H, E]
        self.attention: list[torch.Tensor] = []  # per layer [T, T], mean over heads
        self.result = Result()

    @property
    def prompt_len(self) -> int:
        return len(self.rows)

    # -- control flow ------------------------------------------------------------------------------------------

    def run(self) -> Result:
        length = len(self.canvas)
        block = self.options.get("diffusion_block_length", length)
        num_steps = self.options.get("diffusion_max_steps", length) * block // length
        for start in range(0, length, block):
            schedule = num_unmasked_per_step(int((self.canvas[start : start + block] == MASK_ID).sum()), num_steps)
            for i in range(block if "diffusion_threshold" in self.options else num_steps):
                if not (self.canvas[start : start + block] == MASK_ID).any():
                    break
                self._step(start, start + block, i, schedule[i] if i < num_steps else 0)
        self.result.canvas = self.canvas.tolist()
        assert self.is_prefix or EOT_ID not in self.result.canvas, "stops are not covered here"
        return self.result

    def _step(self, start: int, end: int, i: int, scheduled: int) -> None:
        interval, factor = self.options.get("diffusion_refresh_interval", 1), self.options.get("diffusion_threshold")
        is_first = not self.result.steps
        before = self.prompt_len
        refresh = is_first if self.is_prefix else i % interval == 0
        refresh |= len(self.result.steps) in self.refresh_also
        first = 0 if refresh else self.prompt_len + (0 if self.is_prefix else start)
        hidden = self._forward(first, is_first)
        is_open = self.canvas == MASK_ID
        rows = (is_open & (torch.arange(len(self.canvas)) < end)).nonzero()[:, 0]
        logits = self.text.logits(hidden[rows - len(self.canvas)])
        logits[:, self.forbidden] = -torch.inf
        best = logits.topk(2)
        self.result.at_most("token", float((best.values[:, 0] - best.values[:, 1]).min()))
        confidence = logits.double().softmax(-1).amax(-1)
        order = confidence.argsort(descending=True, stable=True)
        ranked = confidence[order].tolist()
        count = scheduled if factor is None else num_passing(ranked, int(is_open.sum()), factor)
        count = min(count, len(rows))
        if count < len(rows):
            self.result.at_most("confidence", ranked[count - 1] - ranked[count])
        chosen = order[:count].sort().values
        self.canvas[rows[chosen]] = best.indices[chosen, 0]
        self.result.steps.append(
            {
                "pos": rows[chosen].tolist(),
                "ids": best.indices[chosen, 0].tolist(),
                "conf": confidence[chosen].tolist(),
                "query_len": before + len(self.canvas) - first,
                "seq_len": before + len(self.canvas),
            }
        )
        if is_first and self.options.get("prune_method", "none") not in ("none", "fastv"):
            self._prune_after_step(set(rows[chosen].tolist()))

    # -- forward pass ------------------------------------------------------------------------------------------

    def _forward(self, first: int, is_first: bool) -> torch.Tensor:
        """Hidden states of the rows from ``first`` on; a refresh (0) refills the cache."""
        x = torch.cat([self.rows, self.model.embed(self.canvas)])[first:]
        if first == 0:
            self.cache = []
        fastv = is_first and self.options.get("prune_method") == "fastv"
        for i in range(self.text.num_layers):
            x = self._layer(i, x, first, is_first)
            if fastv and i + 1 == self.options.get("prune_layer", self.text.num_layers // 2):
                kept_rows = self._prune(self._mean_over_rows(self.attention[i], set()))
                x = x[kept_rows]
        return x

    def _layer(self, i: int, x: torch.Tensor, first: int, is_first: bool) -> torch.Tensor:
        layer, heads, eps = self.text.layers[i], self.text.num_heads, self.text.eps
        normed = F.rms_norm(x, x.shape[-1:], layer["norm1"], eps)
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in F.linear(normed, layer["qkv"]).chunk(3, -1))
        if first == 0:
            self.cache.append((k, v))
        else:
            old_k, old_v = self.cache[i]
            k, v = torch.cat([old_k[:first], k]), torch.cat([old_v[:first], v])
        scores = torch.einsum("rhe,the->hrt", self._turn(q, self.angles[first:]), self._turn(k, self.angles))
        scores *= q.shape[-1] ** -0.5
        if self.is_prefix and first == 0:
            scores[:, : self.prompt_len, self.prompt_len :] = -torch.inf
        weights = scores.softmax(-1)
        if is_first:
            self.attention.append(weights.mean(0))
        x = x + F.linear(torch.einsum("hrt,the->rhe", weights, v).flatten(1), layer["out"])
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], layer["norm2"], eps), layer["gate_up"]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, layer["down"])

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotary embedding in halves. [R, H, E] at [R]."""
        angle = torch.outer(positions.float(), self.text.frequencies)[:, None]
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)

    # -- pruning -----------------------------------------------------------------------------------------------

    def _mean_over_rows(self, attention: torch.Tensor, committed: set[int]) -> torch.Tensor:
        """[N] of [T, T]: mean over the rows that ``prune_rows`` names."""
        canvas = torch.arange(self.prompt_len, len(attention))
        is_committed = torch.tensor([i in committed for i in range(len(canvas))])
        is_text = torch.ones(self.prompt_len, dtype=torch.bool)
        is_text[self.visual] = False
        rows = {
            "masked": canvas[~is_committed & ~self.given],
            "committed": canvas[is_committed],
            "last": canvas[-1:],
            "response_prompt": torch.cat([is_text.nonzero()[:, 0], canvas]),
            "all": torch.arange(len(attention)),
        }[self.options.get("prune_rows", "masked")]
        return attention[rows][:, self.visual].mean(0)

    def _prune_after_step(self, committed: set[int]) -> None:
        if (self.canvas == MASK_ID).any():
            given = self.importance
            attention = torch.stack(self.attention).mean(0)
            self._prune(self._mean_over_rows(attention, committed) if given is None else given)

    def _prune(self, importance: torch.Tensor) -> torch.Tensor:
        """Shorten prompt, angles and cache; returns the rows [T'] of the old sequence that are left."""
        num_visual = len(self.visual)
        count = max(1, int(num_visual * self.options.get("prune_keep_ratio", 0.5)))
        ranked = importance.argsort(descending=True, stable=True)
        self.result.importance, self.result.kept = importance, ranked[:count].sort().values.tolist()
        if count < num_visual:
            last, next_one = importance[ranked[count - 1]], importance[ranked[count]]
            self.result.at_most("importance", float((last - next_one) / last))
        stays = torch.ones(len(self.angles), dtype=torch.bool)
        stays[self.visual[ranked[count:]]] = False
        left = stays.nonzero()[:, 0]
        self.rows = self.rows[stays[: self.prompt_len]]
        kept_angles = self.options.get("prune_positions", "renumber") == "keep"
        self.angles = self.angles[left] if kept_angles else torch.arange(len(left))
        self.cache = [(k[left], v[left]) for k, v in self.cache]
        return left


@torch.inference_mode()
def decode(model: ReferenceModel, prompt: Prompt, options: dict[str, Any], **more: Any) -> Result:
    """A prompt under request options; greedy, low_confidence, without stop."""
    return Decoder(model, prompt, options, **more).run()
