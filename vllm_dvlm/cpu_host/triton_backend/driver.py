"""The driver half of the backend: never active."""

from triton.backends.driver import DriverBase

_REFUSAL = "the Triton backend 'cpu' of vllm-dvlm is a name only and runs nothing"


class CpuNameOnlyDriver(DriverBase):
    """Concrete, as Triton demands one driver class per backend, and never active."""

    @classmethod
    def is_active(cls) -> bool:
        """False on every host: Triton must not count us beside, or instead of, a real driver."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Raises NotImplementedError."""
        raise NotImplementedError(_REFUSAL)

    def get_current_target(self):
        """Raises NotImplementedError."""
        raise NotImplementedError(_REFUSAL)

    def get_active_torch_device(self):
        """Raises NotImplementedError."""
        raise NotImplementedError(_REFUSAL)

    def get_benchmarker(self):
        """Raises NotImplementedError."""
        raise NotImplementedError(_REFUSAL)
