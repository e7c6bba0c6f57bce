"""A model of vLLM's own still runs on a CPU host with this plugin installed."""

import os
import subprocess
import sys

import pytest

from tests.engine.run_cases import ONE_PROCESS

SCRIPT = """
import sys
from vllm import LLM, SamplingParams

def main():
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, max_model_len=64, enforce_eager=True,
              kv_cache_memory_bytes=1 << 25, dtype="float32")
    # Sampling with top-k and top-p takes another way through vLLM than greedy decoding.
    for settings in ({"temperature": 0}, {"temperature": 1, "top_p": 0.9, "top_k": 8, "seed": 1}):
        params = SamplingParams(max_tokens=6, ignore_eos=True, detokenize=False, **settings)
        output = llm.generate([{"prompt_token_ids": [1, 2, 3]}] * 2, params, use_tqdm=False)
        print("tokens", len(output[1].outputs[0].token_ids))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_tiny_llama_generates(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env={k: v for k, v in os.environ.items() if not k.startswith("VLLM_")} | ONE_PROCESS,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.count("tokens 6") == 2, done.stderr[-3000:]
