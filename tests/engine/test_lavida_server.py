"""``vllm serve`` on a LaViDa folder, without a flag: chats as recorded, drafts as text and as ids, refusals."""

import json

import pytest

from tests.engine.server import MODEL, Server, image_part
from tests.golden import lavida_cases as cases
from vllm_dvlm.synthetic import tiny_lavida
from vllm_dvlm.synthetic.lavida_files import LLADA

PICTURE, TEXT, DRAFT = "img_prefix_ratio05", "text_entrophy_blocks", "fim_text_full"
MASK = LLADA.mask
NAMED = {126085: "<|reserved_token_1|>", 126348: "<|eot_id|>"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    checkpoint = tiny_lavida.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints", LLADA)
    running = Server(checkpoint, tmp_path_factory.mktemp("server") / "lavida.log", {})
    yield running
    running.stop()


def chat_of(name, **options):
    case = cases.load(name)
    parts = [image_part((cases.FOLDER / case.image_record["file"]).read_bytes())] if case.image_record else []
    parts.append({"type": "text", "text": case.raw["question"]})
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": case.settings["max_new_tokens"],
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": cases.extra_args(case) | options,
    }


def tokens_of(reply):
    return reply["choices"][0]["token_ids"]


@pytest.mark.parametrize("name", [PICTURE, TEXT, DRAFT])
def test_chat_as_recorded(server, name):
    case = cases.load(name)
    reply = server.send(chat_of(name))
    assert tokens_of(reply) == case.final_ids
    assert reply["usage"]["prompt_tokens"] == case.prompt_len


def test_a_draft_as_text(server):
    case = cases.load(DRAFT)
    draft = case.draft_ids
    text, count = "", 0
    for token in [*draft, None]:  # a byte is its own id in this vocabulary
        if token == MASK:
            count += 1
            continue
        text += f"<mask:{count}>" if count else ""
        count = 0
        if token is not None:
            text += NAMED.get(token) or bytes([token]).decode()
    assert tokens_of(server.send(chat_of(DRAFT, diffusion_draft=text))) == case.final_ids


def test_report_says_what_was_computed(server):
    case = cases.load(PICTURE)
    report = server.send(chat_of(PICTURE))["kv_transfer_params"]["dvlm"]
    steps, length = len(case.steps), case.settings["max_new_tokens"]
    assert report["denoise_steps"] == steps
    assert report["forward_tokens_full"] == case.prompt_len + length, "the prompt once"
    assert report["forward_tokens_cached"] == (steps - 1) * length


def test_refused_over_http(server):
    for options, name in (
        ({"diffusion_refresh_interval": 4}, "diffusion_refresh_interval"),
        ({"diffusion_draft": [1] * 33}, "diffusion_draft"),
        ({"diffusion_draft": "<mask:9999999>"}, "diffusion_draft"),
        ({"diffusion_suffix": "so"}, "diffusion_suffix"),
    ):
        reply = server.send(chat_of(PICTURE, **options), status=400)
        assert name in json.dumps(reply["error"])
    assert tokens_of(server.send(chat_of(TEXT))) == cases.load(TEXT).final_ids, "the server lives"
