"""A model of vLLM's own still runs on a CPU host with this plugin installed, under vLLM's own scheduler, which behaves
as ours counts on."""

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
    engine, params = llm.llm_engine, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, detokenize=False)
    scheduler = engine.engine_core.engine_core.scheduler
    whole = scheduler.schedule
    for name in ("kept", "held", "failed"):
        engine.add_request(name, {"prompt_token_ids": [1, 2, 3]}, params)
    engine.step()
    held = next(r for r in scheduler.running if r.request_id.startswith("held"))
    before, seen = held.num_computed_tokens, []

    def without_held(*args):
        place = scheduler.running.index(held)
        scheduler.running.remove(held)
        output = whole(*args)
        scheduler.running.insert(place, held)
        seen.append(held.request_id in output.num_scheduled_tokens)
        return output

    scheduler.schedule = without_held
    engine.step()
    scheduler.schedule = whole
    print("held back", seen, held.num_computed_tokens - before, len(scheduler.finished_req_ids))
    (failed,) = [r.request_id for r in scheduler.running if r.request_id.startswith("failed")]
    scheduler.encoder_cache_mismatch_reqs.add(failed)
    done = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
    print("equal", list(done["kept"].token_ids) == list(done["held"].token_ids), len(done["held"].token_ids))
    print("failed", done["failed"].finish_reason)

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
    # A request that is not among those running for one call is not computed, loses nothing and goes on.
    assert "held back [False] 0 0" in done.stdout and "equal True 6" in done.stdout, done.stdout[-2000:]
    # Whoever is in encoder_cache_mismatch_reqs ends with an error, and takes nobody along.
    assert "failed error" in done.stdout, done.stdout[-2000:]
