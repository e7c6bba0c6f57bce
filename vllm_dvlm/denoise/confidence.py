"""Logits to (token, confidence) per canvas position.

Source: golden README points 24 and 25; the temperature rule is LLaDA's Gumbel-max trick in float64. The confidences of
kept logits: golden README of LaViDa, "LaViDa-Dream".

Shapes: N = rows (masked canvas positions), V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vllm_dvlm.denoise.noise import uniform

# Columns of a row's noise (``noise.uniform``): one for its confidence, then one for each word.
_FOR_CONFIDENCE, _FIRST_WORD = 0, 1


def forbid(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Set the logits of ``token_ids`` ([K] int64) to -inf, in place. logits: [N, V] float."""
    return logits.index_fill_(1, token_ids, float("-inf"))


def choose_tokens(logits: torch.Tensor, temperature: float, keys: torch.Tensor | None = None) -> torch.Tensor:
    """Token per row: argmax at temperature 0, else Gumbel-max with float64 noise.

    Args:
        logits: [N, V] float32, forbidden tokens already at -inf.
        temperature: >= 0.
        keys: [N] int64 of the rows' noise (``noise.row_keys``); not read at temperature 0.

    Returns:
        [N] int64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    num_rows, num_words = logits.shape
    # On a CPU the noise of a few rows stays in the cache; a GPU takes all at once.
    size = max(1, _CPU_NOISE // num_words) if logits.is_cpu else num_rows
    parts = zip(logits.split(size), keys.split(size), strict=True)
    return torch.cat([_with_noise(part, temperature, own).argmax(dim=-1) for part, own in parts])


# Numbers drawn at once on a CPU: 2 MiB of float64.
_CPU_NOISE = 2**18


def _with_noise(logits: torch.Tensor, temperature: float, keys: torch.Tensor) -> torch.Tensor:
    """exp(l) / (-log u)^T and l - T log(-log u) have the same argmax; the latter, here, cannot overflow. Float64."""
    noise = uniform(keys, _FIRST_WORD, logits.shape[1]).log_().neg_().log_()
    return noise.mul_(-temperature).add_(logits)


def low_confidence(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Softmax probability of the chosen token, in float64. [N, V], [N] -> [N] float64."""
    wide = logits.double()
    chosen = wide.gather(1, tokens[:, None])[:, 0]
    return torch.exp(chosen - torch.logsumexp(wide, dim=-1))


