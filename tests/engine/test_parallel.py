"""Engines in processes of their own, as users start them: several ranks, sharded files, no template, bfloat16."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import cases

ROOT = Path(__file__).parents[2]
TEXT, IMAGE, CACHED = "a1_text_single_block", "b1_image_steps_eq_gen", "g12_fast_k2_r8_none"
MASK_ID = 126336
ENGINE = {"max_model_len": 4096, "max_num_seqs": 8, "limit_mm_per_prompt": {"image": 1}}


def run(model, out, hub=None, **job):
    """What ``tests.engine.run_cases`` wrote to ``out``; no environment variable of vLLM is set.

    model: folder, or a hub name that the download cache ``hub`` holds; then nothing else can be reached.
    """
    job["engine"] = ENGINE | job["engine"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    if hub is not None:
        environment |= {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.run_cases", str(model), str(out), json.dumps(job)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def assert_recorded(results, *names):
    for name in names:
        case = cases.load(name)
        assert results[name] == {
            "tokens": case.final_ids,
            "prompt_len": case.prompt_len,
            "finish_reason": "length",
        }, name


def downloaded(folder, hub, name):
    """Put a checkpoint where huggingface_hub keeps what it has downloaded under ``name``."""
    repository = hub / f"models--{name.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / revision).symlink_to(folder.resolve())


@pytest.fixture(scope="module")
def one_rank(checkpoint, tmp_path_factory):
    """Default multi-process engine, by hub name, on a checkpoint in two files that has no chat template."""
    folder = checkpoint(seed=0, shards=2, without_chat_template=True)
    assert len(list(folder.glob("model-*.safetensors"))) == 2
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    workdir = tmp_path_factory.mktemp("one_rank")
    downloaded(folder, workdir / "hub", "somebody/tiny-llada-v")
    job = {"engine": {}, "cases": [TEXT, IMAGE, CACHED], "noisy": TEXT, "chat": IMAGE}
    return run("somebody/tiny-llada-v", workdir / "out.json", workdir / "hub", **job)


def test_own_process_with_a_sharded_checkpoint_by_hub_name(one_rank):
    assert_recorded(one_rank, TEXT, IMAGE, CACHED)


def test_chat_without_a_template_in_the_checkpoint(one_rank):
    assert one_rank["chat"] == one_rank[IMAGE]


def test_two_ranks(checkpoint, one_rank, tmp_path):
    """Text, an image, cached steps, and noise, which both ranks must draw alike."""
    traces = tmp_path / "traces"
    settings = {"trace_dir": str(traces), "diffusion_trace": 1}
    engine = {"tensor_parallel_size": 2, "additional_config": {"dvlm": settings}, "max_num_batched_tokens": 4096}
    names = [TEXT, CACHED]
    results = run(checkpoint(seed=0), tmp_path / "out.json", engine=engine, cases=names, noisy=TEXT)
    assert_recorded(results, *names)
    assert results["noisy"] == one_rank["noisy"] != one_rank[TEXT]
    written = [json.loads(file.read_text()) for file in traces.glob("*.json")]
    assert len(written) == 3
    shapes = [[[1, step["query_len"]] for step in trace["steps"]] for trace in written]
    for name in names:
        assert cases.load(name).raw["forward_shapes"] in shapes


def test_bfloat16(checkpoint, tmp_path):
    """Other roundings, other tokens; but whole canvases of real words, from a first step of four tokens on."""
    engine = {"additional_config": {"dvlm": {"cpu_dtype": "bfloat16"}}}
    results = run(checkpoint(seed=0), tmp_path / "out.json", engine=engine, cases=[TEXT, IMAGE, CACHED])
    for name in (TEXT, IMAGE, CACHED):
        assert len(results[name]["tokens"]) == 16 and results[name]["finish_reason"] == "length"
        assert all(0 <= token < MASK_ID for token in results[name]["tokens"])
    # Half of the decisions are clear enough for eight bits of mantissa.
    recorded = cases.load(TEXT).final_ids
    assert sum(a == b for a, b in zip(results[TEXT]["tokens"], recorded, strict=True)) >= 8
