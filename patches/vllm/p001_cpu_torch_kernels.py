"""Run the small bookkeeping kernels of Model Runner V2 without Triton on a CPU host.

The CPU wheel has no Triton compiler, and its interpreter takes 30 ms per step at batch 1, growing
with the batch. The stand-ins do the same integer writes on numpy views of the very tensors: a few
slices per request, tens of microseconds per step.

A seam will not do: the runner calls module globals and methods of its own buffers, and the registry
with which a platform replaces kernels (``vllm.triton_utils.dispatcher``) needs Triton to be absent,
which switches Model Runner V2 off.
"""

from vllm_dvlm.upstream import Patch, apply

_RUNNER = "vllm.v1.worker.gpu.model_runner"
_BATCH = "vllm.v1.worker.gpu.input_batch"
_TABLES = "vllm.v1.worker.gpu.block_table"
_BUFFERS = "vllm.v1.worker.gpu.buffer_utils"
_HERE = "vllm_dvlm.patches.vllm.cpu_torch_kernels"


def _patch(target: str, replacement: str, sources: tuple[str, ...], fingerprint: str) -> Patch:
    return Patch(
        target=target,
        upstream="none yet; the CPU overrides in vllm/platforms/cpu.py cover Model Runner V1 alone",
        reason="Model Runner V2 launches Triton kernels which a CPU host cannot compile",
        expires="drop when vLLM's CPU wheel runs Model Runner V2 without Triton",
        fingerprint=fingerprint,
        test="tests/upstream/test_cpu_torch_kernels.py",
        replacement=f"{_HERE}:{replacement}",
        sources=sources,
    )


PATCHES = (
    _patch(
        f"{_RUNNER}:prepare_prefill_inputs",
        "prepare_prefill_inputs",
        (f"{_BATCH}:prepare_prefill_inputs", f"{_BATCH}:_prepare_prefill_inputs_kernel"),
        "6242d42b8e1b7864dfa8c6a79d7ec544d5d5aa07dd3258581cc7bd0b6db61802",
    ),
    _patch(
        f"{_RUNNER}:prepare_pos_seq_lens",
        "prepare_pos_seq_lens",
        (f"{_BATCH}:prepare_pos_seq_lens", f"{_BATCH}:_prepare_pos_seq_lens_kernel"),
        "b9dab143d71d526ff4d0a717ebeb91080ac87495db8642c7f0a64ebbce76f55f",
    ),
    _patch(
        f"{_RUNNER}:combine_sampled_and_draft_tokens",
        "combine_sampled_and_draft_tokens",
        (
            f"{_BATCH}:combine_sampled_and_draft_tokens",
            f"{_BATCH}:_combine_sampled_and_draft_tokens_kernel",
        ),
        "41a6cf7923ab20dc4cea2216c1860ce93db07254adf3b1b5532e0fab7bec739a",
    ),
    _patch(
        f"{_RUNNER}:expand_idx_mapping",
        "expand_idx_mapping",
        (f"{_BATCH}:expand_idx_mapping", f"{_BATCH}:_expand_idx_mapping_kernel"),
        "549b83d68cab17a6a848819a0c03f785edc9916ddb35dacb58837d655c4b04df",
    ),
    _patch(
        f"{_RUNNER}:post_update",
        "post_update",
        (f"{_BATCH}:post_update", f"{_BATCH}:_post_update_kernel"),
        "e7dd900cd2d87f9319e15fb662567d9a92b63739bc3749448f8bb93722bd58c2",
    ),
    _patch(
        f"{_TABLES}:BlockTables.gather_block_tables",
        "gather_block_tables",
        (f"{_TABLES}:BlockTables.gather_block_tables", f"{_TABLES}:_gather_block_tables_kernel"),
        "19358182001c49bfc4f7df9f9d433752932912aa948ccda3dc996b57c7fc9bc9",
    ),
    _patch(
        f"{_TABLES}:BlockTables.compute_slot_mappings",
        "compute_slot_mappings",
        (
            f"{_TABLES}:BlockTables.compute_slot_mappings",
            f"{_TABLES}:_compute_slot_mappings_kernel",
        ),
        "6ee72028d2af75ee373079625ffc33a766482c7e61fa484b4645624e89b2fbeb",
    ),
    _patch(
        f"{_BUFFERS}:StagedWriteTensor.apply_write",
        "apply_write",
        (f"{_BUFFERS}:StagedWriteTensor", f"{_BUFFERS}:_apply_write_kernel"),
        "a07df26a51bfe61b70a97f39b6767af22b68ea35038678ff514ae126e241f02b",
    ),
    _patch(
        f"{_BUFFERS}:FusedStagedWriter.apply",
        "apply_fused_writes",
        (f"{_BUFFERS}:FusedStagedWriter", f"{_BUFFERS}:_apply_write_kernel"),
        "a332c361644ab9f917ee7aba780e28a26be8895992ed43a83e9deb98d8a83f10",
    ),
)


def install(device_type: str = "cpu") -> None:
    """Put the stand-ins in place in a worker whose device is the CPU; nothing on another device.

    Raises UpstreamError when the installed kernels are not the ones that were rewritten.
    """
    if device_type == "cpu":
        apply(PATCHES)
