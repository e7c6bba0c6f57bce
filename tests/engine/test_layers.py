"""Who may import whom (style guide, 'Layout'): the pure parts stay pure, the front stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vllm_dvlm"

# File pattern -> modules that it must not import, at the top or inside a function.
FORBIDDEN = {
    "steps.py": ["torch", "vllm", "vllm_dvlm", "numpy"],
    "families/*.py": ["torch", "vllm", "transformers"],
    "option*.py": ["torch", "vllm"],
    "settings.py": ["torch", "vllm"],
    "refusals.py": ["torch", "vllm"],
    "placement.py": ["torch", "vllm"],
    "counters.py": ["torch", "vllm", "vllm_dvlm"],
    "request.py": ["torch", "vllm_dvlm.worker", "vllm_dvlm.models"],
    "denoise/*.py": ["vllm", "vllm_dvlm.worker", "vllm_dvlm.models", "vllm_dvlm.pruning", "vllm_dvlm.kv"],
    "pruning/*.py": ["vllm", "vllm_dvlm.worker", "vllm_dvlm.models", "vllm_dvlm.kv", "vllm_dvlm.denoise"],
    "kv/release.py": ["torch", "vllm_dvlm.worker"],
    "kv/compaction.py": ["vllm_dvlm.scheduler", "vllm_dvlm.worker"],
    # A layer may say which KV cache group it belongs to (kv.groups); moving and freeing rows is others' work.
    "models/*.py": [
        "vllm_dvlm.denoise",
        "vllm_dvlm.pruning",
        "vllm_dvlm.kv.compaction",
        "vllm_dvlm.kv.release",
        "vllm_dvlm.scheduler",
    ],
    # What a request's options come to, and its texts as tokens, come with the request.
    "worker/*.py": [
        "vllm_dvlm.scheduler",
        "vllm_dvlm.serving.admission",
        "vllm.tokenizers",
        *(f"vllm_dvlm.placement.{name}" for name in ("read", "place", "resolve", "draft_tokens")),
        "vllm_dvlm.options.parse",
    ],
    "worker/states.py": ["vllm_dvlm.pruning", "vllm_dvlm.kv"],
    "worker/sampler.py": ["vllm_dvlm.pruning", "vllm_dvlm.kv"],
    **{f"batch/{name}.py": ["torch", "vllm"] for name in ("rows", "ledger", "driver")},
    "scheduler.py": ["torch", "vllm_dvlm.worker", "vllm_dvlm.denoise", "vllm_dvlm.models"],
}

# The rooms of the package, a name for a folder or a file: each may use those of earlier rows only, so there is no
# circle.
ROOMS = (
    ("steps", "counters", "families", "option_checks", "sampling_parameters", "upstream", "patches", "cpu_host"),
    ("denoise", "kv", "pruning", "request", "upstream_settings"),
    ("options",),
    ("settings",),
    ("refusals",),
    ("placement", "canvas_events"),
    ("serving", "scheduler"),  # before the engine, and in its core
    ("checkpoint",),
    ("models",),
    ("worker",),
    ("batch",),
    ("cluster",),
    ("config",),
    ("synthetic",),
    ("reference",),
    ("bench",),
    ("tools",),
    ("examples",),
    ("cli",),
)
# vLLM asks the model's class for the worker's part of it.
HOOKS = {("models", "worker")}


def imports(path):
    """Dotted names of everything a file imports when it runs; blocks for type checkers are left out."""

    class Visitor(ast.NodeVisitor):
        names: set[str] = set()

        def visit_If(self, node):
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_Import(self, node):
            self.names |= {alias.name for alias in node.names}

        def visit_ImportFrom(self, node):
            self.names |= {f"{node.module}.{alias.name}" for alias in node.names}

    visitor = Visitor()
    visitor.names = set()
    visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    return visitor.names


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_forbidden_imports(pattern):
    paths = sorted(PACKAGE.glob(pattern))
    assert paths
    for path in paths:
        for name in imports(path):
            for forbidden in FORBIDDEN[pattern]:
                assert not f"{name}.".startswith(f"{forbidden}."), f"{path.name} imports {name}"


def test_rooms_use_those_of_earlier_rows_only():
    place = {name: number for number, names in enumerate(ROOMS) for name in names}
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":  # registers everything, by name
            continue
        assert own in place, f"{own} is in no row of ROOMS"
        for name in imports(path):
            used = name.split(".")[1] if name.startswith("vllm_dvlm.") else own
            if used in place and used != own and place[used] >= place[own]:
                found.add((own, used))
    assert found == HOOKS


def test_ray_is_known_in_one_room():
    """It is optional."""
    for path in PACKAGE.rglob("*.py"):
        names = imports(path)
        if path.relative_to(PACKAGE).parts[0] != "cluster":
            assert not any(f"{name}.".startswith("ray.") for name in names), path


def test_imports_are_found(tmp_path):
    """The check itself: inside functions too, and not what only type checkers see."""
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vllm\ndef f():\n    from torch import nn\n"
    )
    assert imports(file) == {"typing.TYPE_CHECKING", "torch.nn"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("vllm_dvlm", ["torch", "vllm", "numpy", "transformers"]),
        ("vllm_dvlm.steps", ["torch", "vllm", "numpy"]),
        ("vllm_dvlm.placement", ["torch", "vllm"]),
        ("vllm_dvlm.upstream", ["torch", "vllm"]),
        ("vllm_dvlm.denoise.step", ["vllm"]),
        ("vllm_dvlm.denoise.confidence", ["vllm"]),
    ],
)
def test_importing_stays_light(module, unwanted):
    code = f"import sys, {module}; sys.exit(', '.join(set({unwanted}) & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{module} imports {done.stderr}"
