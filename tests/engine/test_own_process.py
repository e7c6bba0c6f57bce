"""Engines in processes of their own, as users start them: hub names, sharded files, bfloat16."""

import json

import pytest

from tests.engine import hub
from tests.engine.run_cases import ONE_PROCESS, assert_recorded, run
from tests.golden import cases

TEXT, IMAGE, CACHED = "a1_text_single_block", "b1_image_steps_eq_gen", "g12_fast_k2_r8_none"
MASK_ID = 126336
NAME = "somebody/tiny-llada-v"


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """Where the processes of this module keep what they download; empty at first."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def by_name(checkpoint, downloads, tmp_path_factory):
    """Default multi-process engine, by hub name, on a checkpoint in two files with a text-only chat template."""
    folder = checkpoint(seed=0, shards=2)
    assert len(list(folder.glob("model-*.safetensors"))) == 2
    assert "<image>" not in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    out = tmp_path_factory.mktemp("by_name") / "out.json"
    with hub.serve(NAME, folder) as (url, asked):
        places = {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(downloads), "HF_HUB_OFFLINE": "0"}
        results = run(NAME, out, places, engine={}, cases=[TEXT, IMAGE, CACHED], chat=IMAGE)
    assert {path.name for path in folder.glob("*.safetensors")} <= {path.rpartition("/")[2] for path in asked}
    return results


def test_hub_name_with_nothing_downloaded_before(by_name):
    assert_recorded(by_name, TEXT, IMAGE, CACHED)


def test_chat_is_the_official_conversation(by_name):
    assert by_name["chat"] | {"request_id": ""} == by_name[IMAGE] | {"request_id": ""}


def test_bfloat16_by_hub_name_without_network(by_name, downloads, tmp_path):
    """Other roundings, other tokens; but whole canvases of real words, from a first step of four tokens on."""
    places = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(downloads), "HF_HUB_OFFLINE": "1"} | ONE_PROCESS
    engine = {"additional_config": {"dvlm": {"cpu_dtype": "bfloat16"}}}
    results = run(NAME, tmp_path / "out.json", places, engine=engine, cases=[TEXT, IMAGE, CACHED])
    for name in (TEXT, IMAGE, CACHED):
        assert len(results[name]["tokens"]) == 16 and results[name]["finish_reason"] == "length"
        assert all(0 <= token < MASK_ID for token in results[name]["tokens"])
    # Half of the decisions are clear enough for eight bits of mantissa.
    recorded = cases.load(TEXT).final_ids
    assert sum(a == b for a, b in zip(results[TEXT]["tokens"], recorded, strict=True)) >= 8
