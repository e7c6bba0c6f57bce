"""Model families, one file each, found by the ``architectures`` of a checkpoint's config.json.

Several families share a ``model_type``, so that tells nothing. Standard library only.

Adding a family:

1. a file here with one ``Family`` (``base.py`` says what each field means) and a row in ``FAMILIES``: config hook,
   admission, renderer, scheduler and worker read it, and none of them knows its name;
2. a config class in ``models/`` that reads the checkpoint's config.json into the names of ``LlavaLLaDAConfig`` and
   says how images are laid out (``image_layout``);
3. a model class in ``models/``: a subclass of ``MaskedDiffusionVLM`` with its family and its names of tensors;
4. a chat template in ``chat_templates/`` if the conversation is a new one;
5. recorded runs of the official code under ``tests/golden/``, and a test that repeats them alone and in one batch;
6. where the family decodes in a way that no field can say, a new field with the others' value as default, read in
   ``refusals``, ``placement`` and the one place that acts on it; ``diffusion_*`` options where a request may choose;
7. a row in the README.
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
