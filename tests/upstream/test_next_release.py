"""The reader of another vLLM's sources sees what is gone and what has changed."""

import shutil

from tests.upstream import next_release


def test_the_installed_one_equals_itself():
    tree = next_release.installed()
    assert next_release.compare(tree, tree) == []
    assert len(next_release.imported()) > 100 and len(next_release.overridden()) > 20
    assert all(tree.fields(name) for name in next_release.CLASSES)


def test_what_moved_is_named(tmp_path):
    old = next_release.installed()
    modules = {module for module, _ in next_release.imported()} | {n.partition(":")[0] for n in next_release.CLASSES}
    modules |= {source.partition(":")[0] for source in next_release._patched()}
    modules |= {next_release._home(old, module, cls) or module for module, cls, _ in next_release.overridden()}
    for module in filter(old.source, modules):
        path = old.root.joinpath(*module.split("."))
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        target = tmp_path / file.relative_to(old.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    for package in {module for module in modules if old.root.joinpath(*module.split(".")).is_dir()}:
        for each in old.root.joinpath(*package.split(".")).iterdir():  # names of submodules
            if each.suffix == ".py" and not tmp_path.joinpath(*package.split("."), each.name).exists():
                tmp_path.joinpath(*package.split("."), each.name).touch()
            elif each.is_dir():
                tmp_path.joinpath(*package.split("."), each.name).mkdir(exist_ok=True)
    assert next_release.compare(old, next_release.Tree(tmp_path)) == []

    def change(module, before, after):
        file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        text = file.read_text()
        assert before in text
        file.write_text(text.replace(before, after))

    change("vllm.v1.worker.gpu.model_states.interface", "def remove_request(", "def drop_request(")
    change("vllm.v1.worker.gpu.attn_utils", "def build_attn_metadata", "def make_attn_metadata")
    change("vllm.config.cache", "class CacheConfig:", "class CacheConfig:\n    warmth: int = 3")
    change("vllm.platforms.interface", "def validate_request", "def check_request")
    found = {str(finding).split("  (")[0] for finding in next_release.compare(old, next_release.Tree(tmp_path))}
    assert found == {
        "gone       vllm.v1.worker.gpu.model_states.interface:ModelState.remove_request",
        "gone       vllm.v1.worker.gpu.attn_utils:build_attn_metadata",
        "new field  vllm.config.cache:CacheConfig.warmth",
        "gone       vllm.platforms.interface:Platform.validate_request",
    }
