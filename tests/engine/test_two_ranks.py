"""Tensor parallelism: two ranks draw the same noise, keep the same visual tokens and give the tokens of one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.engine import pruned_reference, run_lavida
from tests.engine.pruned_checks import assert_clear
from tests.engine.run_cases import NOISE, NOISY_OPTIONS, ROOT, assert_recorded, run
from tests.golden import cases, lavida_cases
from vllm_dvlm.reference.lavida_model import LavidaModel
from vllm_dvlm.synthetic import tiny_lavida
from vllm_dvlm.synthetic.lavida_files import DREAM, LLADA

TEXT, CACHED = "a1_text_single_block", "g12_fast_k2_r8_none"
PRUNED = ["f1_redvtp_keep25", "f2_redvtp_keep50"]
MORE_OPTIONS = {
    "cached": {"diffusion_refresh_interval": 32},
    "fastv": {"diffusion_refresh_interval": 32, "prune_method": "fastv"},
}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def two_ranks(checkpoint, traces, tmp_path_factory):
    """Text, an image, cached steps, noise and pruning in one batch of two ranks."""
    settings = {"trace_dir": str(traces), "diffusion_trace": 1}
    return run(
        checkpoint(seed=0),
        tmp_path_factory.mktemp("two_ranks") / "out.json",
        engine={
            "tensor_parallel_size": 2,
            "distributed_executor_backend": "mp",
            "additional_config": {"dvlm": settings},
            "max_num_batched_tokens": 4096,
        },
        cases=[TEXT, CACHED, *PRUNED],
        changed={name: [PRUNED[0], options] for name, options in MORE_OPTIONS.items()},
        noisy=TEXT,
    )


def trace(results, traces, name):
    return json.loads((traces / f"{results[name]['request_id']}.json").read_text())


def test_recorded_tokens_and_steps(two_ranks, traces):
    assert_recorded(two_ranks, TEXT, CACHED, *PRUNED)
    for name in (TEXT, CACHED):
        shapes = [[1, step["query_len"]] for step in trace(two_ranks, traces, name)["steps"]]
        assert shapes == cases.load(name).raw["forward_shapes"]


def test_noise_is_that_of_one_rank(two_ranks, engine):
    from vllm import SamplingParams

    from tests.engine.engines import case_prompt, tokens

    case = cases.load(TEXT)
    params = SamplingParams(max_tokens=16, extra_args=cases.extra_args(case) | NOISY_OPTIONS, **NOISE)
    assert two_ranks["noisy"]["tokens"] == tokens(engine.run_one(case_prompt(case), params)) != case.final_ids


def test_ranks_keep_the_same_visual_tokens(two_ranks, traces, reference):
    """As recorded, with a cache and with fastv as the dense reference; ranks that disagree would give other tokens."""
    case, model = cases.load(PRUNED[0]), reference(seed=0)
    prompt = pruned_reference.case_prompt(model, case)
    expected = {name: (cases.load(name).final_ids, cases.load(name).pruning["kept_local_indices"]) for name in PRUNED}
    for name, options in MORE_OPTIONS.items():
        dense = pruned_reference.decode(model, prompt, cases.extra_args(case) | options)
        assert_clear(dense)
        expected[name] = dense.canvas, dense.kept
    for name, (token_ids, kept) in expected.items():
        assert two_ranks[name]["tokens"] == token_ids, name
        assert trace(two_ranks, traces, name)["pruning"]["kept_local_indices"] == kept, name
    for name in PRUNED:
        with np.load(traces / f"{two_ranks[name]['request_id']}.npz") as arrays:
            assert np.abs(arrays["importance"] - np.asarray(cases.load(name).importance)).max() < 1e-5


def test_a_lavida_model_in_two_parts(tmp_path):
    """Model class alone: original names and the tower are cut as the layers are, logits are the dense reference's."""
    folder, names = tiny_lavida.checkpoint(tmp_path, LLADA), ["text_full", "img_full"]
    command = [sys.executable, "-m", "tests.engine.lavida_model", str(folder), str(tmp_path / "store")]
    outs = [tmp_path / f"logits_{rank}.pt" for rank in range(2)]
    # As vLLM's CPU workers do: the name of the memory they share.
    environment = os.environ | {"VLLM_DIST_IDENT": f"{os.getpid()}-lavida"}
    arguments = [[*command, str(rank), "2", str(out), *names] for rank, out in enumerate(outs)]
    ranks = [subprocess.Popen(each, cwd=ROOT, env=environment) for each in arguments]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    first, second = (torch.load(out) for out in outs)
    model = LavidaModel.load(folder)
    for case in map(lavida_cases.load, names):
        features = model.image_features([lavida_cases.image(case)]) if case.image_record else []
        canvas = case.raw.get("initial_canvas") or [LLADA.mask] * case.settings["max_new_tokens"]
        with torch.inference_mode():
            whole = torch.cat([model.merge(case.prompt_ids, features).embeddings, model.embed(canvas)])
            expected = model.text.logits(model.text.forward(whole[None]))[0, case.prompt_len :]
        assert torch.equal(first[case.name], second[case.name])
        assert torch.allclose(first[case.name], expected, rtol=1e-3, atol=5e-3)


def test_a_prompt_that_is_computed_once(tmp_path):
    """Biases, grouped KV heads, prefix and full attention, shifted logits: one KV head on each of two ranks.

    With ``--mm-encoder-tp-mode data``, which a tower gets whose heads the ranks do not divide: each rank has a whole
    tower, and tiles are shared out.
    """
    names = ["dream_img_prefix_shift", "dream_text_prefix_entropy", "dream_text_full_maskgit"]
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "mm_encoder_tp_mode": "data"}
    found = run_lavida.run(tiny_lavida.checkpoint(tmp_path, DREAM), tmp_path / "out.json", engine, names)
    assert found == {name: lavida_cases.load(name).final_ids for name in names}
