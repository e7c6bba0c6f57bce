"""The dense LaViDa reference against the recorded runs of the original code, step by step."""

import pytest

from tests import tiny_lavida
from tests.golden import lavida_cases as cases
from vllm_dvlm.bench.lavida_files import KINDS


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_checkpoint_is_the_recorded_one(kind):
    recorded = {case.raw["checkpoint_sha256"] for case in cases.all_cases() if case.kind is kind}
    assert recorded == {tiny_lavida.digest(tiny_lavida.tensors(kind))}
