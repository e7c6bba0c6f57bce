"""Rows of attention: which tokens ask, how many keys they see, and what is left of them behind a layer that prunes."""

import numpy as np

from vllm_dvlm.worker.attention_rows import AttentionRows


def rows(request, query_start, kv_len):
    return AttentionRows(np.array(request), np.array(query_start, np.int32), np.array(kv_len, np.int32))


def test_whole_sequences():
    whole = AttentionRows.one_per_request(np.array([0, 5, 12], np.int32), np.array([5, 7], np.int32))
    assert whole.request.tolist() == [0, 1] and whole.is_one_per_request
    assert whole.whole_spans() == [(0, 5), (5, 12)]
    cached = AttentionRows.one_per_request(np.array([0, 5, 9], np.int32), np.array([5, 7], np.int32))
    assert cached.whole_spans() is None


def test_a_request_of_two_rows():
    """A prompt of 6 tokens that sees itself, a canvas of 4 that sees all, beside a request of one row."""
    split = rows([0, 0, 1], [0, 6, 10, 13], [6, 10, 3])
    assert split.query_len.tolist() == [6, 4, 3]
    assert not split.is_one_per_request
    assert split.whole_spans() is None  # the canvas has more keys than queries


def test_shortened():
    """The first request loses 3 of 5 tokens: the second moves up, both use their own first KV slots."""
    before = AttentionRows.one_per_request(np.array([0, 5, 12], np.int32), np.array([5, 7], np.int32))
    after, tokens = before.shortened(np.array([3, 0], np.int32))
    assert after.query_start.tolist() == [0, 2, 9] and after.kv_len.tolist() == [2, 7]
    assert after.query_start.dtype == after.kv_len.dtype == np.int32
    assert tokens.tolist() == [0, 1, 5, 6, 7, 8, 9, 10, 11]
    assert after.whole_spans() == [(0, 2), (2, 9)]
    untouched, tokens = before.shortened(np.zeros(2, np.int32))
    assert untouched.query_start.tolist() == [0, 5, 12] and tokens.tolist() == list(range(12))
