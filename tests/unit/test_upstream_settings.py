"""The table of vLLM's settings: rules that need no vLLM."""

import pytest

from vllm_dvlm.settings import ServerSettings
from vllm_dvlm.upstream_settings import misplaced, tensor_parallel_problem, unservable


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "width", "use"),
    [
        (1, 5, 5, 7, None),
        (2, 4, 4, 336, None),
        (4, 8, 2, 64, None),  # key-value heads are copied
        (3, 4, 4, 336, "use 1, 2, 4"),
        (6, 12, 4, 48, "use 1, 2, 4, 12"),  # 4 key-value heads go neither way
        (2, 4, 4, 45, "use 1$"),  # the MLP
        (2, 5, 5, 40, "use 1, 5"),
    ],
)
def test_sizes_that_divide(size, heads, kv_heads, width, use):
    found = tensor_parallel_problem(size, heads, kv_heads, width)
    if use is None:
        assert found is None
    else:
        assert f"--tensor-parallel-size {size} does not divide" in found
        assert found.endswith(use.rstrip("$")) and f"{heads} attention heads" in found


@pytest.mark.parametrize("key", ["dlvm", "DVLM", "vllm-dvlm", "dvlm_", "diffusion_threshold", "max_canvas_length"])
def test_settings_in_the_wrong_place(key):
    assert "dvlm" in misplaced({key: {}}, ServerSettings.names())


@pytest.mark.parametrize("config", [None, {}, {"dvlm": {}}, {"other_plugin": 1, "dvlm": {}}, {"x" * 10**6: 1}])
def test_settings_of_others_pass(config):
    assert misplaced(config, ServerSettings.names()) is None


def test_defaults_that_would_refuse_every_request():
    assert unservable({"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 5, "eos_token_id": 3}) == []
    assert unservable({"top_p": 0.9, "top_k": 0, "presence_penalty": 1}) == ["top_p", "presence_penalty"]
