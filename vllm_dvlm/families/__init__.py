"""Model families, one file each, found by the ``architectures`` of a checkpoint's config.json.

Several families share a ``model_type``, so that tells nothing. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_dvlm.families.base import Family
from vllm_dvlm.families.lavida import LAVIDA_DREAM, LAVIDA_LLADA
from vllm_dvlm.families.llada_v import LLADA_V

FAMILIES: dict[str, Family] = {family.architecture: family for family in (LLADA_V, LAVIDA_LLADA, LAVIDA_DREAM)}


def family_named(architecture: str | None) -> Family:
    """The family of an architecture; the first one as long as none is named."""
    return FAMILIES.get(architecture or "", next(iter(FAMILIES.values())))


def family_of(architectures: Sequence[str] | None) -> Family:
    """The family of a checkpoint; ValueError naming the known architectures if it is none of ours."""
    for architecture in architectures or ():
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    known = ", ".join(FAMILIES)
    if not architectures:
        raise ValueError(f"config.json names no architectures; write one of {known} into it")
    raise ValueError(
        f"architectures {list(architectures)} of config.json are not known to vllm-dvlm, only {known}; a checkpoint of "
        "another family would be read with the wrong sizes"
    )
