"""LaViDa's decoding, twice with the same tokens: as costly as the original code, and without wasted work.

Batch 1, temperature 0. Source: tests/golden/lavida/README.md, "Prefix KV cache", "Decoding loop", "LaViDa-Dream" and
"RedVTP fork". RedVTP with a prefix has no original: importance comes from the first forward of the canvas, and the
prompt's rows in the cache are pruned.
Shapes: P = prompt, L = canvas, D = hidden width, V = vocabulary rows, R = computed rows, N = visual tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_dvlm.denoise.confidence import CONFIDENCE, KEPT_CONFIDENCE, greedy_kept, greedy_low_confidence, keep_top
from vllm_dvlm.denoise.schedule import counts_table, grid_table, steps_on_grid, steps_per_block
from vllm_dvlm.reference.lavida_model import LavidaModel, PrefixKVCache, prune_prefix
from vllm_dvlm.reference.model import AttentionProbe, ConcatKVCache, KVCache, Prompt


@dataclass(frozen=True)
class LavidaOptions:
    """Settings of one generation, named as the request options. `top_k` and `top_p` are Dream's."""

    canvas_length: int
    block_length: int | None = None  # None: one block; Dream has no other
    max_steps: int | None = None
    step_ratio: float | None = None
    schedule: str = "uniform"
    schedule_shift: float | None = None
    remasking: str = "low_confidence"
    attention: str = "prefix"  # the prompt sees only itself and is computed once; "full": no cache
    draft: tuple[int, ...] = ()  # start of the canvas; what is not the mask token stays
    top_k: int | None = None
    top_p: float | None = None
    prune_keep_ratio: float | None = None  # RedVTP; None: off
    prune_positions: str = "renumber"  # or "keep": the survivors' rotary positions

    def __post_init__(self):
        if len(self.draft) > self.canvas_length:
            raise ValueError(f"A draft of {len(self.draft)} tokens does not fit a canvas of {self.canvas_length}.")
        if self.remasking not in CONFIDENCE:
            raise ValueError(f"remasking={self.remasking!r} is unknown: use one of {', '.join(CONFIDENCE)}.")
        if self.attention not in ("prefix", "full"):
            raise ValueError(f"attention={self.attention!r} is unknown: use prefix or full.")


@dataclass
class LavidaResult:
    """Tokens and trace; `steps` has the golden files' fields that do not need a margin."""

    final_ids: list[int] = field(default_factory=list)  # the whole canvas
    first_token: int | None = None  # canvas token 0 where the prompt's last row says it
    steps: list[dict[str, Any]] = field(default_factory=list)
    forward_log: list[tuple[int, int]] = field(default_factory=list)  # (query rows, cached rows) of each forward
    importance: torch.Tensor | None = None  # [N] float32
    kept_local_indices: list[int] | None = None


