"""The hook that checks and completes vLLM's configuration for masked-diffusion models.

What we need is set; what we cannot do is refused here, at start-up, with the remedy.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.config import ModelConfig
from vllm.config.diffusion import DiffusionConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_dvlm import upstream_settings
from vllm_dvlm.placement import resolve
from vllm_dvlm.sampling_parameters import FAMILY_PARAMETERS
from vllm_dvlm.settings import ServerSettings
from vllm_dvlm.upstream_settings import SCHEDULER, VALIDATOR_PREFIX

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_dvlm.families import Family

logger = init_logger(__name__)


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

    def try_get_generation_config(self) -> dict[str, Any]:
        """What the user names; the checkpoint's own generation_config.json is for autoregressive decoding.

        The official code reads none of it. Its end-of-text ids would end replies, its lengths would bound them.
        """
        return {} if self.generation_config in ("auto", "vllm") else super().try_get_generation_config()


class VerifyConfig(VerifyAndUpdateConfig):
    """Configuration of every family: called by vLLM for each of our architectures."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Ids, renderer and default sampling parameters."""
        from vllm.tokenizers import cached_tokenizer_from_config

        from vllm_dvlm.checkpoint.configuration import resolve_token_ids
        from vllm_dvlm.checkpoint.renderer import configure_model

        _refuse_model_settings(model_config)
        configure_model(model_config)
        # There is no seam for it: the two properties are asked between the two hooks, and fields do not feed them.
        model_config.__class__ = WholeSequenceModelConfig
        config = model_config.hf_config
        ids = resolve_token_ids(config, cached_tokenizer_from_config(model_config))
        config.mask_token_id = ids.mask_token_id
        config.end_of_turn_token_id = ids.end_of_turn_token_id
        _choose_sampling_defaults(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Scheduler, budgets and switches; ValueError for what is not supported."""
        from vllm.platforms import current_platform

        from vllm_dvlm.models import whole_attention

        _choose_runner()
        _refuse(vllm_config)
        settings = ServerSettings.from_additional_config(vllm_config.additional_config)
        model_config = vllm_config.model_config
        settings = settings.for_model(model_config.hf_config.num_hidden_layers, model_config.hf_config.family)
        if settings.late_group_start() is not None and not _has_kv_groups(vllm_config):
            logger.info("All layers share one KV cache group: vLLM's manager of several groups is off")
            settings = replace(settings, fastv_kv_groups="one")
        # Defaults that no request could be served with are refused here rather than request by request.
        resolve({}, None, settings)
        scheduler_config = vllm_config.scheduler_config
        _choose_dtype(model_config, settings)
        # Refused here rather than in the worker, where the reason would stand between tracebacks.
        whole_attention.choose(settings.attention_whole, current_platform.device_type, model_config.dtype)
        _name_processors_that_do_nothing(model_config.hf_config.family)
        _copy_towers_that_cannot_be_cut(vllm_config)
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
        validator = f"{VALIDATOR_PREFIX}{settings.to_name()}"
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


# Values of vLLM's sampling defaults that ask for nothing.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
}


def _choose_sampling_defaults(model_config: ModelConfig) -> None:
    """Greedy unless told otherwise, as the reference; OpenAI's own default would be a temperature of 1.

    ValueError for a --generation-config that suggests what would refuse every request.
    """
    named = model_config.try_get_generation_config() | model_config.override_generation_config
    family = model_config.hf_config.family
    for name, neutral in _NEUTRAL.items():
        if family.has_top_k_top_p and name in FAMILY_PARAMETERS:
            continue
        if named.get(name) not in (None, *neutral):
            _raise(
                f"takes no {name}, which --generation-config {model_config.generation_config} suggests "
                f"({named[name]}): remove it there, or undo it with --override-generation-config "
                f"'{{\"{name}\": {neutral[0]}}}'",
                model_config,
            )
    if "temperature" not in named:
        model_config.override_generation_config.setdefault("temperature", 0.0)


def _refuse_model_settings(model_config: ModelConfig) -> None:
    """ValueError with the remedy for a setting of the model that cannot be, before anything depends on it."""
    found = upstream_settings.problem(model_config, "ModelConfig")
    if found is None and model_config.multimodal_config is not None:
        found = upstream_settings.problem(model_config.multimodal_config, "MultiModalConfig")
    _raise(found, model_config)


def _refuse(vllm_config: VllmConfig) -> None:
    """ValueError with the remedy for every other setting that these models cannot run with."""

    def refuse(problem: str | None) -> None:
        _raise(problem, vllm_config.model_config)

    if not vllm_config.use_v2_model_runner:
        refuse("needs Model Runner V2: unset VLLM_USE_V2_MODEL_RUNNER or set it to 1")
    refuse(upstream_settings.environment_problem(lambda name: bool(getattr(envs, name))))
    refuse(upstream_settings.misplaced(vllm_config.additional_config, ServerSettings.names()))
    refuse(upstream_settings.problem(vllm_config.scheduler_config, "SchedulerConfig"))
    refuse(upstream_settings.problem(vllm_config.cache_config, "CacheConfig"))
    refuse(upstream_settings.problem(vllm_config.parallel_config, "ParallelConfig"))
    refuse(upstream_settings.problem(vllm_config, "VllmConfig"))
    if (found := _ray_problem(vllm_config)) is not None:
        raise ValueError(f"--distributed-executor-backend ray: {found}")
    text = vllm_config.model_config.hf_config
    refuse(
        upstream_settings.tensor_parallel_problem(
            vllm_config.parallel_config.tensor_parallel_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            text.intermediate_size,
        )
    )


def _ray_problem(vllm_config: VllmConfig) -> str | None:
    """What is wrong with the Ray cluster that the ranks are to run on; None without Ray, and inside a Ray program."""
    from vllm.platforms import current_platform

    from vllm_dvlm.cluster import head

    parallel = vllm_config.parallel_config
    if not parallel.use_ray or parallel.placement_group is not None or head.is_connected():
        return None
    own = 0 if current_platform.is_cpu() else current_platform.device_count()
    return head.problem(parallel.world_size, current_platform.ray_device_key, own)


def _name_processors_that_do_nothing(family: Family) -> None:
    """Packages may bring logits processors, which vLLM loads for every model; nobody asked for them by a flag."""
    names = sorted(point.name for point in entry_points(group="vllm.logits_processors"))
    if names:
        logger.warning("Installed logits processors do not act on %s: %s", family.name, ", ".join(names))


def _raise(problem: str | None, model_config: ModelConfig) -> None:
    if problem is not None:
        raise ValueError(f"{model_config.hf_config.family.name} {problem}")


def _has_kv_groups(vllm_config: VllmConfig) -> bool:
    """False where vLLM puts all layers into one KV cache group: by --disable-hybrid-kv-cache-manager or platform."""
    from vllm.platforms import current_platform

    is_off = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    return not is_off and current_platform.support_hybrid_kv_cache()


def _copy_towers_that_cannot_be_cut(vllm_config: VllmConfig) -> None:
    """Where the ranks do not divide the vision tower, each holds it whole and takes its share of the tiles."""
    size, model_config = vllm_config.parallel_config.tensor_parallel_size, vllm_config.model_config
    tower = getattr(model_config.hf_config, "vision_config", None)
    if tower is None or model_config.multimodal_config is None:
        return
    if tower.num_attention_heads % size or tower.intermediate_size % size:
        logger.info(
            "The vision tower's %d heads cannot be cut into %d parts: every rank holds the whole tower "
            "(--mm-encoder-tp-mode data)",
            tower.num_attention_heads,
            size,
        )
        model_config.multimodal_config.mm_encoder_tp_mode = "data"
