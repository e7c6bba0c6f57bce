"""Let ``admission`` see every request before the engine does, on every platform.

vLLM calls ``current_platform.validate_request(engine_input, params)`` in the front end, the only place that sees the
expanded prompt together with its parameters and whose error becomes HTTP 400. The base class does nothing there.

A seam will not do: only a platform plugin can override the method, and a plugin that replaces the CUDA platform would
do so for every model on the host and for every vendor anew. vLLM's hook for custom parameters sees no prompt.
"""

from typing import Any

from vllm_dvlm.upstream import Patch, apply

_PROCESSOR = "vllm.v1.engine.input_processor:InputProcessor"

PATCHES = (
    Patch(
        target="vllm.platforms.interface:Platform.validate_request",
        upstream="none yet; an admission hook for models would be given prompt and parameters",
        reason="prompt + canvas > max_model_len must be HTTP 400, and no hook for plugins sees the prompt",
        expires="drop when vLLM lets a model or a plugin validate a rendered request",
        fingerprint="462817b5dabe42954dbe498e77d9d0732f20e988eb9171ca76618704b2fe25a8",
        test="tests/engine/test_errors.py",
        replacement=f"{__name__}:Checks.validate_request",
        # The order of the two calls that ``admission`` relies on stands in these.
        sources=(
            "vllm.platforms.interface:Platform.validate_request",
            f"{_PROCESSOR}.process_inputs",
            f"{_PROCESSOR}._validate_params",
        ),
    ),
)


class Checks:
    """Holds the replacement, so that it is bound like the class method in whose place it stands."""

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:
        """``admission.validate_request``; InvalidRequest becomes HTTP 400. Other models' requests pass."""
        from vllm_dvlm.serving import admission

        admission.validate_request(processed_inputs, params)


def install() -> None:
    """Put the replacement in place; raises UpstreamError when vLLM's code is not the one it was written for."""
    apply(PATCHES)
