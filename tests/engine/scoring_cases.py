"""The Triton kernels that score visual tokens on GPUs: against their twin, and golden cases through the real engine.

Run by test_triton_scoring.py in a process of its own with TRITON_INTERPRET=1, which Triton reads when the kernels are
decorated.
"""

import pytest
import torch

from tests.engine.pruned_checks import assert_as_golden, request
from tests.golden import cases


def test_kernels_equal_their_twin():
    from vllm_dvlm.models.probe import attention_to_columns_reference, attention_to_columns_triton

    torch.manual_seed(0)
    sizes = [(16, 200, 4, 2, 16, 90), (40, 130, 2, 2, 24, 70), (3, 65, 4, 1, 32, 1)]
    # LLaDA-V 8B with its longest prompt, LaViDa-Dream 7B with its: heads of 128, grouped or not.
    sizes += [(32, 4506, 32, 32, 128, 4341), (64, 1172, 28, 4, 128, 1008), (32, 1100, 8, 8, 64, 1008)]
    for rows, tokens, heads, kv_heads, size, columns in sizes:
        query, key = torch.randn(rows, heads, size), torch.randn(tokens, kv_heads, size)
        places = torch.randperm(tokens)[:columns].sort().values
        expected = attention_to_columns_reference(query, key, size**-0.5, places)
        start = torch.rand(rows, columns)
        grouped = key.double().repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("rhd,thd->rht", query.double(), grouped) * size**-0.5
        for lse in (None, scores.logsumexp(-1).float()):
            out = start.clone()
            attention_to_columns_triton(query, key, size**-0.5, places, out, lse)
            torch.testing.assert_close(out - start, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("name", ["f1_redvtp_keep25", "f6_redvtp_square"])
def test_importance_of_the_kernels(engine, monkeypatch, name, with_lse):
    """Importance, what is kept and tokens as recorded; denominators from the first kernel or from the attention."""
    from vllm_dvlm.models import probe

    num_scored = []

    def scored(query, key, scale, columns, out, lse):
        num_scored.append(len(columns))
        # The last layer computes the rows that are read, so its attention does not know all of them.
        assert (lse is None) == (not with_lse or len(num_scored) == 4)
        probe.attention_to_columns_triton(query, key, scale, columns, out, lse)

    monkeypatch.setattr("vllm_dvlm.worker.pruning.attention_to_columns", scored)
    monkeypatch.setattr("vllm_dvlm.models.whole_attention.sums_are_worth_it", lambda attention: with_lse)
    case = cases.load(name)
    engine.use(case.build_args)
    outputs = engine.run({name: request(case)})
    assert_as_golden(engine, case, outputs[name])
    first, end = case.visual_spans[0]
    assert num_scored == [end - first] * 4, "the kernels score every layer, once"
