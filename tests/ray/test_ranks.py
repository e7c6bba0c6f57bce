"""Tensor parallel by Ray gives the tokens of one rank and of the recordings: every mode and method, every family."""

import pytest

from tests.engine import run_lavida
from tests.engine.run_cases import assert_recorded, run
from tests.golden import lavida_cases
from vllm_dvlm.pruning.names import AT_LAYER, targets
from vllm_dvlm.synthetic import tiny_lavida
from vllm_dvlm.synthetic.lavida_files import KINDS

RECORDED = ["a1_text_single_block", "g12_fast_k2_r8_none", "f1_redvtp_keep25", "f2_redvtp_keep50"]
IMAGE = "f1_redvtp_keep25"
LAVIDA = {
    "lavida-llada": ["text_full", "img_prefix_ratio05", "redvtp_repaired_k25"],
    "lavida-dream": ["dream_img_prefix_shift", "dream_text_prefix_entropy", "dream_text_full_maskgit"],
}


def two_ranks(backend):
    return {"tensor_parallel_size": 2, "distributed_executor_backend": backend, "max_num_batched_tokens": 4096}


def changed():
    """Every method, exact and cached; random ones draw from the request's seed."""
    found = {}
    for method in targets():
        options = {"prune_method": method} | ({"prune_layer": 2} if method in AT_LAYER else {})
        for refresh in (1, 32):
            more = {"diffusion_refresh_interval": refresh}
            found[f"{method}, refresh {refresh}"] = [IMAGE, options | more, {"seed": 7}]
    return found


@pytest.fixture(scope="module")
def one_rank(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_rank") / "out.json"
    engine = {"max_num_batched_tokens": 4096}
    return run(checkpoint(seed=0), out, engine=engine, cases=RECORDED, changed=changed(), noisy=RECORDED[0])


@pytest.mark.parametrize("backend", ["ray", "mp"])
def test_two_ranks_give_the_tokens_of_one(backend, cluster, one_rank, checkpoint, tmp_path):
    job = {"cases": RECORDED, "changed": changed(), "noisy": RECORDED[0]}
    found = run(checkpoint(seed=0), tmp_path / "out.json", engine=two_ranks(backend), **job)
    assert_recorded(found, *RECORDED)
    tokens = {name: result["tokens"] for name, result in found.items()}
    assert tokens == {name: result["tokens"] for name, result in one_rank.items()}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_lavida_by_ray(kind, cluster, tmp_path):
    names = LAVIDA[kind.name]
    engine = {key: value for key, value in two_ranks("ray").items() if key != "max_num_batched_tokens"}
    found = run_lavida.run(tiny_lavida.checkpoint(tmp_path, kind), tmp_path / "out.json", engine, names)
    assert found == {name: lavida_cases.load(name).final_ids for name in names}
