"""Two loops with the same tokens: one as costly as the original code, one without wasted work.

Batch 1. Source: tests/golden/llada_v/README.md, points 17-31 (decoding), 32-37 (RedVTP) and 38-45
(Fast-dLLM hook).
Shapes: T = sequence, D = hidden width, V = vocabulary rows, L = canvas length, R = computed rows.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_dvlm.denoise.confidence import greedy_low_confidence
from vllm_dvlm.reference.model import (
    AttentionProbe,
    ConcatKVCache,
    KVCache,
    Prompt,
    ReferenceModel,
)
from vllm_dvlm.synthetic.checkpoint_files import Ids

PUBLISHED = Ids()
MASK_ID, EOT_ID, FORBIDDEN_IDS = PUBLISHED.mask, PUBLISHED.end_of_turn, PUBLISHED.forbidden


@dataclass(frozen=True)
class LoopOptions:
    """Settings of one generation, named as the request options; temperature 0, low_confidence."""

    canvas_length: int
    max_steps: int
    block_length: int
    refresh_interval: int = 1  # 1: every step recomputes everything, no cache
    threshold: float | None = None
    suffix_ids: tuple[int, ...] = ()
    cfg_scale: float = 0.0
    prune_keep_ratio: float | None = None  # RedVTP; None: off
    stop_ids: tuple[int, ...] = (EOT_ID,)
    forbidden_ids: tuple[int, ...] = FORBIDDEN_IDS
    mask_id: int = MASK_ID

    def __post_init__(self):
        if self.canvas_length % self.block_length:
            raise ValueError("block_length must divide canvas_length.")
        if self.max_steps % self.num_blocks:
            raise ValueError("max_steps must be a multiple of the number of blocks.")
        cached = self.refresh_interval > 1 or self.threshold is not None
        if cached and (self.cfg_scale or self.prune_keep_ratio is not None):
            raise ValueError("The original hook has neither guidance nor pruning (points 38 and 46).")
        if self.cfg_scale and self.prune_keep_ratio is not None:
            raise ValueError("Guidance and pruning do not go together in the original code (point 46).")

    @property
    def num_blocks(self) -> int:
        return self.canvas_length // self.block_length


@dataclass
class LoopResult:
    """Tokens and trace; `steps` has the golden files' fields that do not need a margin."""

    final_ids: list[int] = field(default_factory=list)  # stop token excluded, suffix included
    stopped_at: int | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    forward_shapes: list[list[int]] = field(default_factory=list)  # [batch, length] of each forward
    importance: torch.Tensor | None = None  # [visual tokens] float32
    kept_local_indices: list[int] | None = None


def num_unmasked_per_step(num_masked: int, num_steps: int) -> list[int]:
    """How many positions each step of a block commits (point 20)."""
    each, more = divmod(num_masked, num_steps)
    return [each + (i < more) for i in range(num_steps)]


def num_passing(confidences: list[float], num_open: int, factor: float) -> int:
    """How many of the most confident positions the threshold rule names (points 43 and 44).

    `confidences` of the candidates, descending; `num_open` counts candidates and masked positions
    out of bounds.
    """
    count = 1
    while count < len(confidences) and confidences[count] >= 1 - factor / (count + 2):
        count += 1
    return num_open if count == num_open - 1 else count


