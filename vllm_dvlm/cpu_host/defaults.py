"""Defaults that a CPU host needs and vLLM asks its user for: KV cache size and thread binding."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# At least this much, so that the block pool of a tiny model is not a handful of blocks.
_MIN_KV_BYTES = 64 * 2**20


def split_cores(cores: list[int], num_ranks: int) -> str:
    """Cores per rank in the syntax of ``VLLM_CPU_OMP_THREADS_BIND``: ``"0,1|2,3"``.

    Equal contiguous runs; what does not divide stays free for the scheduler, and runs of four or
    more give up their last core to it. With fewer cores than ranks, ranks share cores in turn.
    """
    if num_ranks > len(cores):
        return "|".join(str(cores[rank % len(cores)]) for rank in range(num_ranks))
    run = len(cores) // num_ranks
    used = run - 1 if run >= 4 else run
    return "|".join(",".join(map(str, cores[rank * run : rank * run + used])) for rank in range(num_ranks))


def kv_bytes_per_token(vllm_config: "VllmConfig") -> int:
    """KV bytes that one token takes on one rank, all layers together."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    values = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    return values * model.get_head_size() * model.dtype.itemsize


def default_kv_cache_bytes(vllm_config: "VllmConfig") -> int:
    """KV bytes per rank: as many as the largest batch can use, at most half of the free memory."""
    from vllm.utils.cpu_resource_utils import get_memory_node_info

    parallel = vllm_config.parallel_config
    num_ranks = parallel.local_world_size * max(1, parallel.data_parallel_size_local)
    num_requests = vllm_config.scheduler_config.max_num_seqs + 1  # the null block and a margin
    num_tokens = num_requests * vllm_config.model_config.max_model_len
    wanted = max(_MIN_KV_BYTES, num_tokens * kv_bytes_per_token(vllm_config))
    return min(wanted, get_memory_node_info().available_memory // 2 // num_ranks)
