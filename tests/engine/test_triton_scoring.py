"""The GPU kernels that score visual tokens: run by Triton's interpreter against their twin, and compiled for GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Shared memory that a program may have, in KiB, by compute capability (CUDA C++ Programming Guide): A100, GeForce 30,
# H100, B200.
SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227}


def test_kernels_in_the_interpreter():
    """Against their twin, and golden importance through the engine: one process, since Triton reads the switch once."""
    cases = Path(__file__).with_name("scoring_cases.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    assert run.returncode == 0 and "5 passed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]


def test_kernels_compile_for_gpus(tmp_path):
    """To machine code, by Triton's own compiler; that they compute the right thing, the interpreter shows."""
    command = [sys.executable, "-m", "tests.engine.compile_kernels", *map(str, SHARED_KIB)]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 8 * len(SHARED_KIB)
    for row in rows:
        assert row["shared"] <= SHARED_KIB[row["capability"]] * 1024, row
