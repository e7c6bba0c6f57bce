"""Every name and signature of vLLM 0.32 that the plugin leans on and that vLLM does not promise.

A failure here says what moved before an engine test says that something is wrong.
"""

import dataclasses
import inspect

import pytest


def parameters(function) -> list[str]:
    """Parameter names without self."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


def assigned(cls) -> set[str]:
    """Attributes that __init__ assigns on self."""
    names = set()
    for line in inspect.getsource(cls.__init__).splitlines():
        text = line.strip()
        if text.startswith("self.") and "=" in text:
            names.add(text[5:].split("=")[0].split(":")[0].strip())
    return names


MODEL_STATE_HOOKS = {
    "add_request": ["req_index", "new_req_data"],
    "remove_request": ["req_id"],
    "apply_staged_writes": [],
    "initialize_kv_cache": ["kv_cache_config", "block_tables"],
    "preprocess_state": ["input_batch", "block_tables", "kv_cache_config", "num_computed_tokens"],
    "postprocess_state": ["idx_mapping", "num_sampled", "num_computed_tokens"],
    "prepare_inputs_embeds": ["scheduled_encoder_inputs", "input_batch", "req_states"],
    "dummy_inputs_embeds": ["num_tokens"],
    "execute_mm_encoder": ["scheduled_encoder_inputs"],
    "prepare_inputs": ["input_batch", "req_states"],
    "prepare_dummy_inputs": ["num_reqs", "num_tokens"],
    "custom_sampler": ["sampler"],
    "prepare_attn": [
        "input_batch",
        "cudagraph_mode",
        "block_tables",
        "slot_mappings",
        "attn_groups",
        "kv_cache_config",
        "for_capture",
        "ubatch_idx",
    ],
}


@pytest.mark.parametrize("hook", MODEL_STATE_HOOKS)
def test_model_state_hook(hook):
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    assert parameters(getattr(ModelState, hook)) == MODEL_STATE_HOOKS[hook]


def test_model_state_says_how_many_tokens_a_step_samples():
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    assert ModelState.num_new_sampled_tokens_per_step == 1


SCHEDULER_METHODS = {
    "add_request": ["request"],
    "schedule": ["throttle_prefills"],
    "update_draft_token_ids": ["draft_token_ids"],
    "update_from_output": ["scheduler_output", "model_runner_output"],
    "finish_requests": ["request_ids", "finished_status"],
    "reset_prefix_cache": ["reset_running_requests", "reset_connector"],
    "_free_request": ["request", "delay_free_blocks"],
    "_preempt_request": ["request", "timestamp", "drop_stale_output"],
    "_try_schedule_encoder_inputs": [
        "request",
        "num_computed_tokens",
        "num_new_tokens",
        "encoder_compute_budget",
        "shift_computed_tokens",
    ],
}


@pytest.mark.parametrize("method", SCHEDULER_METHODS)
def test_scheduler_method(method):
    from vllm.v1.core.sched.scheduler import Scheduler

    assert parameters(getattr(Scheduler, method)) == SCHEDULER_METHODS[method]


def test_scheduler_attributes():
    from vllm.v1.core.sched.scheduler import Scheduler

    assert assigned(Scheduler) >= {
        "num_sampled_tokens_per_step",
        "requests",
        "running",
        "waiting",
        "max_num_scheduled_tokens",
        "max_model_len",
        "kv_cache_manager",
        "encoder_cache_mismatch_reqs",
        "current_step",
        "finished_req_ids",
    }


def test_request_fields():
    from vllm.v1.request import Request, RequestStatus

    assert assigned(Request) >= {
        "request_id",
        "sampling_params",
        "max_tokens",
        "status",
        "num_prompt_tokens",
        "prompt_token_ids",
        "_output_token_ids",
        "_all_token_ids",
        "spec_token_ids",
        "num_computed_tokens",
        "next_decode_eligible_step",
        "mm_features",
    }
    for name in ("num_tokens", "num_tokens_with_spec", "has_encoder_inputs"):
        assert isinstance(inspect.getattr_static(Request, name), property)
    assert {"WAITING", "PREEMPTED", "RUNNING", "FINISHED_ERROR"} <= set(RequestStatus.__members__)


def test_kv_cache_owner_lists():
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    assert {"coordinator", "block_pool"} <= assigned(KVCacheManager)
    assert "self.coordinator.single_type_managers" in inspect.getsource(KVCacheManager.__init__)
    assert {"req_to_blocks", "num_cached_block", "block_size"} <= assigned(SingleTypeKVCacheManager)
    assert parameters(BlockPool.free_blocks) == ["ordered_blocks"]
    assert parameters(BlockPool.get_num_free_blocks) == []


def test_input_batch_fields():
    from vllm.v1.worker.gpu.input_batch import InputBatch

    assert not InputBatch.__dataclass_params__.frozen
    assert {f.name for f in dataclasses.fields(InputBatch)} >= {
        "req_ids",
        "num_reqs",
        "idx_mapping",
        "idx_mapping_np",
        "query_start_loc",
        "query_start_loc_np",
        "seq_lens",
        "num_computed_tokens_np",
        "num_scheduled_tokens",
        "input_ids",
        "positions",
        "logits_indices",
        "cu_num_logits",
        "cu_num_logits_np",
    }


def test_request_state_and_block_tables():
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.states import RequestState

    assert assigned(RequestState) >= {
        "req_id_to_index",
        "prefill_len",
        "prompt_len",
        "num_computed_tokens",
        "all_token_ids",
        "draft_tokens",
    }
    assert assigned(BlockTables) >= {"block_tables", "num_blocks", "block_sizes"}


def test_sampler_output_fields():
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

    assert [f.name for f in dataclasses.fields(SamplerOutput)][:5] == [
        "sampled_token_ids",
        "logprobs_tensors",
        "num_nans",
        "num_sampled",
        "num_rejected",
    ]


def test_config_hook():
    from vllm.config.diffusion import DiffusionConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    assert isinstance(MODELS_CONFIG_MAP, dict)
    assert parameters(VerifyAndUpdateConfig.verify_and_update_config) == ["vllm_config"]
    assert parameters(VerifyAndUpdateConfig.verify_and_update_model_config) == ["model_config"]
    assert "canvas_length" in parameters(DiffusionConfig)


def test_attention_metadata_takes_causal():
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

    assert inspect.signature(build_attn_metadata).parameters["causal"].default is True


def test_kv_cache_spec_has_non_causal():
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    fields = {f.name: f for f in dataclasses.fields(FullAttentionSpec)}
    assert fields["non_causal"].default is False


def test_logits_processor_validates_params():
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    assert parameters(LogitsProcessor.validate_params) == ["sampling_params"]
    assert parameters(LogitsProcessor.add_request) == ["req_idx", "sampling_params"]


def test_renderer_and_tokenizer_registries():
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    assert parameters(RENDERER_REGISTRY.register) == ["renderer_mode", "module", "class_name"]
    assert parameters(TokenizerRegistry.register) == ["tokenizer_mode", "module", "class_name"]
    assert "hf" in TokenizerRegistry.tokenizers


def test_renderer_names_the_chat_template():
    from vllm.config import ModelConfig
    from vllm.entrypoints.launchers.api_server import app_state
    from vllm.entrypoints.llm import LLM
    from vllm.renderers import ChatParams
    from vllm.renderers.hf import HfRenderer, resolve_chat_template, resolve_chat_template_content_format

    # One place for all that a user may name, and one call at start-up.
    assert {"chat_template", "chat_template_content_format", "chat_template_kwargs", "tool_choice"} <= {
        f.name for f in dataclasses.fields(ChatParams)
    }
    assert (
        parameters(HfRenderer.render_messages) == parameters(HfRenderer.render_messages_async) == ["messages", "params"]
    )
    assert parameters(HfRenderer.warmup) == ["chat_params"]
    assert "renderer.warmup(" in inspect.getsource(app_state) and "renderer.warmup(" in inspect.getsource(LLM.__init__)
    assert parameters(resolve_chat_template) == ["tokenizer", "chat_template", "tools", "model_config"]
    assert "given_format" in parameters(resolve_chat_template_content_format)
    # Ids: checked in one place, and shown by the renderer's own tokenizer.
    assert parameters(HfRenderer.validate_token_ids) == ["token_ids", "parameter"]
    assert parameters(HfRenderer._detokenize_prompt) == ["prompt"]
    # Read by whoever asks for end-of-text ids or default parameters.
    assert parameters(ModelConfig.try_get_generation_config) == []


def test_platform_hooks():
    from vllm.platforms.cpu import CpuPlatform

    assert parameters(CpuPlatform.validate_request) == ["processed_inputs", "params"]
    assert parameters(CpuPlatform.check_and_update_config) == ["vllm_config"]
    assert parameters(CpuPlatform.apply_config_platform_defaults) == ["vllm_config"]
    assert parameters(CpuPlatform.register_triton_kernel_overrides) == []


def test_stat_logger_interface():
    from vllm.v1.metrics.loggers import StatLoggerBase

    assert parameters(StatLoggerBase.__init__) == ["vllm_config", "engine_index"]
    assert parameters(StatLoggerBase.record) == [
        "scheduler_stats",
        "iteration_stats",
        "mm_cache_stats",
        "engine_idx",
    ]
