"""The GPU kernels that score visual tokens: run by Triton's interpreter against their twin, and compiled for GPUs."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Shared memory that a program may have, in KiB, by compute capability (CUDA C++ Programming Guide): GeForce 30, H100.
SHARED_KIB = {86: 99, 90: 227}

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
        cwd=ROOT,
    )
    assert run.returncode == 0 and "3 passed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]


def test_kernels_compile_for_gpus(tmp_path):
    """To machine code, by Triton's own compiler; that they compute the right thing, the interpreter shows."""
    command = [sys.executable, "-m", "tests.engine.compile_kernels", *map(str, SHARED_KIB)]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 4 * len(SHARED_KIB)
    for row in rows:
        assert row["shared"] <= SHARED_KIB[row["capability"]] * 1024, row
