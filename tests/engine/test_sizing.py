"""What `vllm-dvlm size` says by arithmetic, against a real engine: parameters, KV, steps."""

import pytest
from safetensors.torch import load_file

from tests.golden import cases
from vllm_dvlm.tools.sizing import arithmetic as sizes


def config(engine):
    return engine.runner.model_config.hf_config


def test_parameters(engine):
    """Of the checkpoint's tensors; vLLM packs them anew on a CPU, so its modules cannot be asked."""
    tensors = load_file(engine.folder / "model.safetensors")
    text = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
    # What stands behind the tower is not read.
    found = {name: tensor.numel() for name, tensor in tensors.items() if "post_layernorm" not in name}
    in_text = sum(num for name, num in found.items() if name.startswith(text))
    assert sizes.text_parameters(config(engine)) == in_text
    assert sizes.vision_parameters(config(engine)) == sum(found.values()) - in_text


def test_kv(engine):
    """Per token, over all layers; kernels of this host take heads of 32 channels at least."""
    (group,) = engine.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    spec = group.kv_cache_spec
    total = len(group.layer_names) * spec.page_size_bytes / spec.block_size
    assert sizes.kv_bytes_per_token(config(engine), bytes_per_number=4, head_multiple=32) == total


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("d1_blocks4_k2", sizes.Recipe("exact")),
        ("g7_fast_blocks_r32_none", sizes.Recipe("cached", refresh=32)),
        ("f1_redvtp_keep25", sizes.Recipe("pruned", keep=0.25)),
    ],
)
def test_steps(engine, name, recipe):
    """Tokens computed and attended to, step by step, of a recorded run."""
    case = cases.load(name)
    engine.run_case(case)
    ((first, end),) = case.visual_spans
    visual, settings = end - first, case.settings
    lengths = (settings[name] for name in ("gen_length", "block_length", "steps"))
    work = sizes.Work(case.prompt_len - visual, visual, *lengths)
    found = [(step.query_len, step.kv_len) for _, step, _, _ in sizes.course(work, recipe)]
    assert found == [(step["query_len"], step["seq_len"]) for step in engine.trace(name)["steps"]]
