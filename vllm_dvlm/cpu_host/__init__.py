"""What a CPU host needs: a Triton backend flag, distribution metadata, a platform.

``platform_class`` is the entry point of the group ``vllm.platform_plugins``. Nothing here acts on a
host whose vLLM drives a real device.
"""


def platform_class() -> str | None:
    """Dotted name of the CPU platform on a CPU build of vLLM, None on every other host."""
    # Inside the function: vLLM calls it while `vllm.platforms` resolves the platform.
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        return None
    return "vllm_dvlm.cpu_host.platform.DvlmCpuPlatform"
