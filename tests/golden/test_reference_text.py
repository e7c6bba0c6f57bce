"""The reference's text stack against transformers' own Llama and Qwen2 with a full mask."""

import functools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from vllm_dvlm.reference.lavida_model import LavidaModel
from vllm_dvlm.reference.model import ReferenceModel
from vllm_dvlm.synthetic import tiny_checkpoint, tiny_lavida
from vllm_dvlm.synthetic.lavida_files import DREAM, LLADA

MODELS = {
    "llada_v": (ReferenceModel, functools.partial(tiny_checkpoint.checkpoint, seed=0), LlamaConfig, LlamaForCausalLM),
    "lavida": (LavidaModel, functools.partial(tiny_lavida.checkpoint, kind=LLADA), LlamaConfig, LlamaForCausalLM),
    # Grouped KV heads, and biases of q, k and v.
    "dream": (LavidaModel, functools.partial(tiny_lavida.checkpoint, kind=DREAM), Qwen2Config, Qwen2ForCausalLM),
}


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_same_logits_as_transformers(name, tmp_path_factory):
    reference, build, config_class, model_class = MODELS[name]
    text = reference.load(build(tmp_path_factory.getbasetemp() / "checkpoints")).text
    config = config_class(
        vocab_size=len(text.head),
        hidden_size=text.embedding.shape[1],
        intermediate_size=text.layers[0]["down"].shape[1],
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        rms_norm_eps=text.eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.theta},
    )
    other = model_class(config).eval()
    tensors = {"model.embed_tokens.weight": text.embedding, "lm_head.weight": text.head, "model.norm.weight": text.norm}
    for i, layer in enumerate(text.layers):
        prefix = f"model.layers.{i}."
        for kind in ("weight", "bias") if "qkv_bias" in layer else ("weight",):
            joined = layer["qkv" if kind == "weight" else "qkv_bias"].split(text.widths)
            tensors |= {f"{prefix}self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", joined, strict=True)}
        gate, up = layer["gate_up"].chunk(2)
        tensors |= {f"{prefix}mlp.gate_proj.weight": gate, f"{prefix}mlp.up_proj.weight": up}
        tensors |= {f"{prefix}mlp.down_proj.weight": layer["down"], f"{prefix}self_attn.o_proj.weight": layer["out"]}
        tensors |= {f"{prefix}input_layernorm.weight": layer["norm1"]}
        tensors |= {f"{prefix}post_attention_layernorm.weight": layer["norm2"]}
    other.load_state_dict(tensors)  # every weight has its place, and no other
    ids = torch.randint(0, 1000, (1, 40), generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 1, 40, 40)  # added to the scores: everything sees everything
    theirs = other(ids, attention_mask=mask).logits
    ours = text.logits(text.forward(text.embedding[ids]))
    assert torch.allclose(ours, theirs, atol=1e-4) and torch.equal(ours.argmax(-1), theirs.argmax(-1))
    # Whether a row sees what comes after it shows: the test could fail.
    causal = other(ids).logits
    assert not torch.allclose(ours[:, :-1], causal[:, :-1], atol=0.1)
