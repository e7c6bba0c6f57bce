"""The CPU platform with what our models need and what other models must not lose.

Imported by vLLM while it resolves the platform, so vLLM modules that ask for the platform in turn
are imported inside the methods.
"""

import os
import sys
from typing import TYPE_CHECKING

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_dvlm import ARCHITECTURES
from vllm_dvlm.cpu_host.defaults import default_kv_cache_bytes, split_cores

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_RUNNER_ENV = "VLLM_USE_V2_MODEL_RUNNER"
# The value of _RUNNER_ENV that this class wrote, to tell it from one that the user set; children inherit both.
_RUNNER_MARK_ENV = "VLLM_DVLM_WROTE_MODEL_RUNNER"
_BIND_ENV = "VLLM_CPU_OMP_THREADS_BIND"
_GRACE_ENV = "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"

# The smallest size that the CPU attention kernels like (a multiple of 32). vLLM's default is 128,
# so coarse that pruning a prompt of a few hundred tokens would hardly free a block.
_KV_BLOCK_SIZE = 32

# Whatever vLLM would have chosen without us, its AMD Zen variant included.
_Base = resolve_obj_by_qualname(cpu_platform_plugin())


class DvlmCpuPlatform(_Base):
    """CPU platform on which our models need no flag and no environment variable."""

    # A key that Ray's get_accelerator_ids() knows. The Ray worker actor asks the platform before
    # plugins are loaded there, so only a platform class can answer. The cluster must offer the
    # resource: `ray start --num-gpus=<ranks>` on a host without GPUs.
    ray_device_key = "GPU"

    # The binding that this class itself wrote, to tell it from one that the user set.
    _bind_written: str | None = None

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: "VllmConfig") -> None:
        """Keep vLLM's own models on the runner that they have on the CPU wheel without us."""
        super().apply_config_platform_defaults(vllm_config)
        if vllm_config.model_config is None:
            return
        cls.choose_runner(_is_ours(vllm_config))

    @classmethod
    def choose_runner(cls, is_ours: bool) -> None:
        """Model Runner V2 for our models, V1 for others, unless the user chose.

        The Triton backend flag makes V2 the default for every model, but only the kernels on our models' path have
        torch stand-ins; others would die at the first launch. vLLM reads the choice from the environment alone, and
        one process may build both kinds of model, one after another.
        """
        current = os.environ.get(_RUNNER_ENV)
        if current is None or current == os.environ.get(_RUNNER_MARK_ENV):
            os.environ[_RUNNER_ENV] = os.environ[_RUNNER_MARK_ENV] = "1" if is_ours else "0"

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """vLLM's CPU defaults, then ours: block size, KV size, thread binding of several ranks."""
        cache_config = vllm_config.cache_config
        super().check_and_update_config(vllm_config)
        cls._bind_threads(vllm_config)
        if vllm_config.model_config is None or not _is_ours(vllm_config):
            return
        if vllm_config.parallel_config.world_size > 1:
            # A rank that waits for a dead one waits busily and hears no request to end. vLLM asks for 5 s, terminates
            # for 4 s, and kills; clients hear of the dead one only then.
            os.environ.setdefault(_GRACE_ENV, "2")
        if not cache_config.user_specified_block_size:
            cache_config.block_size = _KV_BLOCK_SIZE
        # vLLM would take 92 % of the host's memory for KV and refuse to start where less is free.
        # An explicit size or share wins.
        share = type(cache_config)().gpu_memory_utilization
        if cache_config.kv_cache_memory_bytes is None and cache_config.gpu_memory_utilization == share:
            cache_config.kv_cache_memory_bytes = default_kv_cache_bytes(vllm_config)

    @classmethod
    def _bind_threads(cls, vllm_config: "VllmConfig") -> None:
        """Give each rank its own cores where ranks outnumber NUMA nodes; vLLM refuses to start."""
        from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_visible_memory_node

        parallel = vllm_config.parallel_config
        num_ranks = parallel.local_world_size * max(1, parallel.data_parallel_size_local)
        current = os.environ.get(_BIND_ENV)
        if current is not None and current != cls._bind_written:
            return
        if cls._bind_written is not None:
            del os.environ[_BIND_ENV]
            cls._bind_written = None
        if num_ranks <= len(get_visible_memory_node()) or "VLLM_CPU_SIM_MULTI_NUMA" in os.environ:
            return
        # One logical CPU per physical core, as vLLM's own binding does on x86.
        cores = sorted({cpu.physical_core: cpu.id for cpu in get_allowed_cpu_list()}.values())
        os.environ[_BIND_ENV] = cls._bind_written = split_cores(cores, num_ranks)

    @classmethod
    def validate_request(cls, processed_inputs, params) -> None:
        """Let ``admission`` see the prompt's token ids; its ValueError becomes HTTP 400."""
        super().validate_request(processed_inputs, params)
        # Looked up, not imported: only a process that serves one of our models has loaded it.
        admission = sys.modules.get("vllm_dvlm.serving.admission")
        if admission is not None:
            admission.validate_request(processed_inputs, params)

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """vLLM's own CPU kernels for Model Runner V1, which it skips once it believes in Triton."""
        import vllm.triton_utils
        import vllm.v1.sample.ops.topk_topp_sampler as topk_topp_sampler

        believed = vllm.triton_utils.HAS_TRITON
        vllm.triton_utils.HAS_TRITON = False
        try:
            super().register_triton_kernel_overrides()
        finally:
            vllm.triton_utils.HAS_TRITON = believed
        topk_topp_sampler.HAS_TRITON = False


def _is_ours(vllm_config: "VllmConfig") -> bool:
    return bool(ARCHITECTURES.intersection(vllm_config.model_config.architectures))
