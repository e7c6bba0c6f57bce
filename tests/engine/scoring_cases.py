"""Golden cases whose visual tokens are scored by the Triton kernels that GPUs use, through the real engine.

Run by test_triton_scoring.py in a process of its own with TRITON_INTERPRET=1, which Triton reads when the kernels are
decorated.
"""

import pytest

from tests.engine.pruned_checks import assert_as_golden, request
from tests.golden import cases


@pytest.mark.parametrize("name", ["f1_redvtp_keep25", "f4_redvtp_blocks", "f6_redvtp_square"])
def test_importance_of_the_kernels(engine, monkeypatch, name):
    """Importance, what is kept and tokens as recorded."""
    from vllm_dvlm.models import probe

    num_scored = []

    def scored(query, key, scale, columns, out):
        num_scored.append(len(columns))
        probe.attention_to_columns_triton(query, key, scale, columns, out)

    monkeypatch.setattr("vllm_dvlm.worker.pruning.attention_to_columns", scored)
    case = cases.load(name)
    engine.use(case.build_args)
    outputs = engine.run({name: request(case)})
    assert_as_golden(engine, case, outputs[name])
    first, end = case.visual_spans[0]
    assert num_scored == [end - first] * 4, "the kernels score every layer, once"
