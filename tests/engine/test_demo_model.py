"""The demo models: a short training run gives a checkpoint that can be served; the shipped ones keep their cards' word.

The card's figures come from PyTorch decoding in examples/train_demo; here the engine answers.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHIPPED = {"llada_v": EXAMPLES / "demo_model", "lavida": EXAMPLES / "demo_lavida"}
FRESH_SEED = 2  # the card's questions have seed 1


@contextmanager
def served(folder: Path) -> Iterator:
    """``ask(questions, **options)`` of an engine in this process: the answers' texts, in order."""
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests.engine.engines import end_shared, quiet_process

    end_shared()
    with quiet_process():
        made = [LLM(str(folder), kv_cache_memory_bytes=64 * 2**20, max_num_seqs=16)]

    def ask(asked: list, **options) -> list[str]:
        params = SamplingParams(temperature=0, max_tokens=8, extra_args=options)
        messages = [
            [{"role": "user", "content": [_image(Image, question), {"type": "text", "text": question.question}]}]
            for question in asked
        ]
        # The tokenizer joins words by spaces, so a first word comes with one.
        return [output.outputs[0].text.strip() for output in made[0].chat(messages, params, use_tqdm=False)]

    try:
        yield ask
    finally:
        # No other name may hold the engine: its memory goes with the last one.
        made.pop().llm_engine.engine_core.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def _image(image_module, question) -> dict:
    return {"type": "image_pil", "image_pil": image_module.fromarray(question.image)}


def held_out(num: int, seed: int = FRESH_SEED) -> list:
    pytest.importorskip("sklearn")
    from vllm_dvlm.synthetic import digit_questions

    return digit_questions.held_out(num, seed=seed)


def num_right(asked: list, answers: list[str]) -> int:
    return sum(question.answer == answer for question, answer in zip(asked, answers, strict=True))


@pytest.fixture
def trainer(monkeypatch):
    """The modules of examples/train_demo, importable by their own names."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "train_demo"))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def test_a_short_training_run_learns_and_can_be_served(tmp_path):
    """Of LaViDa, which has more to it."""
    asked = held_out(4)
    command = [sys.executable, str(EXAMPLES / "train_demo" / "train.py"), "--out", str(tmp_path), "--family", "lavida"]
    subprocess.run([*command, "--short", "--threads", "1"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["loss_last"] < 0.5 * card["loss_first"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is left to do, and a resumed run finds that out.
    weights = (tmp_path / "model.safetensors").read_bytes()
    subprocess.run([*command, "--short", "--resume"], check=True)
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    with served(tmp_path) as ask:
        assert len(ask(asked)) == 4


@pytest.mark.parametrize("family", SHIPPED)
def test_a_step_of_every_stage_changes_the_weights(family, trainer):
    """One step of each stage's kind, two samples: some finite loss, and some of every part moves."""
    from dataclasses import replace

    import torch
    from recipes import RECIPES, shortened
    from stages import ThreadPoolExecutor, set_rate, train_step, training_glyphs
    from train import start

    run = start(RECIPES[family].shape, 0)
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    glyphs = training_glyphs(0)
    with ThreadPoolExecutor(1) as pool:
        for stage in shortened(RECIPES[family].stages):
            stage = replace(stage, batch=2, part=2, crowds=2)
            set_rate(run.optimisers, stage, 1, 2)
            train_step(run, stage, glyphs, pool)
    moved = {name for name, weight in run.model.named_parameters() if not torch.equal(weight, before[name])}
    for part in (
        "vision_model.encoder",
        "mm_projector",
        "layers.3.self_attn",
        "embed_tokens",
        "lm_head",
        "image_newline",
    ):
        assert any(part in name for name in moved), part


def trained(folder: Path, family: str):
    """The trainer's model with the weights of a checkpoint."""
    from export import llada_name
    from recipes import RECIPES
    from safetensors.torch import load_file
    from train import start

    model, tensors = start(RECIPES[family].shape, 0).model, load_file(folder / "model.safetensors")
    name_of = llada_name if family == "lavida" else str
    model.load_state_dict({name: tensors[name_of(name)] for name in model.state_dict()})
    return model


@pytest.mark.parametrize("family", SHIPPED)
def test_the_shipped_model_answers_as_its_card_says(family, trainer):
    folder = SHIPPED[family]
    card = json.loads((folder / "card.json").read_text())
    asked = held_out(200)
    with served(folder) as ask:
        answers = ask(asked)
        pruned = ask(asked[:60], prune_method="redvtp", prune_keep_ratio=0.25)
        at_random = ask(asked[:60], prune_method="random", prune_keep_ratio=0.25)
    low, high = card["interval_99_of_200_fresh_questions"]
    assert low <= num_right(asked, answers) / 200 <= high
    assert num_right(asked[:60], pruned) > num_right(asked[:60], at_random) + 12

    # The trainer's own decoding of the same weights says the same.
    from evaluate import Pruning
    from evaluate import answers as answers_in_pytorch

    model = trained(folder, family)
    assert answers_in_pytorch(model, asked[:40]) == answers[:40]
    assert answers_in_pytorch(model, asked[:40], Pruning("redvtp", 0.25)) == pruned[:40]


@pytest.mark.parametrize("family", SHIPPED)
def test_the_checkpoint_before_robustness_answers_about_as_its_card_says(family, trainer):
    from evaluate import answers

    folder, asked = SHIPPED[family] / "before_robustness", held_out(60)
    share = json.loads((folder / "card.json").read_text())["scores"]["all"]["share"]
    margin = 2.6 * (share * (1 - share) / 60) ** 0.5
    assert abs(num_right(asked, answers(trained(folder, family), asked)) / 60 - share) <= margin


def test_the_folders_are_small_and_complete():
    for shipped in SHIPPED.values():
        files = [file for file in shipped.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 10 * 2**20
        for folder in (shipped, shipped / "before_robustness"):
            assert {"README.md", "card.json", "config.json", "model.safetensors", "tokenizer.json"} <= {
                file.name for file in folder.iterdir()
            }
