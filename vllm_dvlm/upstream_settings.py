"""What becomes of each of vLLM's settings under masked diffusion: one table, read by the config hooks.

Every field of the configs named in ``SETTINGS`` is in exactly one list: harmless (vLLM or we honour it, or it has no
object here), set (by us; a user's other value is refused where it can be told from the default) or refused under a
condition, with the remedy in the words of the command line. ``tests/upstream`` compares the table with vLLM's classes,
so that a new field is read before it is ignored. Neither torch nor vLLM is imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dvlm.sampling_parameters import SAMPLING_PARAMETERS, Refused, asks_for_nothing

SCHEDULER = "vllm_dvlm.scheduler.DiffusionScheduler"
VALIDATOR_PREFIX = "vllm_dvlm.serving.admission:Options_"


@dataclass(frozen=True)
class Refuse:
    """A setting that these models cannot run with.

    when: (value, config that has it) -> True for values that are refused.
    remedy: continues "LLaDA-V ..."; ``{value}`` is the user's value.
    """

    when: Callable[[Any, Any], bool]
    remedy: str


def _given(value: Any, config: Any) -> bool:
    """True for a switch that is on, a config or list that is there."""
    return bool(value)


def _more_than_one(value: Any, config: Any) -> bool:
    return value is not None and value > 1


def _not_in(*allowed: Any) -> Callable[[Any, Any], bool]:
    """Enums are compared by their names."""
    return lambda value, config: getattr(value, "name", value) not in allowed


def _plans_once(attention: Any, config: Any) -> bool:
    chosen = [attention.backend, *attention.backend_per_kind.values()]
    return "FLASHINFER" in [getattr(backend, "name", None) for backend in chosen]


def _users_own(processors: Any, config: Any) -> bool:
    return any(not (isinstance(item, str) and item.startswith(VALIDATOR_PREFIX)) for item in processors or ())


def unservable(defaults: Mapping[str, Any]) -> list[str]:
    """Names of sampling parameters in a server's defaults with which every request would be refused."""
    rules = SAMPLING_PARAMETERS
    return [n for n, v in defaults.items() if isinstance(rules.get(n), Refused) and not asks_for_nothing(n, v)]


_PIPELINE = Refuse(_more_than_one, "has no pipeline parallelism: use --tensor-parallel-size instead")
_CONTEXT = Refuse(_more_than_one, "has no context parallelism: leave the context parallel sizes at 1")
_SPLIT_STEP = "runs a step's layers for the whole batch: remove --enable-dbo and --ubatch-size"


def _no_experts(flag: str) -> Refuse:
    return Refuse(_given, f"has no experts: remove --{flag}")


_MODEL: dict[str, Refuse] = {
    "runner": Refuse(_not_in("auto", "generate"), "generates text only: remove --runner {value}"),
    "convert": Refuse(_not_in("auto", "none"), "generates text only: remove --convert {value}"),
    "return_sampling_mask": Refuse(
        _given, "chooses tokens of a whole canvas and has no sampling mask: remove --return-sampling-mask"
    ),
    "logprobs_mode": Refuse(
        _not_in("raw_logprobs"),
        "gives log-probabilities of the model before temperature: remove --logprobs-mode {value}",
    ),
    "enable_trace_replay": Refuse(_given, "fills a canvas and cannot replay a text: remove --enable-trace-replay"),
    "skip_tokenizer_init": Refuse(
        _given, "finds its mask token in the tokenizer: remove --skip-tokenizer-init (and --tokens-only)"
    ),
    "enable_prompt_embeds": Refuse(_given, "takes text and token prompts only: remove --enable-prompt-embeds"),
    "override_generation_config": Refuse(
        lambda value, config: bool(unservable(value)),
        "has temperature as its only sampling parameter: remove the others from --override-generation-config {value}",
    ),
    "enable_sleep_mode": Refuse(_given, "keeps canvases on the device, which sleep loses: remove --enable-sleep-mode"),
    "logits_processors": Refuse(_users_own, "chooses tokens of a whole canvas at once: remove --logits-processors"),
}

_MULTIMODAL: dict[str, Refuse] = {
    "enable_mm_embeds": Refuse(_given, "takes images, not their embeddings: remove --enable-mm-embeds"),
    "mm_processor_cache_type": Refuse(
        lambda value, config: value == "shm",
        "keeps processed images in the front end alone: remove --mm-processor-cache-type {value}",
    ),
    "mm_encoder_only": Refuse(_given, "runs tower and text together: remove --mm-encoder-only"),
    "mm_encoder_attn_dtype": Refuse(
        _given, "runs its vision tower in the model's dtype: remove --mm-encoder-attn-dtype {value}"
    ),
    "video_pruning_rate": Refuse(_given, "takes images, not videos: remove --video-pruning-rate (see prune_method)"),
}

