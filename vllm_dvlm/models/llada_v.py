"""LLaDA-V as vLLM loads it. Source: tests/golden/llada_v/README.md, "The checkpoint" and points 10 to 16."""

from __future__ import annotations

from vllm_dvlm.families import LLADA_V
from vllm_dvlm.models.masked_diffusion import MaskedDiffusionVLM


class LlavaLLaDAModelLM(MaskedDiffusionVLM):
    """The model class for ``architectures: ["LlavaLLaDAModelLM"]``; its checkpoint has Llama's names."""

    family = LLADA_V