class _Sequence:
    """Embeddings of prompt, canvas and suffix, and how to predict tokens from them."""

    def __init__(self, model: ReferenceModel, prompt: Prompt, options: LoopOptions):
        self.model, self.options = model, options
        self.mask_embedding = model.embed([options.mask_id])  # [1, D]
        canvas = self.mask_embedding.expand(options.canvas_length, -1)
        suffix = model.embed(list(options.suffix_ids))
        if ((prompt.embeddings - self.mask_embedding).abs() < 1e-5).all(-1).any():
            raise ValueError("A mask token in the prompt is filled by the original; not covered here.")
        self.x = torch.cat([prompt.embeddings, canvas, suffix])[None]  # [1, T, D]
        self.prompt_len = len(prompt.embeddings)
        self.cache: KVCache | None = None
        self.result = LoopResult()

    def forward(self, start: int, probe: AttentionProbe | None) -> torch.Tensor:
        """Hidden states [batch, T - start, D] from `start` on; batch 2 with guidance."""
        x = self.x[:, start:]
        if self.options.cfg_scale:
            blind = x.clone()
            blind[:, : self.prompt_len] = self.mask_embedding
            x = torch.cat([x, blind])
        self.result.forward_shapes.append(list(x.shape[:2]))
        return self.model.text.forward(x, start, self.cache, probe)

    def guided_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, V] float32 of hidden states [batch, R, D] (point 23)."""
        logits = self.model.text.logits(hidden)
        if not self.options.cfg_scale:
            return logits[0]
        return logits[1] + (self.options.cfg_scale + 1) * (logits[0] - logits[1])

    def canvas_slice(self) -> slice:
        return slice(self.prompt_len, self.prompt_len + self.options.canvas_length)

    def drop(self, positions: torch.Tensor) -> None:
        """Remove prompt positions; what follows closes up (point 35)."""
        keep = torch.ones(self.x.shape[1], dtype=torch.bool)
        keep[positions] = False
        self.x = self.x[:, keep]
        self.prompt_len -= len(positions)


class _OfficialSequence(_Sequence):
    """Whole-vocabulary logits and float64 softmax of every row (points 19, 22 and 25).

    Masks are found by comparing embeddings, as the original does.
    """

    whole_matrix, cache_type = True, ConcatKVCache

    def __init__(self, model, prompt, options, chunk_rows: int | None):
        super().__init__(model, prompt, options)
        self.chunk_rows = chunk_rows

    def predict(self, start: int, rows: torch.Tensor, probe: AttentionProbe | None):
        """Tokens [L] int64 and confidences [L] float64; every row is computed, not just `rows`."""
        is_masked = ((self.x[0, start:] - self.mask_embedding).abs() < 1e-5).all(-1)
        hidden = self.forward(start, probe)
        length = hidden.shape[1]
        chunk = self.chunk_rows or length
        tokens = torch.zeros(length, dtype=torch.long)
        confidence = torch.zeros(length, dtype=torch.float64)
        for low in range(0, length, chunk):
            part = slice(low, min(low + chunk, length))
            logits = self.guided_logits(hidden[:, part])
            for token in self.options.forbidden_ids:
                logits[is_masked[part], token] = -torch.inf
            tokens[part] = logits.argmax(-1)
            weights = logits.double().softmax(-1)
            confidence[part] = weights.gather(-1, tokens[part, None])[:, 0]
        return self._on_canvas(start, tokens), self._on_canvas(start, confidence)

    def _on_canvas(self, start: int, values: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros(self.x.shape[1], dtype=values.dtype)
        whole[start:] = values
        return whole[self.canvas_slice()]

    def write(self, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        """Commit tokens [L] at `positions`; the whole sequence is rebuilt, as in the original."""
        chosen = torch.zeros(self.x.shape[1], dtype=torch.bool)
        chosen[self.prompt_len + positions] = True
        proposal = torch.zeros(self.x.shape[1], dtype=torch.long)
        proposal[self.canvas_slice()] = tokens
        self.x = torch.where(chosen[None, :, None], self.model.embed(proposal)[None], self.x)


class _LeanSequence(_Sequence):
    """Logits of the rows that can be committed, float32 throughout, updates in place.

    The logits are made in chunks that stay in the cache and reduced by the engine's own fast function, so that the
    engine's lead over this loop, if any, does not come from there.
    """

    whole_matrix, cache_type = False, KVCache
    # Measured best of 1 to 1,000 MiB: beyond 32 MiB glibc returns every block to the system at once.
    chunk_bytes = 32 * 2**20

    def predict(self, start: int, rows: torch.Tensor, probe: AttentionProbe | None):
        """Tokens [L] int64 and confidences [L] float64, meaningful at canvas positions `rows`."""
        hidden = self.forward(start, probe)
        tokens = torch.zeros(self.options.canvas_length, dtype=torch.long)
        confidence = torch.zeros(self.options.canvas_length, dtype=torch.float64)
        chunk = max(1, self.chunk_bytes // (4 * len(self.model.text.head)))
        for part in rows.split(chunk):
            logits = self.guided_logits(hidden[:, self.prompt_len - start + part])
            logits[:, list(self.options.forbidden_ids)] = -torch.inf
            tokens[part], confidence[part] = greedy_low_confidence(logits)
        return tokens, confidence

    def write(self, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        self.x[0, self.prompt_len + positions] = self.model.embed(tokens[positions])


def _choose(
    confidence: torch.Tensor,
    candidates: torch.Tensor,
    is_open: torch.Tensor,
    options,
    scheduled: int,
):
    """(positions to commit ascending, size of the top-k); all masks are [L] bool."""
    order = torch.where(candidates, confidence, -torch.inf).argsort(descending=True, stable=True)
    num_candidates = int(candidates.sum())
    count = scheduled
    if options.threshold is not None:
        ranked = confidence[order[:num_candidates]].tolist()
        count = num_passing(ranked, int(is_open.sum()), options.threshold)
    # A larger count names positions out of bounds. The original leaves to the tie order of its
    # top-k whether it writes one of them (points 27 and 44); in no recorded run it does (g11, last
    # step).
    return order[: min(count, num_candidates)].sort().values, count


def _prune(sequence: _Sequence, probe: AttentionProbe, rows: torch.Tensor) -> None:
    """RedVTP: drop all but the visual tokens that these canvas rows, masked and not committed, look at (33-36)."""
    importance = probe.attention()[rows].mean(0)  # [N]
    num_visual = len(importance)
    num_kept = max(1, int(num_visual * sequence.options.prune_keep_ratio))
    kept = importance.argsort(descending=True, stable=True)[:num_kept].sort().values
    is_dropped = torch.ones(num_visual, dtype=torch.bool)
    is_dropped[kept] = False
    sequence.drop(probe.columns[is_dropped])
    sequence.result.importance, sequence.result.kept_local_indices = importance, kept.tolist()


class _Decoder:
    """Control flow that both loops share: blocks, schedule, candidates, stop, pruning."""

    def __init__(self, sequence: _Sequence, prompt: Prompt, options: LoopOptions):
        self.sequence, self.options = sequence, options
        self.canvas = torch.full((options.canvas_length,), options.mask_id)
        self.index = torch.arange(options.canvas_length)
        self.stop: int | None = None
        visual = [torch.arange(*span) for span in prompt.visual_spans]
        self.visual = torch.cat(visual) if visual and options.prune_keep_ratio is not None else None

    def run(self) -> LoopResult:
        for start in range(0, self.options.canvas_length, self.options.block_length):
            if self.stop is None or start < self.stop:
                self._block(start, start + self.options.block_length)
        result = self.sequence.result
        result.stopped_at = self.stop
        result.final_ids = self.canvas[: self.stop].tolist() + list(self.options.suffix_ids)
        return result

    def _block(self, start: int, end: int) -> None:
        options = self.options
        num_steps = options.max_steps // options.num_blocks
        num_masked = int((self.canvas[start:end] == options.mask_id).sum())
        schedule = num_unmasked_per_step(num_masked, num_steps)
        for i in itertools.count():
            is_masked = self.canvas == options.mask_id
            if not is_masked[: self.stop].any() or not is_masked[start:end].any():
                return
            if options.threshold is None:
                if i == num_steps:
                    return
                self._step(start, end, i, schedule[i])
                continue
            if i > 2 * options.block_length + options.refresh_interval:
                raise RuntimeError("The mask token is predicted again and again (point 45).")
            self._step(start, end, i, 0)

    def _step(self, start: int, end: int, i: int, scheduled: int) -> None:
        options, sequence = self.options, self.sequence
        refresh = i % options.refresh_interval == 0
        if refresh and options.refresh_interval > 1:
            sequence.cache = sequence.cache_type()
        is_open = (self.canvas == options.mask_id) & (self.index >= (0 if refresh else start))
        candidates = is_open & (self.index < (end if self.stop is None else self.stop))
        rows = candidates.nonzero()[:, 0]
        probe = None
        if self.visual is not None and not sequence.result.steps:
            probe = AttentionProbe(sequence.canvas_slice(), self.visual, sequence.whole_matrix)
        first = 0 if refresh else sequence.prompt_len + start
        tokens, confidence = sequence.predict(first, rows, probe)
        positions, k = _choose(confidence, candidates, is_open, options, scheduled)
        self.canvas[positions] = tokens[positions]
        sequence.write(positions, tokens)
        self._record(positions, confidence, k, len(rows))
        self._find_stop()
        # A row at which the mask token was committed is still masked, but the released code does not count it.
        untouched = self.canvas == options.mask_id
        untouched[positions] = False
        if probe is not None and untouched.any():
            _prune(sequence, probe, untouched)

    def _record(self, positions: torch.Tensor, confidence: torch.Tensor, k: int, num_candidates: int) -> None:
        result = self.sequence.result
        batch, length = result.forward_shapes[-1]
        result.steps.append(
            {
                "step": len(result.steps),
                "pos": positions.tolist(),
                "ids": self.canvas[positions].tolist(),
                "conf": confidence[positions].tolist(),
                "k": k,
                "candidates": num_candidates,
                "forward_len": length,
                "forward_batch": batch,
            }
        )

    def _find_stop(self) -> None:
        hits = [i for i, token in enumerate(self.canvas.tolist()) if token in self.options.stop_ids]
        if hits and (self.stop is None or hits[0] < self.stop):
            self.stop = hits[0]


@torch.inference_mode()
def official_loop(
    model: ReferenceModel, prompt: Prompt, options: LoopOptions, chunk_rows: int | None = None
) -> LoopResult:
    """Decode at the cost of the original code.

    Each step computes logits of every processed position over the whole vocabulary and a float64
    softmax of all of them; pruning computes whole attention matrices. `chunk_rows` bounds memory
    (20 bytes per position and vocabulary row) without changing the arithmetic; the original has no
    such bound.
    """
    sequence = _OfficialSequence(model, prompt, options, chunk_rows)
    return _Decoder(sequence, prompt, options).run()


@torch.inference_mode()
def lean_loop(model: ReferenceModel, prompt: Prompt, options: LoopOptions) -> LoopResult:
    """Decode with the least work that gives the same tokens in plain PyTorch: a strong baseline."""
    return _Decoder(_LeanSequence(model, prompt, options), prompt, options).run()
