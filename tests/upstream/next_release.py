"""What another vLLM would break, read from its Python sources; nothing of it is imported.

    pip download --no-deps vllm==0.33.0 && unzip -q vllm-0.33.0*.whl 'vllm/*.py' -d SOURCES
    python -m tests.upstream.next_release SOURCES

Prints a line for everything of vLLM that the package leans on and that is gone or reads otherwise there: names that are
imported, definitions that patches replace, methods that our classes override, fields of the settings classes.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "vllm_dvlm"
PATCHES = Path(__file__).parents[2] / "patches"
# Settings classes whose fields `upstream_settings.py` lists, and the parameters of a request.
CLASSES = {
    "vllm.config.model:ModelConfig": "ModelConfig",
    "vllm.config.multimodal:MultiModalConfig": "MultiModalConfig",
    "vllm.config.scheduler:SchedulerConfig": "SchedulerConfig",
    "vllm.config.cache:CacheConfig": "CacheConfig",
    "vllm.config.parallel:ParallelConfig": "ParallelConfig",
    "vllm.config.vllm:VllmConfig": "VllmConfig",
    "vllm.sampling_params:SamplingParams": "SamplingParams",
}


@dataclass(frozen=True)
class Finding:
    """kind: gone, changed, new field, field gone. name: ``module:qualname``. users: our files that lean on it."""

    kind: str
    name: str
    users: tuple[str, ...] = ()

    def __str__(self) -> str:
        users = f"  ({', '.join(self.users)})" if self.users else ""
        return f"{self.kind:<10} {self.name}{users}"


class Tree:
    """Python sources below a folder that holds ``vllm``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cache  # noqa: B019 - one tree per run
    def source(self, module: str) -> str | None:
        """Text of a module, None if it is not there."""
        path = self.root.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.read_text(encoding="utf-8")
        return None

    @functools.cache  # noqa: B019
    def definitions(self, module: str) -> dict[str, str]:
        """Qualified name -> source text of functions and classes of a module."""
        text, found = self.source(module) or "", {}

        def walk(nodes: list[ast.stmt], prefix: str) -> None:
            for node in nodes:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    found[prefix + node.name] = ast.unparse(_without_docs(node))
                    if isinstance(node, ast.ClassDef):
                        walk(node.body, f"{prefix}{node.name}.")
                elif isinstance(node, ast.If | ast.Try):
                    walk([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)], prefix)

        walk(ast.parse(text).body, "")
        return found

    @functools.cache  # noqa: B019
    def names(self, module: str) -> frozenset[str]:
        """Names that a module has at its top level, however they came there; submodules too."""
        text = self.source(module)
        if text is None:
            return frozenset()
        found: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                found.add(node.value)  # __all__ and lazy imports
        folder = self.root.joinpath(*module.split("."))
        if folder.is_dir():
            found |= {path.stem for path in folder.glob("*.py")} | {p.name for p in folder.iterdir() if p.is_dir()}
        return frozenset(found)

    def fields(self, name: str) -> list[str]:
        """Annotated fields of a class ``module:Class``."""
        module, _, qualname = name.partition(":")
        text = self.definitions(module).get(qualname)
        if text is None:
            return []
        (node,) = ast.parse(text).body
        return [
            each.target.id
            for each in node.body
            if isinstance(each, ast.AnnAssign)
            and isinstance(each.target, ast.Name)
            and "ClassVar" not in ast.unparse(each.annotation)
        ]


def _without_docs(node: ast.AST) -> ast.AST:
    """The same without docstrings, here and below: words change often and break nothing."""
    for each in ast.walk(node):
        body = getattr(each, "body", None)
        if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
            continue
        if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
            each.body = body[1:] or [ast.Pass()]
    return node


def installed() -> Tree:
    """The vLLM of this environment."""
    spec = importlib.util.find_spec("vllm")
    return Tree(Path(spec.origin).parents[1])


def _files() -> Iterator[tuple[str, ast.Module]]:
    for root in (PACKAGE, PATCHES):
        for path in sorted(root.rglob("*.py")):
            yield str(path.relative_to(root.parent)), ast.parse(path.read_text(encoding="utf-8"))


def imported() -> dict[tuple[str, str], list[str]]:
    """(module, name) of vLLM -> our files that import it."""
    found: dict[tuple[str, str], list[str]] = {}
    for file, tree in _files():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    found.setdefault((node.module, alias.name), []).append(file)
    return found


def overridden() -> dict[tuple[str, str, str], str]:
    """(module, class, method) of vLLM that a class of ours replaces -> our file."""
    found = {}
    for file, tree in _files():
        origin = {
            alias.asname or alias.name: node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm.")
            for alias in node.names
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            for base in node.bases:
                if isinstance(base, ast.Name) and base.id in origin:
                    found |= {(origin[base.id], base.id, method): file for method in methods}
    return found


def _home(tree: Tree, module: str, name: str, depth: int = 4) -> str | None:
    """Module that defines a name which ``module`` may only hand on."""
    if name in tree.definitions(module):
        return module
    text = tree.source(module)
    if text is None or not depth:
        return None
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            target = node.module or ""
            if node.level:
                parts = module.split(".")
                is_package = tree.root.joinpath(*parts).is_dir()
                base = parts[: len(parts) - node.level + is_package]
                target = ".".join([*base, *filter(None, [node.module])])
            return _home(tree, target, name, depth - 1)
    return None


def compare(old: Tree, new: Tree) -> list[Finding]:
    """Everything that differs and that this package leans on."""
    found = []
    for (module, name), users in sorted(imported().items()):
        if name not in new.names(module) and name in old.names(module):
            found.append(Finding("gone", f"{module}:{name}", tuple(sorted(set(users)))))
    for (module, cls, method), file in sorted(overridden().items()):
        home = _home(old, module, cls)
        if home is None or f"{cls}.{method}" not in old.definitions(home):
            continue  # a method of our own, or of a base class further up
        before, after = old.definitions(home)[f"{cls}.{method}"], new.definitions(home).get(f"{cls}.{method}")
        if before != after:
            found.append(Finding("gone" if after is None else "changed", f"{home}:{cls}.{method}", (file,)))
    for source in _patched():
        module, _, qualname = source.partition(":")
        before, after = old.definitions(module).get(qualname), new.definitions(module).get(qualname)
        if before != after:
            found.append(Finding("gone" if after is None else "changed", source, ("patches",)))
    for name in CLASSES:
        before, after = old.fields(name), new.fields(name)
        found += [Finding("new field", f"{name}.{field}") for field in after if field not in before]
        found += [Finding("field gone", f"{name}.{field}") for field in before if field not in after]
    return found


def _patched() -> list[str]:
    from vllm_dvlm.patches.vllm import (
        p001_cpu_torch_kernels,
        p002_validate_request,
        p003_serving,
        p004_waits_that_sleep,
    )

    modules = (p001_cpu_torch_kernels, p002_validate_request, p003_serving, p004_waits_that_sleep)
    patches = [patch for module in modules for patch in module.PATCHES]
    return sorted({source for patch in patches for source in (*patch.sources, patch.target)})


def main() -> None:
    found = compare(installed(), Tree(Path(sys.argv[1])))
    print("\n".join(map(str, found)) or "nothing that this package leans on differs")


if __name__ == "__main__":
    main()