_SCHEDULER: dict[str, Refuse] = {
    "max_num_scheduled_tokens": Refuse(
        lambda value, config: value not in (None, config.max_num_batched_tokens),
        "runs whole steps: use --max-num-batched-tokens instead of --max-num-scheduled-tokens",
    ),
    "long_prefill_token_threshold": Refuse(
        _given, "computes prompt and canvas in one step: remove --long-prefill-token-threshold"
    ),
    "long_prefill_token_threshold_adaptive": Refuse(
        _given, "computes prompt and canvas in one step: remove --long-prefill-token-threshold-adaptive"
    ),
    "enable_chunked_prefill": Refuse(
        _given, "computes prompt and canvas in one denoising step: remove --enable-chunked-prefill"
    ),
    "scheduler_cls": Refuse(_not_in(None, SCHEDULER), "has a scheduler of its own: remove --scheduler-cls {value}"),
    "async_scheduling": Refuse(_given, "must see a step's result before the next: remove --async-scheduling"),
}

_CACHE: dict[str, Refuse] = {
    "cache_dtype": Refuse(
        _not_in("auto", "float16", "bfloat16"),
        "turns and moves KV rows, which --kv-cache-dtype {value} does not allow: use auto",
    ),
    "enable_prefix_caching": Refuse(
        _given, "recomputes and rewrites the KV rows of its prompt: remove --enable-prefix-caching"
    ),
    "kv_sharing_fast_prefill": Refuse(_given, "has KV rows in every layer: remove --kv-sharing-fast-prefill"),
    "kv_offloading_size": Refuse(
        lambda value, config: value is not None, "rewrites KV rows while a request lives: remove --kv-offloading-size"
    ),
}

_PARALLEL: dict[str, Refuse] = {
    "pipeline_parallel_size": _PIPELINE,
    "prefill_context_parallel_size": _CONTEXT,
    "decode_context_parallel_size": _CONTEXT,
    "enable_expert_parallel": _no_experts("enable-expert-parallel"),
    "enable_batch_sharded_sampling": Refuse(
        _given, "chooses tokens on every rank: remove --enable-batch-sharded-sampling"
    ),
    "enable_ep_weight_filter": _no_experts("enable-ep-weight-filter"),
    "enable_eplb": _no_experts("enable-eplb"),
    "enable_elastic_ep": _no_experts("enable-elastic-ep"),
    "enable_dbo": Refuse(_given, _SPLIT_STEP),
    "ubatch_size": Refuse(_more_than_one, _SPLIT_STEP),
}

_VLLM: dict[str, Refuse] = {
    "lora_config": Refuse(_given, "has no LoRA support: remove --enable-lora"),
    "speculative_config": Refuse(_given, "is not autoregressive: remove --speculative-config"),
    "kv_transfer_config": Refuse(_given, "rewrites KV rows while a request lives: remove --kv-transfer-config"),
    "kv_events_config.enable_kv_cache_events": Refuse(
        _given, "has no KV blocks that requests share: remove --kv-events-config"
    ),
    "ec_transfer_config": Refuse(_given, "encodes its images itself: remove --ec-transfer-config"),
    "ec_manager_config.encoder_cache_manager_cls": Refuse(
        _given, "keeps images in vLLM's own encoder cache: remove --ec-manager-config"
    ),
    "aux_output_config.enable_return_routed_experts": _no_experts("enable-return-routed-experts"),
    "watermark_config": Refuse(_given, "chooses tokens of a whole canvas at once: remove --watermark-config"),
    "engram_config": Refuse(_given, "has no n-gram layers: remove --engram-config"),
    "diffusion_config": Refuse(
        _given,
        "takes lengths and steps from --additional-config '{{\"dvlm\": {{...}}}}' and from requests: remove "
        "--diffusion-config",
    ),
    "attention_config": Refuse(
        _plans_once, "plans attention twice in a step, FLASHINFER once: remove --attention-backend"
    ),
    "compilation_config.mode": Refuse(
        _not_in(None, "NONE"), "changes the number of rows inside a step: remove mode from --compilation-config"
    ),
    "compilation_config.cudagraph_mode": Refuse(
        _not_in(None, "NONE"),
        "changes the number of rows inside a step: remove cudagraph_mode from --compilation-config",
    ),
    "compilation_config.compile_mm_encoder": Refuse(
        _given, "runs its vision tower as it is: remove compile_mm_encoder from --compilation-config"
    ),
    "compilation_config.cudagraph_mm_encoder": Refuse(
        _given, "runs its vision tower as it is: remove cudagraph_mm_encoder from --compilation-config"
    ),
}

