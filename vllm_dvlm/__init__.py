"""Masked-diffusion vision-language models in vLLM.

Importing this package imports neither torch nor vLLM; ``register()`` does the work.
"""

from vllm_dvlm.families import FAMILIES

ARCHITECTURES = frozenset(FAMILIES)

_registered = False


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; vLLM calls it in every process.

    Twice is as good as once. Raises UpstreamError when the installed vLLM is not supported.
    """
    global _registered
    if _registered:
        return

    from vllm_dvlm import upstream

    upstream.check_version()

    import logging

    import torch
    from transformers import AutoConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform

    from vllm_dvlm.checkpoint.configuration import checkpoint_config
    from vllm_dvlm.checkpoint.dream_tokenizer import register_tokenizer
    from vllm_dvlm.checkpoint.renderer import register_renderer
    from vllm_dvlm.config import VerifyConfig
    from vllm_dvlm.patches.vllm import p001_cpu_torch_kernels, p002_validate_request, p004_waits_that_sleep

    upstream.check(p002_validate_request.PATCHES)
    if not current_platform.is_cpu():
        p002_validate_request.install()  # a CPU host's platform class is ours and does the same
    else:
        # Only checked here, to fail at start-up; an engine and a worker on the CPU device install them.
        upstream.check([*p001_cpu_torch_kernels.PATCHES, *p004_waits_that_sleep.PATCHES])
        # vLLM's bf16 attention kernel uses AMX tiles without asking Linux for permission and lives
        # on oneDNN having asked before. A small model may not reach oneDNN first: SIGILL. Permission
        # is per process and lost at exec, hence here.
        if torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()

    # vLLM gives level and handlers to its own loggers only; without them our lines at start-up are not shown.
    logging.getLogger(__name__).parent = logging.getLogger("vllm")
    for model_type in {family.model_type for family in FAMILIES.values()}:
        AutoConfig.register(model_type, checkpoint_config(model_type), exist_ok=True)
    for architecture, family in FAMILIES.items():
        # As strings: vLLM imports the class where a model is really loaded.
        ModelRegistry.register_model(architecture, family.model)
        MODELS_CONFIG_MAP[architecture] = VerifyConfig
    register_tokenizer()
    register_renderer()
    _registered = True
