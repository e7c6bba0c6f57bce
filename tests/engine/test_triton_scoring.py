"""The GPU kernels that score visual tokens, run by Triton's interpreter against their twin."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

SCRIPT = """
import torch
from vllm_dvlm.models.probe import attention_to_columns_reference, attention_to_columns_triton

torch.manual_seed(0)
sizes = ((16, 200, 4, 2, 16, 90), (40, 130, 2, 2, 24, 70), (3, 65, 4, 1, 32, 1))
for rows, tokens, heads, kv_heads, size, columns in sizes:
    query, key = torch.randn(rows, heads, size), torch.randn(tokens, kv_heads, size)
    places = torch.randperm(tokens)[:columns].sort().values
    expected = attention_to_columns_reference(query, key, size**-0.5, places)
    start = torch.rand(rows, columns)
    out = start.clone()
    attention_to_columns_triton(query, key, size**-0.5, places, out)
    torch.testing.assert_close(out - start, expected, rtol=1e-5, atol=1e-6)
print("equal")
"""


def test_kernels_equal_their_twin():
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.stdout.strip().endswith("equal"), run.stderr[-3000:]


def test_golden_importance_through_the_engine():
    cases = Path(__file__).with_name("scoring_cases.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0 and "3 passed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]
