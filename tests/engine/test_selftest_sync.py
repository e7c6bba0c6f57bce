"""The self-test's sync check on a real engine, with torch's debug mode recorded: there is no GPU to wait for."""

import warnings

import pytest
from vllm.model_executor.layers import linear

from tests.engine.engines import case_params, case_prompt, tokens
from tests.golden import cases
from vllm_dvlm.tools.selftest import report
from vllm_dvlm.tools.selftest.sync import check_sync
from vllm_dvlm.worker import sampler

CASE = cases.load("a1_text_single_block")
WAITS = """
def waiting(self, *args):
    if mode.now in modes and mode.now == "warn":
        warnings.warn("called a synchronizing CUDA operation")
    if mode.now in modes and mode.now == "error":
        raise RuntimeError("called a synchronizing CUDA operation")
    return inner(self, *args)
"""


class Mode:
    """In the place of torch.cuda.set_sync_debug_mode."""

    def __init__(self):
        self.now, self.seen = "default", []

    def __call__(self, mode):
        self.now = mode
        self.seen.append(mode)


@pytest.fixture
def mode():
    return Mode()


@pytest.fixture
def check(engine, mode):
    engine.use(CASE.build_args)
    classes = type(engine.model_state), type(engine.model), type(engine.sampler)
    alone = []

    def generate():
        assert mode.now == "default"
        alone.append(tokens(engine.run_one(case_prompt(CASE), case_params(CASE))))

    yield lambda: check_sync(engine.runner, generate, mode)
    assert classes == (type(engine.model_state), type(engine.model), type(engine.sampler))
    assert alone and all(found == CASE.final_ids for found in alone)


def test_nothing_waits(check, mode):
    assert check() == (report.PASS, "no waits within steps, in a batch of every kind (0 in vLLM's code)", "")
    parts = [mode.seen[i : i + 2] for i in range(0, len(mode.seen), 2)]
    num = len(parts) // 2
    # Four parts in every step, and the first of them after admission.
    assert parts == [["warn", "default"]] * num + [["error", "default"]] * num and num % 4 == 0 and num >= 16


@pytest.mark.parametrize("modes, line", [({"warn", "error"}, 4), ({"error"}, 6)], ids=["warn", "error"])
def test_a_wait_of_ours_fails(check, mode, monkeypatch, engine, modes, line):
    names = {"mode": mode, "modes": modes, "inner": sampler.DiffusionSampler._logits, "warnings": warnings}
    exec(compile(WAITS, sampler.__file__, "exec"), names)  # a line of that file waits
    monkeypatch.setattr(sampler.DiffusionSampler, "_logits", names["waiting"])
    status, detail, remedy = check()
    assert (status, detail) == (report.FAIL, f"waits in sampler.py:{line}") and "--json" in remedy
    end_requests(engine)


def test_a_wait_of_vllm_is_named_and_no_failure(check, mode, monkeypatch, engine):
    names = {"mode": mode, "modes": {"warn", "error"}, "inner": linear.LinearBase.forward, "warnings": warnings}
    layer = linear.QKVParallelLinear
    names["inner"] = layer.forward
    exec(compile(WAITS, linear.__file__, "exec"), names)
    monkeypatch.setattr(layer, "forward", names["waiting"])
    status, detail, remedy = check()
    assert status == report.PASS and detail.endswith("vLLM waits in linear.py:6") and not remedy
    end_requests(engine)


def end_requests(engine):
    """Those that an error in a step left behind."""
    engine.engine.abort_request(["alone"])
    engine.finish()
    engine.assert_idle()