REFUSED: dict[str, dict[str, Refuse]] = {
    "ModelConfig": _MODEL,
    "MultiModalConfig": _MULTIMODAL,
    "SchedulerConfig": _SCHEDULER,
    "CacheConfig": _CACHE,
    "ParallelConfig": _PARALLEL,
    "VllmConfig": _VLLM,
}

# Overwritten by the hooks, like some of the refused fields, whose other values all mean the same. No value of the
# user's is lost that could be told from the default, or the log says so.
SET: dict[str, str] = {
    # dtype on a CPU host, where the server setting cpu_dtype decides; the log says so.
    "ModelConfig": "dtype tokenizer_mode",
    "MultiModalConfig": "media_io_kwargs mm_encoder_tp_mode",  # image_mode unless given; data where heads do not divide
    # Raised to what the longest request needs.
    "SchedulerConfig": "max_num_batched_tokens max_num_encoder_input_tokens encoder_cache_size",
    "CacheConfig": "",
    "ParallelConfig": "",
    "VllmConfig": "additional_config",  # resolved settings are added
}

HARMLESS: dict[str, str] = {
    # Where files are, what names are, what the front end does; derived fields; noise is float64 with or without a flag,
    # no layer has a sliding window, no prefix is shared; --enforce-eager is how we run anyway.
    "ModelConfig": """
        model model_weights tokenizer trust_remote_code seed hf_config hf_text_config is_submodel_config
        word_embeddings_untied_by_checkpoint hf_config_path allowed_local_media_path allowed_media_domains revision
        code_revision tokenizer_revision max_model_len spec_target_max_model_len quantization quantization_config
        allow_deprecated_quantization enforce_eager max_logprobs use_fp64_gumbel disable_sliding_window
        disable_cascade_attn served_model_name config_format hf_token hf_overrides model_class_overrides
        generation_config sleep_preserve_parameter_names sleep_mode_backend sleep_mode_offload_cudagraph
        enable_nccl_comm_suspend enable_cumem_allocator model_impl io_processor_plugin renderer_num_workers
        pooler_config multimodal_config""",
    # The processor refuses unknown mm_processor_kwargs itself; vLLM switches mm_device_do_normalize off where a model
    # does not support it, and refuses FP8 scale files without mm_encoder_attn_dtype.
    "MultiModalConfig": """
        language_model_only limit_per_prompt mm_processor_kwargs mm_device_do_normalize mm_processor_cache_gb
        mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_attn_backend mm_encoder_fp8_scale_path
        mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin interleave_mm_strings skip_mm_profiling
        video_pruning_method mm_tensor_ipc allow_missing_mm_embeddings mm_ipc_gpu_memory_gb""",
    # Without the hybrid manager fastv has one KV group; prefill_schedule_interval is for mixtures of experts; a whole
    # step is one input of any policy.
    "SchedulerConfig": """
        runner_type max_num_seqs max_num_active_seqs max_num_queued_reqs max_num_queued_tokens is_multimodal_model
        policy disable_chunked_mm_input disable_hybrid_kv_cache_manager scheduler_reserve_full_isl watermark
        prefill_schedule_interval stream_interval""",
    # Nothing hashes or matches blocks without a prefix cache; there are no Mamba layers.
    "CacheConfig": """
        block_size user_specified_block_size kv_cache_layout prefix_match_unit gpu_memory_utilization
        is_attention_free num_gpu_blocks_override sliding_window prefix_caching_hash_algo
        prefix_cache_retention_interval kv_cache_dtype_skip_layers mamba_page_size_padded skip_page_size_padded
        mamba_block_size mamba_cache_dtype mamba_ssm_cache_dtype mamba_cache_mode
        enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm use_kda_recoverssm num_gpu_blocks
        num_cpu_blocks effective_attention_block_size kv_cache_size_tokens kv_cache_max_concurrency hash_block_size
        cache_hit_alignment_tokens swa_bounded_replay kv_cache_memory_bytes kv_offloading_backend
        _block_size_resolved""",
    # Data parallelism of a dense model is engines side by side; tensor_parallel_size is checked by tensor_parallel.
    "ParallelConfig": """
        tensor_parallel_size data_parallel_size data_parallel_size_local data_parallel_rank data_parallel_rank_local
        data_parallel_master_ip data_parallel_rpc_port dp_sync_interval data_parallel_master_port
        data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb is_moe_model enable_hc_sp eplb_config
        expert_placement_strategy all2all_backend max_parallel_loading_workers disable_custom_all_reduce
        enable_shm_tensor_arena elastic_ep_max_dp_size dbo_decode_token_threshold dbo_prefill_token_threshold
        disable_nccl_for_dp_synchronization ray_workers_use_nsight ray_runtime_env placement_group
        distributed_executor_backend worker_cls worker_extension_cls master_addr master_port node_rank nnodes
        numa_bind numa_bind_nodes numa_bind_cpus assigned_physical_gpu_ids distributed_timeout_seconds
        cpu_distributed_timeout_seconds world_size rank _data_parallel_master_port_list _coord_store_port
        dcp_kv_cache_interleave_size dcp_comm_backend dcp_q_replicate cp_kv_cache_interleave_size
        _allow_auto_resolve_cp_interleave_size data_parallel_index _api_process_count _api_process_rank
        enable_fault_tolerance fault_tolerance_config""",
    # The first five have tables of their own. Structured outputs and reasoning budgets are refused per request.
    "VllmConfig": """
        model_config cache_config parallel_config scheduler_config device_config load_config offload_config mamba_config
        kernel_config structured_outputs_config observability_config logging_config quant_config profiler_config
        reasoning_config instance_id optimization_level performance_mode weight_transfer_config shutdown_timeout""",
}

