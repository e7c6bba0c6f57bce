"""Fixtures that several folders of tests share. Nothing heavy is imported before a fixture is used."""

from pathlib import Path

import pytest
from hypothesis import settings

# A shared machine may stall for longer than hypothesis lets one example take.
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")


# Two ranks wait for each other in busy loops: beside another test they crawl, and so does it. Ray starts ten processes.
EXCLUSIVE_FILES = {"test_two_ranks.py", "test_smoke.py"}


def pytest_ignore_collect(collection_path, config):
    """``-m exclusive`` reads no other files: with all that they import it would take longer to begin."""
    is_test = collection_path.match("test_*.py") and collection_path.name not in EXCLUSIVE_FILES
    return True if is_test and config.option.markexpr.startswith("exclusive") else None


# The longest, which start processes; the first is the longest.
LONGEST_FILES = [
    "test_server.py",
    "test_bench_abuse.py",
    "test_bench_pruning.py",
    "test_small_pool_server.py",
    "test_bench_lavida.py",
    "test_bench_quality.py",
    "test_own_process.py",
]


def pytest_collection_modifyitems(items):
    """Mark the tests that must run alone (`make test` runs the others two at a time), and order the files.

    Long files come first and quick ones last, so that no process waits for another's file; those that share an engine
    come one after another, so that it lives until the last of them.
    """
    shares = {item.path for item in items if "engine" in item.fixturenames and not hasattr(item.module, "engine")}
    for item in items:
        if item.path.name in EXCLUSIVE_FILES:
            item.add_marker(pytest.mark.exclusive)

    def place(item):
        name = item.path.name
        if name in LONGEST_FILES:
            return 0, LONGEST_FILES.index(name)
        return (1 if item.path in shares else 3 if "unit" in item.path.parts else 2), 0

    items.sort(key=place)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """``checkpoint(seed=0, ...)``: folder of the tiny golden checkpoint with these build arguments, built once."""
    from vllm_dvlm.synthetic import tiny_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")

    def build(**build_args) -> Path:
        return tiny_checkpoint.checkpoint(root, **build_args)

    return build


@pytest.fixture(scope="session")
def _end_of_engine():
    yield
    from tests.engine import engines

    engines.end_shared()


@pytest.fixture(scope="module")
def engine(_end_of_engine, checkpoint, tmp_path_factory):
    """The in-process engine that modules share: tests.engine.engines.Engine, with the weights of seed 0."""
    from tests.engine import engines

    made = engines.shared(checkpoint, tmp_path_factory)
    yield made
    if made.engine.has_unfinished_requests():  # of a test that failed
        engines.end_shared()


@pytest.fixture(scope="module")
def no_engine():
    """For modules with process groups of their own: vLLM's are global."""
    from tests.engine import engines

    engines.end_shared()


@pytest.fixture(scope="session")
def reference(checkpoint):
    """``reference(seed=0, ...)``: the dense model of that checkpoint, in float32 (vllm_dvlm.reference)."""
    import functools

    from vllm_dvlm.reference.model import ReferenceModel

    @functools.lru_cache(maxsize=3)
    def load(build_args):
        return ReferenceModel.load(checkpoint(**dict(build_args)))

    return lambda **build_args: load(tuple(sorted(build_args.items())))
