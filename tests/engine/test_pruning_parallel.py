"""Pruning under tensor parallelism: every rank keeps the same visual tokens, those that one rank keeps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.engine import pruned_reference
from tests.engine.pruned_checks import assert_clear
from tests.golden import cases

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
from tests.golden import cases
from tests.engine.engines import case_params, case_prompt
if __name__ == "__main__":
    from vllm import LLM
    folder, traces, out, *names = sys.argv[1:]
    llm = LLM(folder, tensor_parallel_size=2, distributed_executor_backend="mp", max_model_len=2048, max_num_seqs=4,
              max_num_batched_tokens=4096, limit_mm_per_prompt={"image": 1}, kv_cache_memory_bytes=32 * 2**20,
              additional_config={"dvlm": {"trace_dir": traces}})
    recorded = [cases.load(name) for name in names]
    params = [case_params(case) for case in recorded]
    params.append(case_params(recorded[0], extra_args={"diffusion_refresh_interval": 32}))
    params.append(case_params(recorded[0], extra_args={"prune_method": "fastv", "diffusion_refresh_interval": 32}))
    prompts = [case_prompt(case) for case in recorded + [recorded[0]] * 2]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    with open(out, "w") as file:
        json.dump([[o.request_id, list(o.outputs[0].token_ids)] for o in outputs], file)
"""


def test_two_ranks_keep_the_same(checkpoint, reference, tmp_path):
    """Exact as recorded, cached and with fastv as the dense reference; ranks that disagree would give other tokens."""
    batch = [cases.load("f1_redvtp_keep25"), cases.load("f2_redvtp_keep50")]
    model = reference(seed=0)
    prompt = pruned_reference.case_prompt(model, batch[0])
    options = cases.extra_args(batch[0]) | {"diffusion_refresh_interval": 32}
    dense = [pruned_reference.decode(model, prompt, options | more) for more in ({}, {"prune_method": "fastv"})]
    for result in dense:
        assert_clear(result)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    script, out = tmp_path / "two_ranks.py", tmp_path / "results"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, checkpoint(seed=0), tmp_path, out, *(case.name for case in batch)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(out.read_text())
    expected = [case.final_ids for case in batch] + [result.canvas for result in dense]
    assert [tokens for _, tokens in results] == expected
    kept = [case.pruning["kept_local_indices"] for case in batch]
    kept += [result.kept for result in dense]
    found = [json.loads((tmp_path / f"{name}.json").read_text())["pruning"] for name, _ in results]
    assert [pruning["kept_local_indices"] for pruning in found] == kept
    for case, (name, _) in zip(batch, results, strict=False):
        with np.load(tmp_path / f"{name}.npz") as arrays:
            assert np.abs(arrays["importance"] - np.asarray(case.importance)).max() < 1e-5