# Environment variable -> remedy, refused where true. To raise on NaNs makes vLLM count them, so that comes first.
ENVIRONMENT: dict[str, str] = {
    "VLLM_RAISE_ON_LOGIT_NANS": "looks at no logit twice and finds no NaNs: unset VLLM_RAISE_ON_LOGIT_NANS",
    "VLLM_COMPUTE_NANS_IN_LOGITS": "looks at no logit twice and counts no NaNs: unset VLLM_COMPUTE_NANS_IN_LOGITS",
    "VLLM_USE_RUST_FRONTEND": "checks prompts and options in vLLM's Python front end: unset VLLM_USE_RUST_FRONTEND",
}


def problem(config: Any, class_name: str) -> str | None:
    """The first setting of this config that these models cannot run with: what to tell the user; None if all go.

    config: an object with the fields of vLLM's class of that name.
    """
    for name, rule in REFUSED[class_name].items():
        value = config
        for part in name.split("."):
            value = getattr(value, part, None)
        if rule.when(value, config):
            return rule.remedy.format(value=value)
    return None


def environment_problem(is_true: Callable[[str], bool]) -> str | None:
    """As ``problem``, for environment variables. is_true: vLLM's reading of one."""
    return next((remedy for name, remedy in ENVIRONMENT.items() if is_true(name)), None)


def misplaced(additional_config: Mapping[str, Any] | None, known: set[str]) -> str | None:
    """As ``problem``: settings of ours that stand beside "dvlm" instead of in it, or under a misspelt name.

    known: names of our settings. Other keys belong to other plugins.
    """
    for key in additional_config or {}:
        if key in known:
            return f'takes {key} inside "dvlm": use --additional-config \'{{"dvlm": {{"{key}": ...}}}}\''
        if key != "dvlm" and difflib.get_close_matches(key.lower()[:20], ["dvlm", "vllm_dvlm"], cutoff=0.7):
            return f'finds its settings under "dvlm", not {key!r} in --additional-config: rename it'
    return None


def tensor_parallel_problem(size: int, num_heads: int, num_kv_heads: int, mlp_width: int) -> str | None:
    """Why a text model cannot be cut into ``size`` ranks, with sizes that it can; None if it can.

    mlp_width: columns of the MLP's inner layer.
    """

    def fits(ranks: int) -> bool:
        kv_fits = num_kv_heads % ranks == 0 or ranks % num_kv_heads == 0  # else copied to several ranks
        return num_heads % ranks == 0 and kv_fits and mlp_width % ranks == 0

    if fits(size):
        return None
    allowed = ", ".join(str(ranks) for ranks in range(1, num_heads + 1) if fits(ranks))
    return (
        f"has {num_heads} attention heads, {num_kv_heads} key-value heads and MLPs {mlp_width} wide, which "
        f"--tensor-parallel-size {size} does not divide (a worker would end with an AssertionError): use {allowed}"
    )
