"""Give a request's tail KV blocks back to vLLM's block pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_dvlm.steps import cdiv

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager


def release_tail(kv_cache_manager: KVCacheManager, request_id: str, num_tokens: int) -> int:
    """Keep the KV blocks that hold ``num_tokens`` tokens of a request, free the others.

    Call it only when no step that touches the tail is in flight: with synchronous scheduling, after the output of the
    pruning step is there. ``req_to_blocks`` is vLLM's only list of a request's blocks, so what is cut here is neither
    freed again at the end nor allocated again, as long as the request's length stays below.

    Returns:
        KV blocks freed, over all KV cache groups.
    """
    num_freed = 0
    for manager in kv_cache_manager.coordinator.single_type_managers:
        blocks = manager.req_to_blocks[request_id]
        num_kept = cdiv(num_tokens, manager.block_size)
        tail = blocks[num_kept:]
        del blocks[num_kept:]
        # Reversed, as vLLM frees a request: the last block is the first to be reused.
        kv_cache_manager.block_pool.free_blocks(reversed(tail))
        num_freed += len(tail)
    return num_freed
