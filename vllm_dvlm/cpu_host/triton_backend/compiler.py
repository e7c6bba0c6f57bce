"""The compiler half of the backend: refuses every target."""

from triton.backends.compiler import BaseBackend

_REFUSAL = "the Triton backend 'cpu' of vllm-dvlm is a name only and compiles nothing"


class CpuNameOnlyBackend(BaseBackend):
    """Concrete, as Triton demands one compiler class per backend, and never chosen."""

    @staticmethod
    def supports_target(target) -> bool:
        """False for every target."""
        return False

    def hash(self) -> str:
        """Constant: nothing is ever compiled, so nothing is ever cached."""
        return "vllm-dvlm-cpu"

    def parse_options(self, options: dict):
        """Raises NotImplementedError."""
        raise NotImplementedError(_REFUSAL)

    def add_stages(self, stages: dict, options, language) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError(_REFUSAL)

    def load_dialects(self, context) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError(_REFUSAL)

    def get_module_map(self) -> dict:
        """No device-specific modules."""
        return {}
