"""The hook that checks and completes vLLM's configuration for masked-diffusion models.

What we need is set; what we cannot do is refused here, at start-up, with the remedy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.config import ModelConfig
from vllm.config.diffusion import DiffusionConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_dvlm.params import ServerSettings, resolve

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

SCHEDULER = "vllm_dvlm.scheduler.DiffusionScheduler"


class WholeSequenceModelConfig(ModelConfig):
    """A model's configuration that says what denoising cannot have.

    vLLM asks it for its defaults, which without us would be 'on', the same as an explicit flag.
    """

    @property
    def is_prefix_caching_supported(self) -> bool:
        """False: KV rows of a prompt depend on the canvas behind it, and pruning moves them."""
        return False

    @property
    def is_chunked_prefill_supported(self) -> bool:
        """False: the first forward pass is a denoising step over prompt and canvas together."""
        return False

    def get_diff_sampling_param(self) -> dict[str, Any]:
        """vLLM's defaults, and the length of a reply for requests that name none: else vLLM fills in all that fits.

        vLLM reads a length named by ``--override-generation-config`` or ``--generation-config FOLDER`` as an upper
        bound, too; so that one stays.
        """
        found = super().get_diff_sampling_param()
        is_named = "max_new_tokens" in self.override_generation_config or self.generation_config not in ("auto", "vllm")
        default = getattr(self.hf_config, "default_canvas_length", None)
        if not is_named and default is not None:
            found["max_tokens"] = default
        return found


class VerifyConfig(VerifyAndUpdateConfig):
    """Configuration of every family: called by vLLM for each of our architectures."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Ids, renderer and default sampling parameters."""
        from vllm.tokenizers import cached_tokenizer_from_config

        from vllm_dvlm.models.configuration import resolve_token_ids
        from vllm_dvlm.models.renderer import configure_model

        configure_model(model_config)
        # There is no seam for it: the two properties are asked between the two hooks, and fields do not feed them.
        model_config.__class__ = WholeSequenceModelConfig
        config = model_config.hf_config
        ids = resolve_token_ids(config, cached_tokenizer_from_config(model_config))
        config.mask_token_id = ids.mask_token_id
        config.end_of_turn_token_id = ids.end_of_turn_token_id
        # The reference decodes greedily unless told otherwise; OpenAI's own default would be 1. What else a
        # checkpoint's generation_config.json may suggest is not for masked diffusion, and would refuse every request.
        neutral = {"temperature": 0.0, "repetition_penalty": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        for name, value in neutral.items():
            model_config.override_generation_config.setdefault(name, value)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Scheduler, budgets and switches; ValueError for what is not supported."""
        _choose_runner()
        _refuse(vllm_config)
        settings = ServerSettings.from_additional_config(vllm_config.additional_config)
        model_config = vllm_config.model_config
        settings = settings.for_model(model_config.hf_config.num_hidden_layers, model_config.hf_config.family)
        model_config.hf_config.default_canvas_length = settings.default_canvas_length
        # Defaults that no request could be served with are refused here rather than request by request.
        resolve({}, None, settings)
        scheduler_config = vllm_config.scheduler_config
        _choose_dtype(model_config, settings)
        vllm_config.additional_config = {**(vllm_config.additional_config or {}), "dvlm": settings.to_mapping()}
        # Canvases live on the worker, so nothing travels over vLLM's draft-token path; but a config must be there,
        # and its length sizes per-request buffers (a structured-output bitmask of length x vocabulary among them).
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=1)
        scheduler_config.scheduler_cls = SCHEDULER
        scheduler_config.async_scheduling = False
        scheduler_config.enable_chunked_prefill = False
        # Another way of cutting a long query.
        scheduler_config.long_prefill_token_threshold = 0
        vllm_config.cache_config.enable_prefix_caching = False
        vllm_config.attention_config.use_non_causal = True
        _run_eagerly(vllm_config)
        if settings.max_image_tiles is not None:
            model_config.hf_config.max_image_tiles = settings.max_image_tiles
        # A denoising step runs as a whole: the longest request must fit into one step's budget, and so must its
        # images. vLLM copied the encoder's budgets from the old value before this hook.
        budget = max(scheduler_config.max_num_batched_tokens, model_config.max_model_len)
        scheduler_config.max_num_batched_tokens = budget
        scheduler_config.max_num_scheduled_tokens = None
        scheduler_config.max_num_encoder_input_tokens = max(scheduler_config.max_num_encoder_input_tokens, budget)
        scheduler_config.encoder_cache_size = max(scheduler_config.encoder_cache_size, budget)
        validator = f"vllm_dvlm.admission:Options_{settings.to_name()}"
        processors = list(model_config.logits_processors or [])
        if validator not in processors:
            model_config.logits_processors = [*processors, validator]
        logger.info(
            "vllm_dvlm: max_canvas_length=%d, max_image_tiles=%s, trace_dir=%s, request defaults %s",
            settings.max_canvas_length,
            settings.max_image_tiles,
            settings.trace_dir,
            settings.defaults,
        )


def _choose_runner() -> None:
    """On a CPU host, Model Runner V2 even if a model of vLLM's own was built in this process before."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm_dvlm.cpu_host.platform import DvlmCpuPlatform

        DvlmCpuPlatform.choose_runner(is_ours=True)


def _run_eagerly(vllm_config: VllmConfig) -> None:
    """No compiler and no CUDA graphs.

    A step that prunes changes its number of rows between two layers and builds attention metadata twice, which
    backends that prepare a graph keep in one buffer (FlashAttention 3: the second overwrites the first). Without the
    compiler vLLM uses its own kernels for norms, rotary embedding and activation, which it else leaves to it.
    """
    from vllm.config import CompilationMode, CUDAGraphMode

    config = vllm_config.compilation_config
    if config.mode is None:
        config.mode = CompilationMode.NONE
    config.cudagraph_mode = CUDAGraphMode.NONE


def _choose_dtype(model_config: ModelConfig, settings: ServerSettings) -> None:
    """float32 on a CPU host unless ``cpu_dtype`` asks for bfloat16.

    vLLM resolves a float32 checkpoint to bfloat16 there, which few CPUs multiply fast and none exactly; by the time
    this hook runs, an explicit --dtype cannot be told from that. Half precision is not usable on CPUs at all.
    """
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    wanted = getattr(torch, settings.cpu_dtype)
    if model_config.dtype != wanted:
        logger.info("CPU host: using %s instead of %s (server setting cpu_dtype)", wanted, model_config.dtype)
        model_config.dtype = wanted


def _refuse(vllm_config: VllmConfig) -> None:
    """ValueError with the remedy for every setting that these models cannot run with."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    model_config = vllm_config.model_config
    parallel = vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config
    cache = vllm_config.cache_config
    problems = [
        (
            not vllm_config.use_v2_model_runner,
            "needs Model Runner V2: unset VLLM_USE_V2_MODEL_RUNNER or set it to 1",
        ),
        (parallel.pipeline_parallel_size > 1, "has no pipeline parallelism: use --tensor-parallel-size instead"),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "has no context parallelism: leave the context parallel sizes at 1",
        ),
        (
            vllm_config.kv_transfer_config is not None,
            "rewrites KV rows while a request lives: remove --kv-transfer-config",
        ),
        (vllm_config.speculative_config is not None, "is not autoregressive: remove --speculative-config"),
        (vllm_config.lora_config is not None, "has no LoRA support: remove --enable-lora"),
        (
            cache.cache_dtype not in ("auto", "float16", "bfloat16"),
            f"turns and moves KV rows, which --kv-cache-dtype {cache.cache_dtype} does not allow: use auto",
        ),
        (
            vllm_config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE),
            "changes the number of rows inside a step: remove cudagraph_mode from --compilation-config",
        ),
        (
            vllm_config.attention_config.backend is AttentionBackendEnum.FLASHINFER,
            "plans attention twice in a step, FLASHINFER once: remove --attention-backend",
        ),
        (scheduler.async_scheduling is True, "must see a step's result before the next: remove --async-scheduling"),
        (
            cache.enable_prefix_caching,
            "recomputes and rewrites the KV rows of its prompt: remove --enable-prefix-caching",
        ),
        (
            scheduler.enable_chunked_prefill,
            "computes prompt and canvas in one denoising step: remove --enable-chunked-prefill",
        ),
        (
            scheduler.max_num_scheduled_tokens not in (None, scheduler.max_num_batched_tokens),
            "runs whole steps: use --max-num-batched-tokens instead of --max-num-scheduled-tokens",
        ),
        (model_config.enable_prompt_embeds, "takes text and token prompts only: remove --enable-prompt-embeds"),
    ]
    for refused, remedy in problems:
        if refused:
            raise ValueError(f"{model_config.hf_config.family.name} {remedy}")
