"""Patch p001: the torch stand-ins do what vLLM's Triton kernels do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = (
    "apply_fused_writes",
    "apply_write",
    "combine_sampled_and_draft_tokens",
    "compute_slot_mappings",
    "expand_idx_mapping",
    "gather_block_tables",
    "post_update",
    "prepare_pos_seq_lens",
    "prepare_prefill_inputs",
)
NUM_ROUNDS = 15


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Case -> "ok" or what differs; one process, because the interpreter is chosen at import."""
    script = Path(__file__).with_name("kernel_cases.py")
    done = subprocess.run(
        [sys.executable, str(script), str(NUM_ROUNDS)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(CASES))


@pytest.mark.parametrize("case", CASES)
def test_stand_in_equals_kernel(outcomes, case):
    assert outcomes.get(case) == "ok"


def test_every_patch_has_a_case():
    from vllm_dvlm.patches.vllm import p001_cpu_torch_kernels as p001

    assert sorted(p.replacement.rpartition(":")[2] for p in p001.PATCHES) == sorted(CASES)


def test_pad_slot_id_is_vllms():
    from vllm.v1.attention.backends.utils import PAD_SLOT_ID

    from vllm_dvlm.patches.vllm import cpu_torch_kernels

    assert cpu_torch_kernels.PAD_SLOT_ID == PAD_SLOT_ID


def test_context_parallelism_is_refused():
    from types import SimpleNamespace

    from vllm_dvlm.patches.vllm import cpu_torch_kernels

    with pytest.raises(NotImplementedError, match="context parallelism"):
        cpu_torch_kernels.compute_slot_mappings(SimpleNamespace(cp_size=2), None, None, None, 0)
