"""Rows of attention: which tokens ask, how many keys they see, and what is left of them behind a layer that prunes."""

import numpy as np

from vllm_dvlm.worker.attention_rows import AttentionRows


def rows(request, query_start, kv_len):
    return AttentionRows(np.array(request), np.array(query_start, np.int32), np.array(kv_len, np.int32))


def test_whole_sequences():
    whole = AttentionRows.one_per_request(np.array([0, 5, 12], np.int32), np.array([5, 7], np.int32))
    assert whole.request.tolist() == [0, 1] and whole.is_one_per_request
    assert whole.whole_spans() == [(0, 5, 0), (5, 12, 5)]
    cached = AttentionRows.one_per_request(np.array([0, 5, 9], np.int32), np.array([5, 7], np.int32))
    assert cached.whole_spans() is None


def test_a_request_of_two_rows():
    """A prompt of 6 tokens that sees itself, a canvas of 4 that sees all, beside a request of one row."""
    split = rows([0, 0, 1], [0, 6, 10, 13], [6, 10, 3])
    assert split.query_len.tolist() == [6, 4, 3]
    assert not split.is_one_per_request
    # The canvas has more keys than queries, but all of them belong to tokens of this pass.
    assert split.whole_spans() == [(0, 6, 0), (6, 10, 0), (10, 13, 10)]
    assert rows([0, 0], [0, 6, 10], [7, 11]).whole_spans() is None  # one key is in the KV cache alone
    assert split.first_rows.tolist() == [0, 2]
    whole = AttentionRows.one_per_request(np.array([0, 10, 13], np.int32), np.array([10, 3], np.int32))
    apart = whole.with_prompts_apart(np.array([6, 0], np.int32))
    for name in ("request", "query_start", "kv_len"):
        assert getattr(apart, name).tolist() == getattr(split, name).tolist(), name
    assert apart.query_start.dtype == apart.kv_len.dtype == np.int32


def test_a_request_of_two_rows_is_shortened():
    """The prompt of 6 loses 2: the canvas moves up, sees fewer keys, and its KV lies right behind the prompt's."""
    split = rows([0, 0, 1], [0, 6, 10, 13], [6, 10, 3])
    after, tokens = split.shortened(np.array([2, 0], np.int32))
    assert after.query_start.tolist() == [0, 4, 8, 11] and after.kv_len.tolist() == [4, 8, 3]
    assert tokens.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12]
    assert after.whole_spans() == [(0, 4, 0), (4, 8, 0), (8, 11, 8)]


def test_shortened():
    """The first request loses 3 of 5 tokens: the second moves up, both use their own first KV slots."""
    before = AttentionRows.one_per_request(np.array([0, 5, 12], np.int32), np.array([5, 7], np.int32))
    after, tokens = before.shortened(np.array([3, 0], np.int32))
    assert after.query_start.tolist() == [0, 2, 9] and after.kv_len.tolist() == [2, 7]
    assert after.query_start.dtype == after.kv_len.dtype == np.int32
    assert tokens.tolist() == [0, 1, 5, 6, 7, 8, 9, 10, 11]
    assert after.whole_spans() == [(0, 2, 0), (2, 9, 2)]
    untouched, tokens = before.shortened(np.zeros(2, np.int32))
    assert untouched.query_start.tolist() == [0, 5, 12] and tokens.tolist() == list(range(12))
