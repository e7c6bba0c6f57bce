"""Families are declarations: engine parts read them and know none by name."""

import ast
from pathlib import Path

import vllm_dvlm
from vllm_dvlm.families import FAMILIES

PACKAGE = Path(vllm_dvlm.__file__).parent
# Where families, and models of ours, may be called by their names.
ROOMS = {"families", "models", "checkpoint", "bench", "reference", "synthetic", "patches", "tools"}


def names_of_families():
    texts = {text for f in FAMILIES.values() for text in (f.name, f.architecture, f.model_type)}
    return texts | {text for f in FAMILIES.values() for text in (f.tokens.mask, f.tokens.end_of_turn)}


def test_no_family_name_outside_its_rooms():
    """In code, not in comments and docstrings: those may give examples."""
    found, known = [], names_of_families()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ROOMS:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                found += [(path.name, node.lineno, name) for name in known if name in node.value]
    assert not found