class _Sequence:
    """Prompt and canvas in front of the model: what a forward computes, and what it says about the canvas."""

    # Logits in chunks that stay in the processor's cache, as in loops.py.
    chunk_bytes = 32 * 2**20

    def __init__(self, model: LavidaModel, prompt: Prompt, options: LavidaOptions, lean: bool):
        self.model, self.options, self.lean = model, options, lean
        self.prompt = prompt.embeddings  # [P, D]
        self.prompt_len = self.rotary_start = len(self.prompt)
        self.cache: KVCache | None = None
        self.log: list[tuple[int, int]] = []
        self.first_token: int | None = None
        if options.attention == "prefix":
            self.cache = PrefixKVCache(options.canvas_length) if lean else ConcatKVCache()
            hidden = self._forward(self.prompt, 0)
            if model.shifts_logits:
                self.first_token = int(model.text.logits(hidden[-1:]).argmax())

    def _forward(self, x: torch.Tensor, start: int, probe: AttentionProbe | None = None) -> torch.Tensor:
        self.log.append((len(x), start))
        rotary_start = self.rotary_start if start else 0
        return self.model.text.forward(x[None], start, self.cache, probe, rotary_start)[0]

    def predict(self, canvas: torch.Tensor, rows: torch.Tensor, probe: AttentionProbe | None):
        """Tokens [L] int64 and confidences [L] float64, meaningful at canvas positions `rows`."""
        x, start = self.model.embed(canvas), self.prompt_len
        if self.cache is None:
            x, start = torch.cat([self.prompt, x]), 0
        hidden = self._forward(x, start, probe)
        # Row of the forward that predicts each canvas position; a canvas alone repeats its row 0.
        source = torch.arange(len(canvas)) + self.prompt_len - start
        if self.model.shifts_logits:
            source = (source - 1).clamp(min=0)
        tokens = torch.zeros(len(canvas), dtype=torch.long)
        confidence = torch.zeros(len(canvas), dtype=torch.float64)
        if self.lean:
            tokens[rows], confidence[rows] = self._say(hidden[source[rows]])
        else:  # every row of the forward
            all_tokens, all_confidence = self._say(hidden)
            tokens[:], confidence[:] = all_tokens[source], all_confidence[source]
        return tokens, confidence

    def _say(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [R] and confidences [R] of hidden states [R, D]."""
        chunk = max(1, self.chunk_bytes // (4 * len(self.model.text.head)))
        parts = [self._say_part(self.model.text.logits(part)) for part in hidden.split(chunk)]
        return torch.cat([tokens for tokens, _ in parts]), torch.cat([values.double() for _, values in parts])

    def _say_part(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        name = self.options.remasking
        if self.model.shifts_logits:
            top_k, top_p = self.options.top_k, self.options.top_p
            if self.lean and top_k is not None and top_p is None:
                return greedy_kept(logits, top_k, name)
            tokens = logits.argmax(-1)
            return tokens, KEPT_CONFIDENCE[name](keep_top(logits, top_k, top_p), tokens)
        if self.lean and name == "low_confidence":
            return greedy_low_confidence(logits)
        tokens = logits.argmax(-1)
        return tokens, CONFIDENCE[name](logits, tokens)

    def probe(self, visual: torch.Tensor) -> AttentionProbe:
        """What the canvas pays to prompt positions `visual` [N] in the next forward."""
        first = 0 if self.cache is not None else self.prompt_len
        return AttentionProbe(slice(first, first + self.options.canvas_length), visual, not self.lean)

    def drop(self, positions: torch.Tensor) -> None:
        """Remove prompt positions; without a cache what follows closes up."""
        keep = torch.ones(self.prompt_len, dtype=torch.bool)
        keep[positions] = False
        kept = keep.nonzero()[:, 0]
        renumber = self.options.prune_positions == "renumber"
        if self.cache is None:
            if not renumber:
                raise ValueError("Without a cache the reference closes up: prune_positions=renumber.")
            self.prompt = self.prompt[kept]
        else:
            prune_prefix(self.cache, self.model.text, kept, renumber)
        self.prompt_len = len(kept)
        if renumber:
            self.rotary_start = self.prompt_len


class _Decoder:
    """Control flow of both models: blocks or a time grid, candidates, pruning."""

    def __init__(self, model: LavidaModel, prompt: Prompt, options: LavidaOptions, lean: bool):
        self.mask_id, self.options, self.lean = model.mask_id, options, lean
        self.follows_grid = model.shifts_logits and options.schedule == "uniform"
        self.block_len = options.block_length or options.canvas_length
        if not model.shifts_logits:
            self.num_steps = steps_per_block(
                options.canvas_length, self.block_len, options.max_steps, options.step_ratio
            )
        elif self.block_len == options.canvas_length:
            self.grid, self.num_steps = steps_on_grid(options.canvas_length, options.max_steps, options.step_ratio)
        else:
            raise ValueError("LaViDa-Dream decodes its canvas as one block: leave block_length out.")
        self.canvas = torch.full((options.canvas_length,), self.mask_id)
        self.canvas[: len(options.draft)] = torch.tensor(options.draft, dtype=torch.long)
        self.index = torch.arange(options.canvas_length)
        self.visual = None
        if options.prune_keep_ratio is not None and prompt.visual_spans:
            self.visual = torch.cat([torch.arange(*span) for span in prompt.visual_spans])
        self.result = LavidaResult()
        self.sequence = _Sequence(model, prompt, options, lean)

    def run(self) -> LavidaResult:
        if self.sequence.first_token is not None and self.canvas[0] == self.mask_id:
            self.canvas[0] = self.result.first_token = self.sequence.first_token
        for start in range(0, len(self.canvas), self.block_len):
            self._block(start // self.block_len, start, start + self.block_len)
        self.result.final_ids = self.canvas.tolist()
        self.result.forward_log = self.sequence.log
        return self.result

    def _block(self, block: int, start: int, end: int) -> None:
        options = self.options
        at_start = self._num_masked(start, end)
        for step in range(self.num_steps):
            left = self._num_masked(start, end)
            if left == 0:
                return
            if self.follows_grid:
                count = int(grid_table(self.block_len, self.grid, self.num_steps)[left, step])
            else:
                table = counts_table(self.block_len, self.num_steps, options.schedule, options.schedule_shift)
                count = int(table[at_start, step])
            self._step(block, step, end, count)

    def _num_masked(self, start: int, end: int) -> int:
        return int((self.canvas[start:end] == self.mask_id).sum())

    def _step(self, block: int, step: int, end: int, count: int) -> None:
        candidates = (self.canvas == self.mask_id) & (self.index < end)
        rows = candidates.nonzero()[:, 0]
        positions, values = rows[:0], []
        # A forward that unmasks nothing can be left out, unless it is the one that pruning looks at.
        if count or not self.lean or self.visual is not None:
            probe = None if self.visual is None else self.sequence.probe(self.visual)
            tokens, confidence = self.sequence.predict(self.canvas, rows, probe)
            order = torch.where(candidates, confidence, -torch.inf).argsort(descending=True, stable=True)
            positions = order[: min(count, len(rows))]
            self.canvas[positions] = tokens[positions]
            values = confidence[positions].tolist()
            still_masked = self.canvas == self.mask_id
            if probe is not None and still_masked.any():
                self._prune(probe.attention()[still_masked].mean(0))
        self.result.steps.append(
            {
                "block": block,
                "step": step,
                "k": count,
                "positions": positions.tolist(),
                "tokens": self.canvas[positions].tolist(),
                "confidence": values,
            }
        )

    def _prune(self, importance: torch.Tensor) -> None:
        """RedVTP, once: keep the visual tokens that the canvas positions still masked look at most. [N]"""
        num_kept = max(1, int(len(importance) * self.options.prune_keep_ratio))
        kept = importance.argsort(descending=True, stable=True)[:num_kept].sort().values
        is_dropped = torch.ones(len(importance), dtype=torch.bool)
        is_dropped[kept] = False
        self.sequence.drop(self.visual[is_dropped])
        self.result.importance, self.result.kept_local_indices = importance, kept.tolist()
        self.visual = None


@torch.inference_mode()
def official_loop(model: LavidaModel, prompt: Prompt, options: LavidaOptions) -> LavidaResult:
    """Decode at the cost of the original code: logits and softmax of every row, a joined cache, every step's forward.

    RedVTP's second forward per step, whose result is the first's, is left out.
    """
    return _Decoder(model, prompt, options, lean=False).run()


@torch.inference_mode()
def lean_loop(model: LavidaModel, prompt: Prompt, options: LavidaOptions) -> LavidaResult:
    """Decode with the least work that gives the same tokens in plain PyTorch: a strong baseline."""
    return _Decoder(model, prompt, options, lean=True).run()
