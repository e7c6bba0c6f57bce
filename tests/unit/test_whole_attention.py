"""Attention without the KV cache: against the whole matrix, with masks that are not ours (xformers) as the oracle."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xformers.ops import fmha

from vllm_dvlm.models import whole_attention
from vllm_dvlm.worker.attention_rows import AttentionRows

SCALE = 0.3
# (prompt, canvas, whether the prompt attends to itself alone) of each request.
requests = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7), st.booleans()), min_size=1, max_size=4)


def rows_of(batch):
    lengths = np.array([prompt + canvas for prompt, canvas, _ in batch], dtype=np.int32)
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    apart = np.array([prompt if is_apart else 0 for prompt, _, is_apart in batch], dtype=np.int32)
    return AttentionRows.one_per_request(start, lengths).with_prompts_apart(apart)


def mask_of(batch):
    """Who sees whom, written down token by token."""
    tokens = []
    for request, (prompt, canvas, is_apart) in enumerate(batch):
        tokens += [(request, place, prompt if is_apart else 0) for place in range(prompt + canvas)]
    mask = torch.full((len(tokens), len(tokens)), -math.inf)
    for query, (request, place, prompt) in enumerate(tokens):
        for key, (other, key_place, _) in enumerate(tokens):
            if request == other and (place >= prompt or key_place < prompt):
                mask[query, key] = 0
    return mask


def draw(num, heads, kv_heads, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num, n, size, generator=generator) for n in (heads, kv_heads, kv_heads)]


@settings(max_examples=60, deadline=None)
@given(batch=requests)
def test_rows_are_xformers_blocks(batch):
    """The rows of a step, as xformers understands them, and as they are meant."""
    spans = rows_of(batch).whole_spans()
    mask = whole_attention.gappy_mask(spans)
    num = spans[-1][1]
    assert torch.equal(mask.materialize((num, num)), mask_of(batch))


@pytest.mark.parametrize("is_apart", [True, False])
def test_guidance_rows_are_blocks_as_well(is_apart):
    """A canvas behind the question and the same canvas behind none, as guidance would ask: two sequences that do not
    see each other."""
    first, second = (6, 4), (3, 4)
    ends = [6, 10, 13, 17] if is_apart else [10, 17]
    keys = [0, 0, 10, 10] if is_apart else [0, 10]
    spans = list(zip([0, *ends[:-1]], ends, keys, strict=True))
    mask = whole_attention.gappy_mask(spans).materialize((17, 17))
    assert torch.equal(mask, mask_of([(*first, is_apart), (*second, is_apart)]))


@settings(max_examples=30, deadline=None)
@given(batch=requests, grouped=st.booleans(), subset=st.integers(0, 2**30))
def test_torch_against_the_matrix(batch, grouped, subset):
    spans = rows_of(batch).whole_spans()
    num = spans[-1][1]
    q, k, v = draw(num, 4, 2 if grouped else 4)
    mask = whole_attention.gappy_mask(spans).materialize((num, num))
    expected, sums = whole_attention.reference(q, k, v, mask, SCALE)
    out, lse = whole_attention.with_torch(q, k, v, spans, SCALE, with_lse=True)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, sums.float(), rtol=1e-5, atol=1e-5)
    alone, none = whole_attention.with_torch(q, k, v, spans, SCALE)
    assert none is None and torch.equal(alone, out), "asking for the log-sum-exp changes no bit"
    rows = torch.tensor([i for i in range(num) if subset >> i % 30 & 1], dtype=torch.int64)
    some, none = whole_attention.with_torch(q, k, v, spans, SCALE, rows, with_lse=True)
    assert none is None
    torch.testing.assert_close(some, expected[rows].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_what_xformers_is_given(monkeypatch, kv_heads):
    """Its kernels run on GPUs only; here its own mask, materialised, stands for them."""
    batch = [(5, 3, True), (4, 6, False), (2, 2, True)]
    spans = rows_of(batch).whole_spans()
    num = spans[-1][1]
    q, k, v = draw(num, 4, kv_heads)

    def partial(query, key, value, attn_bias, scale):
        """[1, N, (groups,) heads, D] -> the same, and [1, (groups,) heads, N]."""
        assert query.shape == key.shape == value.shape and query.dim() == (4 if kv_heads == 4 else 5)
        q, k, v = (x[0].movedim(0, -2).double() for x in (query, key, value))
        scores = q @ k.transpose(-1, -2) * scale + attn_bias.materialize((num, num)).double()
        out = (scores.softmax(-1) @ v).movedim(-2, 0)[None]
        return out.float(), scores.logsumexp(-1)[None].float()

    monkeypatch.setattr(fmha, "memory_efficient_attention_partial", partial)
    expected, sums = whole_attention.reference(q, k, v, mask_of(batch), SCALE)
    out, lse = whole_attention.with_xformers(q, k, v, spans, SCALE, with_lse=True)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, sums.float(), rtol=1e-5, atol=1e-5)
    rows = torch.tensor([1, 2, 9])
    some, none = whole_attention.with_xformers(q, k, v, spans, SCALE, rows, with_lse=True)
    assert none is None and torch.equal(some, out[rows])


def test_choice():
    assert whole_attention.choose("auto", "cpu", torch.float32) is whole_attention.with_torch
    assert whole_attention.choose("auto", "cpu", torch.bfloat16) is None
    assert whole_attention.choose("auto", "cuda", torch.float32) is None
    assert whole_attention.choose("vllm", "cpu", torch.float32) is None
    assert whole_attention.choose("xformers", "cuda", torch.bfloat16) is whole_attention.with_xformers
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        whole_attention.choose("xformers", "cpu", torch.float32)


def test_a_missing_xformers_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "xformers.ops", None)
    with pytest.raises(ValueError, match=r"pip install 'vllm-dvlm\[xformers\]'"):
        whole_attention.choose("xformers", "cuda", torch.bfloat16)