def greedy_low_confidence(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Argmax and its softmax probability in three passes over the row; destroys ``logits``.

    Twin: ``choose_tokens`` and ``low_confidence``, five times slower on a CPU.

    Args:
        logits: [N, V] float32 contiguous, forbidden tokens at -inf.

    Returns:
        ([N] int64, [N] float64).
    """
    tokens, _, rest = greedy_parts(logits)
    return tokens, 1 / (1 + rest.double())


def greedy_parts(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Argmax, its logit, and the sum of exp(l - max) over the other tokens; destroys ``logits``.

    Leaving the 1 of the best token out of the float32 sum keeps the relative precision of 1 - p, so rows that are
    nearly certain still rank as in float64.

    Args:
        logits: [N, V] float32 contiguous, forbidden tokens at -inf.

    Returns:
        ([N] int64, [N] float32, [N] float32); the last is nan where every token is forbidden.
    """
    tokens = _argmax(logits)
    column = tokens[:, None]
    best = logits.gather(1, column)
    logits.sub_(best).exp_().scatter_(1, column, 0.0)
    return tokens, best[:, 0], logits.sum(dim=1)


def join_parts(tokens: torch.Tensor, best: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``greedy_low_confidence`` of a vocabulary that S ranks hold a part each of.

    Args:
        tokens: [S, N] ids in the whole vocabulary.
        best, rest: [S, N] float64 of ``greedy_parts``.

    Returns:
        ([N] int64, [N] float64). Of equal logits the lowest id wins, as argmax has it.
    """
    top = best.amax(dim=0)
    is_top = best == top
    token = torch.where(is_top, tokens, torch.inf).amin(dim=0)
    # Of the part that has the winner, all but the winner.
    own = (tokens == token) & is_top
    weight = torch.exp(best - top)
    # A part whose every token is forbidden adds nothing.
    others = torch.where(best.isneginf(), 0.0, torch.where(own, rest, weight * (1 + rest)))
    return token.long(), 1 / (1 + others.sum(dim=0))


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """numpy's is vectorised, torch's on the CPU is not (0.03 against 0.3 ms for 126k tokens). [N, V] -> [N]"""
    return torch.from_numpy(np.argmax(logits.numpy(), axis=1)) if logits.is_cpu else logits.argmax(dim=1)


def entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Negative entropy of the distribution: surer is higher. [N, V], [N] -> [N] float64, at most 0.

    LaViDa adds 1e-10 to p before the logarithm, which changes a row by at most V * 1e-10: 1.3e-5 of 126k tokens.
    """
    log_p = torch.log_softmax(logits.double(), dim=-1)
    return torch.special.xlogy(p := log_p.exp(), p).sum(dim=-1)


def margin(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Probability of the best token minus that of the second best. [N, V], [N] -> [N] float64."""
    wide = logits.double()
    top = wide.topk(2, dim=-1).values
    return torch.exp(top - torch.logsumexp(wide, dim=-1, keepdim=True)).diff(dim=-1).neg()[:, 0]


def random_confidence(keys: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in (0, 1): the ``random`` remasking. keys: [N] (``noise.row_keys``). Returns [N] float64."""
    return uniform(keys, _FOR_CONFIDENCE, 1)[:, 0]


# ``random`` is not here: it needs no logits (see ``random_confidence``).
CONFIDENCE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "low_confidence": low_confidence,
    "entropy": entropy,
    "margin": margin,
}


def keep_top(logits: torch.Tensor, top_k: int | None, top_p: float | None = None) -> torch.Tensor:
    """Set all but the likeliest logits to -inf, in place. [N, V] float32.

    Args:
        top_k: how many stay, and whatever equals the last of them; None: all.
        top_p: only the likeliest that reach this probability together stay, and always the first; None or 1: all.
    """
    if top_p is not None and top_p < 1:
        values, order = logits.sort(dim=-1, descending=True, stable=True)
        before = values.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0
        logits.scatter_(1, order, values.masked_fill_(before > top_p, float("-inf")))
    if top_k is not None and top_k < logits.shape[1]:
        last = logits.topk(top_k, dim=-1).values[:, -1:]
        logits.masked_fill_(logits < last, float("-inf"))
    return logits


def kept_low_confidence(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Probability of the chosen token among the kept ones. [N, V], [N] -> [N] float32."""
    return torch.exp(logits.gather(1, tokens[:, None])[:, 0] - torch.logsumexp(logits, dim=-1))


def kept_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sum of p * log(p + 1e-10): surer is higher. [N, V], [N] -> [N] float32."""
    p = logits.softmax(dim=-1)
    return (p * torch.log(p + 1e-10)).sum(dim=-1)


def kept_margin(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Probability of the best kept token minus that of the second best. [N, V], [N] -> [N] float32."""
    top = logits.topk(2, dim=-1).values
    return torch.exp(top - torch.logsumexp(logits, dim=-1, keepdim=True)).diff(dim=-1).neg()[:, 0]


# The same remaskings in float32, over logits that `keep_top` has been through.
KEPT_CONFIDENCE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "low_confidence": kept_low_confidence,
    "entropy": kept_entropy,
    "margin": kept_margin,
}


def choose_kept(
    logits: torch.Tensor,
    name: str,
    temperature: float = 0,
    top_k: int | None = None,
    top_p: float | None = None,
    keys: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token per row and its confidence among the kept logits, of one temperature; destroys ``logits``.

    Args:
        logits: [N, V] float32 contiguous.
        name: a remasking of ``KEPT_CONFIDENCE``.
        temperature: divides the logits before any is dropped; 0: argmax.
        top_k, top_p: see ``keep_top``.
        keys: see ``choose_tokens``.

    Returns:
        ([N] int64, [N] float32).
    """
    if temperature == 0 and top_k is not None and top_p in (None, 1):
        return greedy_kept(logits, top_k, name)
    kept = keep_top(logits if temperature == 0 else logits.div_(temperature), top_k, top_p)
    tokens = choose_tokens(kept, float(temperature > 0), keys)
    return tokens, KEPT_CONFIDENCE[name](kept, tokens)


def greedy_kept(logits: torch.Tensor, top_k: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Argmax and its confidence among the `top_k` kept logits, from these alone: no softmax of the whole row.

    Twin: ``keep_top`` and ``KEPT_CONFIDENCE[name]``, three times slower on a CPU.

    Args:
        logits: [N, V] float32 contiguous.

    Returns:
        ([N] int64, [N] float32).
    """
    values = logits.topk(min(top_k, logits.shape[1]), dim=-1).values  # [N, top_k], the best first
    last = values[:, -1:]
    # Logits that equal the last one stay as well; of bfloat16 models there often are some.
    if logits.is_cpu:
        at_last = torch.from_numpy(np.count_nonzero(logits.numpy() == last.numpy(), axis=1))
    else:
        at_last = (logits == last).sum(dim=1)
    num_more = at_last - (values == last).sum(dim=1)  # [N]
    weights = torch.exp(values - values[:, :1])
    p = weights / (weights.sum(dim=1) + num_more * weights[:, -1])[:, None]
    if name == "low_confidence":
        confidence = p[:, 0]
    elif name == "margin":
        second = p[:, 1] if p.shape[1] > 1 else torch.where(num_more > 0, p[:, 0], 0.0)
        confidence = p[:, 0] - second
    else:
        terms = p * torch.log(p + 1e-10)
        confidence = terms.sum(dim=1) + num_more * terms[:, -1]
    return _argmax(logits), confidence
