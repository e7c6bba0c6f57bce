"""Attention to columns without the attention matrix, against the matrix."""

import pytest
import torch

from vllm_dvlm.models.probe import attention_to_columns, attention_to_columns_reference

# R query rows, T tokens, H query heads, KV heads, D head size.
SHAPES = [(1, 5, 1, 1, 8), (16, 300, 4, 4, 16), (16, 300, 8, 2, 16), (33, 257, 6, 1, 32), (7, 64, 5, 5, 80)]
SPANS = {
    "one image": [(3, 40)],
    "several images": [(0, 9), (9, 20), (31, 50)],
    "first and last token": [(0, 1), (-1, None)],
    "everything": [(0, None)],
}


def make(shape, seed=0, size=1.5):
    rows, tokens, heads, kv_heads, width = shape
    generator = torch.Generator().manual_seed(seed)
    query = size * torch.randn(rows, heads, width, generator=generator)
    key = size * torch.randn(tokens, kv_heads, width, generator=generator)
    return query, key, width**-0.5


def columns_of(spans, tokens):
    return torch.cat([torch.arange(tokens)[slice(*span)] for span in spans]).unique()


def assert_close(found, expected):
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.max()))


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_matrix(shape, spans):
    query, key, scale = make(shape)
    columns = columns_of(spans, shape[1])
    out = torch.zeros(shape[0], len(columns))
    attention_to_columns(query, key, scale, columns, out)
    assert_close(out, attention_to_columns_reference(query, key, scale, columns))


def test_relative_accuracy_of_small_probabilities():
    """Importance lies close together near the cut, so small values count, too."""
    query, key, scale = make((16, 300, 4, 4, 16))
    columns = torch.arange(300)
    out = torch.zeros(16, 300)
    attention_to_columns(query, key, scale, columns, out)
    expected = attention_to_columns_reference(query, key, scale, columns)
    assert torch.allclose(out, expected, rtol=1e-5, atol=0)
    assert torch.allclose(out.sum(1), torch.full((16,), 4.0))  # all columns of four heads


def test_scores_of_one_head_at_a_time(monkeypatch):
    """What is alive at once does not grow with the number of heads; grouped KV heads find their own keys."""
    query, key, scale = make((16, 300, 8, 2, 16))
    columns = columns_of(SPANS["several images"], 300)
    out, shapes = torch.zeros(16, len(columns)), []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: shapes.append(tuple(x.shape)) or softmax(x, dim))
    attention_to_columns(query, key, scale, columns, out)
    monkeypatch.undo()
    assert shapes == [(16, 300)] * 8
    assert_close(out, attention_to_columns_reference(query, key, scale, columns))


def test_large_scores_do_not_overflow():
    query, key, scale = make((4, 50, 2, 2, 16), size=60.0)
    out = torch.zeros(4, 50)
    attention_to_columns(query, key, scale, torch.arange(50), out)
    assert out.isfinite().all()
    assert (out - attention_to_columns_reference(query, key, scale, torch.arange(50))).abs().max() < 1e-3


def test_it_adds_to_what_is_there():
    query, key, scale = make((3, 20, 2, 1, 8))
    columns = torch.tensor([19, 4, 4])  # any order, also twice
    out = torch.full((3, 3), 7.0)
    before = (query.clone(), key.clone())
    attention_to_columns(query, key, scale, columns, out)
    assert_close(out - 7, attention_to_columns_reference(query, key, scale, columns))
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])
    assert torch.equal(out[:, 1], out[:, 2])
