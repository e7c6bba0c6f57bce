"""From logits to token and confidence: every row of the table of confidences, and the fast twin."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dvlm.denoise import confidence as c
from vllm_dvlm.denoise.noise import row_keys, uniform
from vllm_dvlm.options import REMASKING

NUM_WORDS = 9


def plain_softmax(row):
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / sum(weights) for w in weights]


# Name -> confidence of token t given the probabilities p of a row, in plain Python.
PLAIN = {
    "low_confidence": lambda p, t: p[t],
    "entropy": lambda p, t: sum(x * math.log(x) for x in p if x > 0),
    "margin": lambda p, t: sorted(p)[-1] - sorted(p)[-2],
}

rows = st.lists(st.lists(st.floats(-30, 30, width=32), min_size=NUM_WORDS, max_size=NUM_WORDS), min_size=1, max_size=5)


def test_every_remasking_has_a_confidence():
    assert {*c.CONFIDENCE, "random"} == set(REMASKING)
    assert set(PLAIN) == set(c.CONFIDENCE) == set(c.KEPT_CONFIDENCE)


@pytest.mark.parametrize("name", c.CONFIDENCE)
@settings(max_examples=50, deadline=None)
@given(rows=rows)
def test_confidence(name, rows):
    logits = torch.tensor(rows)
    c.forbid(logits, torch.tensor([1, 4]))
    tokens = c.choose_tokens(logits, 0)
    got = c.CONFIDENCE[name](logits, tokens)
    assert got.dtype == torch.float64
    for row, token, value in zip(logits.tolist(), tokens.tolist(), got.tolist(), strict=True):
        assert token not in (1, 4)
        assert token == row.index(max(row)), "ties go to the left"
        assert value == pytest.approx(PLAIN[name](plain_softmax(row), token), abs=1e-12)


@pytest.mark.parametrize("name", c.CONFIDENCE)
def test_a_sure_row_beats_an_unsure_one(name):
    logits = torch.tensor([[0.0, 0.0, 0.1], [9.0, 0.0, 0.0], [2.0, 1.0, 0.0]])
    got = c.CONFIDENCE[name](logits, c.choose_tokens(logits, 0))
    assert got.argsort(descending=True).tolist() == [1, 2, 0]


@settings(max_examples=100, deadline=None)
@given(rows=rows)
def test_fast_twin(rows):
    logits = c.forbid(torch.tensor(rows), torch.tensor([0]))
    tokens = c.choose_tokens(logits, 0)
    expected = c.low_confidence(logits, tokens)
    got_tokens, got = c.greedy_low_confidence(logits.clone())
    assert got_tokens.tolist() == tokens.tolist()
    assert got.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_fast_twin_ranks_rows_that_are_nearly_certain():
    """In float32 both probabilities round to 1; their distances to 1 still differ."""
    logits = torch.tensor([[20.0, 1.0, 0.0], [20.0, 0.0, 0.0]])
    _, got = c.greedy_low_confidence(logits)
    assert got[0] < got[1] < 1
    assert (1 - got).tolist() == pytest.approx([(1 + math.e) * math.exp(-20), 2 * math.exp(-20)], rel=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_noise_draws_from_the_tempered_distribution(temperature):
    """Gumbel noise scaled by T draws token i with probability proportional to exp(l_i / T)."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, -1)
    tokens = c.choose_tokens(logits, temperature, row_keys(0, 0, torch.arange(4000)))
    expected = (logits[0].double() / temperature).softmax(-1)
    counts = torch.bincount(tokens, minlength=4) / len(tokens)
    assert counts.tolist() == pytest.approx(expected.tolist(), abs=0.03)  # four standard deviations


def test_noise_is_the_same_in_other_chunks_and_orders(monkeypatch):
    logits = torch.randn(6, NUM_WORDS, generator=torch.Generator().manual_seed(1))
    keys = row_keys(5, 2, torch.arange(6))
    whole = c.choose_tokens(logits, 1.0, keys)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    parts = zip(logits[order].split([1, 3, 2]), keys[order].split([1, 3, 2]), strict=True)
    assert torch.equal(torch.cat([c.choose_tokens(part, 1.0, own) for part, own in parts]), whole[order])
    monkeypatch.setattr(c, "_CPU_NOISE", 1)  # row by row
    assert torch.equal(c.choose_tokens(logits, 1.0, keys), whole)


def test_noise_depends_on_seed_step_and_position():
    logits = torch.zeros(40, NUM_WORDS)
    positions = torch.arange(40)
    drawn = [c.choose_tokens(logits, 1.0, row_keys(*key, positions)) for key in ((5, 0), (6, 0), (5, 1))]
    drawn.append(c.choose_tokens(logits, 1.0, row_keys(5, 0, positions + 40)))
    assert len({tuple(tokens.tolist()) for tokens in drawn}) == 4
    assert len(set(drawn[0].tolist())) > 5  # rows differ, too


def test_noise_never_draws_a_forbidden_token():
    logits = c.forbid(torch.zeros(500, 3), torch.tensor([1]))
    assert set(c.choose_tokens(logits, 5.0, row_keys(0, 0, torch.arange(500))).tolist()) == {0, 2}


