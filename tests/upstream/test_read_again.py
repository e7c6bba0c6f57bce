"""Source of vLLM that the plugin leans on beyond names and signatures: what changed must be read again.

A failure here is no fault yet: read the new source with the note in mind, then take the new fingerprint:
``python -c "from vllm_dvlm import upstream; print(upstream.fingerprint(['module:name']))"``.
"""

import pytest

from vllm_dvlm.upstream import fingerprint

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
BLOCKS = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
# Definition -> (sha256, what we lean on).
READ = {
    f"{SCHEDULER}.schedule": (
        "1aefd5843f25ef01e95b3a160a7ca815410314014c59f602df5dd79d013183ec",
        "a step computes num_tokens_with_spec - num_computed_tokens; a request held back for a call keeps its place",
    ),
    f"{SCHEDULER}.update_from_output": (
        "fa8d2ce16c881c0a5895a0ff9c24d0d7e642ff46c40d14de33445a64a44695e9",
        "encoder_cache_mismatch_reqs end with an error; num_rejected is a difference",
    ),
    f"{SCHEDULER}._update_request_with_output": (
        "4eaf9867ad599b44a9b91fdd35972f6111c1635592ac66ca83c23af569362a83",
        "appends tokens one by one and stops at the first that stops",
    ),
    f"{SCHEDULER}._free_request": (
        "61b1637a303b7bb01bc57f4ca09e9422b1d6d7c987719a1aed63e6e08e353ea9",
        "hands kv_transfer_params to the reply",
    ),
    f"{SCHEDULER}._preempt_request": (
        "b05ab0b2546c03b39b4e1ccf2b6c3a2e89d220be2a51c0704372a7dde416b21b",
        "drops the request's KV and puts it in front of the queue",
    ),
    f"{SCHEDULER}.add_request": (
        "145a9681711755827aae6e2318674b2d83d38c31de1b07138c883580f9874282",
        "a known id is an update of a session",
    ),
    f"{SCHEDULER}.make_stats": (
        "6eda334535c501665f6118a0be87e6cc74af276cd93c62174b6ea8cdfd89c83e",
        "counters travel in its one free map",
    ),
    f"{BLOCKS}.allocate_new_blocks": (
        "241e3fc321c8d341fae8a7906fcdbf3500526555084bc712820cfd7886821803",
        "blocks in the order of the tokens, at the end of req_to_blocks",
    ),
    f"{BLOCKS}.free": (
        "4f3e9b31db4cebb2e3286b5dbb7e49d58f82345960db08995bf77ef4a090722b",
        "frees what req_to_blocks still lists",
    ),
    f"{RUNNER}.execute_model": (
        "ea2a067a6342900b81590019c3a7228cc648bffb39b556db29f42e365103c110",
        "order: finish, free, add, update, prepare inputs, attention, model inputs of the ModelState, forward",
    ),
    f"{RUNNER}.sample": (
        "278fcfd50196fa4ac68cf124b8ddad0734c6078b03bce4114b4e20bc307d5254",
        "calls the custom sampler with hidden states of logits_indices",
    ),
    f"{RUNNER}.sample_tokens": (
        "5f38dd7f51352a78aa8db436fb21b6d2ce91ade36bf04eca0829d9159da96b6d",
        "what a step's output carries, and when its copies are complete",
    ),
    f"{RUNNER}.postprocess_sampled": (
        "3e80e0d2d5ff0e8251cf2e75eab51b977aa6a23c4de754163664c695e1619b12",
        "num_computed_tokens on the worker",
    ),
    f"{RUNNER}.add_requests": (
        "e902bca39db7ce70dc29c0b918292d690f8557c10d0a8bf1d1b7dc1135666f43",
        "prefill_len and all_token_ids of a new request",
    ),
    f"{RUNNER}.update_requests": (
        "bdc315a04920c6dd4a05e010c1c29b43c90acb6ef8fae99e0d7bedd6451a9500",
        "new blocks are appended to the row",
    ),
    f"{RUNNER}.prepare_inputs": (
        "ce3057eec265e104b3c7211614db7b80db56eed2f81815c2eb97be593dc51ec8",
        "positions, slots and logits_indices of a step",
    ),
    "vllm.v1.worker.gpu.block_table:BlockTables": (
        "b6e51ec1273634e5bfbd4ebfef232401389d5cf6c797f148cb052b56407a3472",
        "a row of blocks per request, which pruning cuts",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_source_is_the_one_that_was_read(name):
    seen, what = READ[name]
    assert fingerprint([name]) == seen, f"{name} has changed; we lean on this: {what}"