def test_random_confidence_is_apart_from_the_words_noise():
    keys = row_keys(1, 0, torch.arange(5))
    drawn = c.random_confidence(keys)
    assert torch.equal(drawn, c.random_confidence(keys)) and len(set(drawn.tolist())) == 5
    assert not torch.equal(drawn, c.random_confidence(row_keys(2, 0, torch.arange(5))))
    assert not set(drawn.tolist()) & set(uniform(keys, c._FIRST_WORD, NUM_WORDS).flatten().tolist())
    assert drawn.dtype == torch.float64 and bool(((drawn > 0) & (drawn < 1)).all())


@given(rows=rows, num_parts=st.integers(1, NUM_WORDS))
def test_parts_of_a_vocabulary(rows, num_parts):
    """Whatever the cut, also one with parts in which every token is forbidden."""
    logits = c.forbid(torch.tensor(rows), torch.tensor([0, 1]))
    expected_tokens, expected = c.greedy_low_confidence(logits.clone())
    found, first = [], 0
    for part in logits.tensor_split(num_parts, dim=1):
        if not part.shape[1]:
            continue
        tokens, best, rest = c.greedy_parts(part.clone())
        found.append(torch.stack([(tokens + first).double(), best.double(), rest.double()]))
        first += part.shape[1]
    tokens, confidence = c.join_parts(*torch.stack(found).unbind(1))
    assert torch.equal(tokens, expected_tokens)
    assert confidence.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_of_equal_logits_in_two_parts_the_first_wins():
    best = torch.tensor([[2.0], [2.0]], dtype=torch.float64)
    tokens, confidence = c.join_parts(torch.tensor([[3.0], [9.0]]).double(), best, torch.zeros(2, 1).double())
    assert tokens.tolist() == [3] and confidence.tolist() == [0.5]


def plain_kept(row, top_k, top_p):
    """Indices that stay, in plain Python."""
    order = sorted(range(len(row)), key=lambda i: -row[i])
    p, stay, total = plain_softmax(row), [], 0.0
    for i in order:
        if stay and total > top_p:
            break
        stay.append(i)
        total += p[i]
    last = sorted((row[i] for i in stay), reverse=True)[:top_k][-1]
    return [i for i in stay if row[i] >= last]


@pytest.mark.parametrize("name", c.KEPT_CONFIDENCE)
@settings(max_examples=60, deadline=None)
@given(rows=rows, top_k=st.integers(1, NUM_WORDS + 1), top_p=st.sampled_from([0.3, 0.8, 0.95, 1.0]))
def test_confidence_of_kept_logits(name, rows, top_k, top_p):
    logits = torch.tensor(rows)
    tokens = c.choose_tokens(logits, 0)
    kept = c.keep_top(logits.clone(), top_k, top_p)
    got = c.KEPT_CONFIDENCE[name](kept, tokens)
    assert got.dtype == torch.float32
    for row, left, token, value in zip(logits.tolist(), kept.tolist(), tokens.tolist(), got.tolist(), strict=True):
        stay = plain_kept(row, top_k, top_p)
        there = [i for i, x in enumerate(left) if x > -math.inf]
        # A sum that meets top_p in the last place may fall to either side.
        if there != sorted(stay):
            near = [abs(sum(sorted(plain_softmax(row), reverse=True)[:n]) - top_p) for n in range(1, NUM_WORDS)]
            assert min(near) < 1e-5
            stay = there
        p = dict.fromkeys(range(NUM_WORDS), 0.0) | dict(zip(stay, plain_softmax([row[i] for i in stay]), strict=True))
        assert value == pytest.approx(PLAIN[name](list(p.values()), token), abs=2e-5)


def test_ties_with_the_last_kept_logit_stay():
    logits = c.keep_top(torch.tensor([[3.0, 1.0, 2.0, 1.0, 0.0]]), top_k=3)
    assert logits.isfinite().tolist() == [[True, True, True, True, False]]
    assert c.keep_top(torch.tensor([[3.0, 1.0]]), None, None).isfinite().all()


def test_margin_of_one_kept_logit_is_one():
    logits = c.keep_top(torch.tensor([[3.0, 1.0, 2.0]]), top_k=1)
    for name, best in (("low_confidence", 1), ("margin", 1), ("entropy", 0)):
        assert c.KEPT_CONFIDENCE[name](logits, torch.tensor([0])).item() == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0])
def test_entropy_is_the_one_with_a_small_number_added(scale):
    """LaViDa adds 1e-10 inside the logarithm; on its whole vocabulary no row moves by as much as its tolerance."""
    logits = scale * torch.randn(3, 126464, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(-1)
    expected = (p * torch.log(p + 1e-10)).sum(-1)
    difference = expected - c.entropy(logits, logits.argmax(-1))
    assert ((difference >= 0) & (difference < 1.3e-5)).all()


@pytest.mark.parametrize("name", c.KEPT_CONFIDENCE)
@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.integers(-6, 6) | st.floats(-30, 30, width=32), min_size=NUM_WORDS, max_size=NUM_WORDS),
        min_size=1,
        max_size=5,
    ),
    top_k=st.integers(1, NUM_WORDS + 1),
)
def test_fast_twin_of_kept_logits(name, rows, top_k):
    """The integers make ties with the last kept logit."""
    logits = torch.tensor(rows, dtype=torch.float32)
    tokens = c.choose_tokens(logits, 0)
    expected = c.KEPT_CONFIDENCE[name](c.keep_top(logits.clone(), top_k), tokens)
    got_tokens, got = c.greedy_kept(logits, top_k, name)
    assert got_tokens.tolist() == tokens.tolist() and got.dtype == torch.float32
    assert got.tolist() == pytest.approx(expected.tolist(), abs=2e-6)
