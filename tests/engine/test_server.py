"""``vllm serve`` as a user runs it: two API servers, an engine core and a worker, all requests over HTTP."""

import asyncio
import base64
import io
import json
import math
import re
import shutil
import subprocess
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from tests.engine.server import (
    BUILD_ARGS,
    MODEL,
    VLLM,
    Server,
    chat_of,
    completion_of,
    image_part,
    load,
    openai_args,
    poll,
    text_of,
)
from tests.golden import cases
from vllm_dvlm.synthetic.checkpoint_files import MASK as MASK_ID

EOT_ID = 126348
MAX_MODEL_LEN = 4096
MAX_CANVAS = 64
TEXT, IMAGE, STOP, SUFFIX = "a1_text_single_block", "b1_image_steps_eq_gen", "e2_stop_blocks", "h1_suffix"
# Different prompts, canvases, blocks, steps, caching and thresholds.
GOLDEN = [TEXT, IMAGE, "b3_image_grid2x1", "c1_steps_lt_gen", "d2_blocks2_k1", STOP, "g10_fast_text_r8_thr1"]
GOLDEN += ["g12_fast_k2_r8_none", "g7_fast_blocks_r32_none", SUFFIX, "h3_suffix_fast"]


@pytest.fixture(scope="module")
def trace_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """A checkpoint whose generation_config.json suggests what masked diffusion has no use for."""
    copy = tmp_path_factory.mktemp("suggests") / "checkpoint"
    shutil.copytree(checkpoint(**BUILD_ARGS), copy)
    file = copy / "generation_config.json"
    suggested = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.2}
    # Words that recorded replies contain: they would end there.
    suggested |= {"max_new_tokens": 3, "eos_token_id": [126081, *(load(name).final_ids[1] for name in (TEXT, IMAGE))]}
    file.write_text(json.dumps(json.loads(file.read_text()) | suggested))
    return copy


@pytest.fixture(scope="module")
def server(folder, trace_dir, tmp_path_factory):
    settings = {"trace_dir": str(trace_dir), "max_canvas_length": MAX_CANVAS, "max_image_tiles": 8}
    log = tmp_path_factory.mktemp("server") / "log.txt"
    flags = ("--max-model-len", str(MAX_MODEL_LEN), "--api-server-count", "2", "--enable-scale-out")
    made = Server(folder, log, {"dvlm": settings}, *flags)
    print(f"server ready after {made.start_up_s:.0f} s")
    yield made
    made.stop()


def expected(name: str) -> str:
    return load(name).raw["final_text"]


# -- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_case_over_chat(server, name):
    case = load(name)
    reply = server.send(chat_of(name))
    assert text_of(reply) == case.raw["final_text"]
    stopped = case.stopped_at is not None
    assert reply["choices"][0]["finish_reason"] == ("stop" if stopped else "length")
    usage = reply["usage"]
    assert usage["prompt_tokens"] == case.prompt_len
    assert usage["completion_tokens"] == len(case.final_ids) + stopped, "vLLM counts the stop token"


@pytest.mark.parametrize("name", [TEXT, "g10_fast_text_r8_thr1"])
def test_golden_case_over_completions(server, name):
    assert text_of(server.send(completion_of(name))) == expected(name)
    as_text = completion_of(name, prompt=cases.prompt_text(load(name)), add_special_tokens=False)
    assert text_of(server.send(as_text)) == expected(name)
    batch = server.send(completion_of(name, prompt=[load(name).prompt_ids] * 3))
    assert [text_of(batch, i) for i in range(3)] == [expected(name)] * 3


@pytest.mark.parametrize("name", [IMAGE, "d2_blocks2_k1", STOP, SUFFIX])
def test_streamed_with_the_openai_package(server, name):
    options = {"include_usage": True}
    args = openai_args(chat_of(name, stream=True, stream_options=options, temperature=0))
    chunks = list(server.openai.chat.completions.create(**args))
    deltas = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(deltas) == expected(name)
    assert len(deltas) > 1, "tokens arrive as they are committed"
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    stopped = load(name).stopped_at is not None
    assert reasons[-1] == ("stop" if stopped else "length") and set(reasons[:-1]) == {None}
    assert chunks[-1].usage.completion_tokens == len(load(name).final_ids) + stopped
    whole = server.openai.chat.completions.create(**openai_args(chat_of(name, temperature=0)))
    assert whole.choices[0].message.content == "".join(deltas)


def test_streamed_completion(server):
    args = openai_args(completion_of("g10_fast_text_r8_thr1", stream=True))
    deltas = [chunk.choices[0].text for chunk in server.openai.completions.create(**args)]
    assert "".join(deltas) == expected("g10_fast_text_r8_thr1") and len(deltas) > 1


def test_session_id_of_vllm(server):
    """vLLM reads it from among the options."""
    assert text_of(server.send(chat_of(TEXT, xargs={"session_id": "a conversation"}))) == expected(TEXT)


def test_stop_string(server):
    body = completion_of(TEXT, stop=[" wood"])
    for changes, text in (({}, " over over over texture"), ({"include_stop_str_in_output": True}, None)):
        reply = server.send(body | changes)
        assert text_of(reply) == (text or " over over over texture wood")
        assert reply["choices"][0]["finish_reason"] == "stop" and reply["choices"][0]["stop_reason"] == " wood"
        # Of what it took until then: the engine hears of the end from the front end.
        assert 0 < reply["kv_transfer_params"]["dvlm"]["denoise_steps"] < load(TEXT).settings["steps"]
    server.wait_idle()


def test_stop_token_ids_and_ignore_eos(server):
    reply = server.send(chat_of(STOP, ignore_eos=True, stop_token_ids=[EOT_ID]))
    assert text_of(reply) == expected(STOP)
    assert reply["choices"][0]["finish_reason"] == "stop" and reply["choices"][0]["stop_reason"] == EOT_ID
    reply = server.send(chat_of(STOP, ignore_eos=True))
    assert reply["choices"][0]["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == 16


def test_max_tokens_below_the_canvas(server):
    reply = server.send(completion_of(TEXT, max_tokens=5, return_token_ids=True))
    assert reply["choices"][0]["token_ids"] == load(TEXT).final_ids[:5]
    assert reply["choices"][0]["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == 5


def test_logprobs_are_those_of_the_step_that_chose_the_token(server):
    case = load(TEXT)
    recorded = {pos: conf for step in case.steps for pos, conf in zip(step["pos"], step["conf"], strict=True)}
    chat = server.send(chat_of(TEXT, logprobs=True, top_logprobs=2))["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in chat) == expected(TEXT)
    for position, entry in enumerate(chat):
        assert math.exp(entry["logprob"]) == pytest.approx(recorded[position], rel=1e-3)
        first, second = (top["logprob"] for top in entry["top_logprobs"])
        assert first == entry["logprob"] >= second, "greedy: the token is the most probable one"
    found = server.send(completion_of(TEXT, logprobs=0))["choices"][0]["logprobs"]["token_logprobs"]
    assert found == [entry["logprob"] for entry in chat]


def test_several_answers_are_reproducible_by_seed(server):
    def texts(**changes):
        reply = server.send(completion_of(TEXT, temperature=1.0, n=3, **changes))
        return [text_of(reply, i) for i in range(3)]

    first = texts(seed=7)
    assert len(set(first)) == 3
    assert texts(seed=7) == first
    assert texts(seed=8) != first


# -- together ------------------------------------------------------------------------------------------------------


async def gather(server: Server, bodies: list[dict[str, Any]]) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        replies = await asyncio.gather(*(client.chat.completions.create(**openai_args(body)) for body in bodies))
    return [reply.choices[0].message.content for reply in replies]


def test_sixteen_at_once_answer_as_alone(server):
    others = [
        chat_of(TEXT, max_tokens=48, xargs={"diffusion_canvas_length": 48, "diffusion_max_steps": 24}),
        chat_of(TEXT, max_tokens=7, xargs={"diffusion_canvas_length": 32, "diffusion_max_steps": 32}),
        chat_of(TEXT, xargs={"diffusion_remasking": "random"}, seed=3),
        chat_of(TEXT, temperature=0.7, seed=5),
        chat_of(IMAGE, xargs={"diffusion_refresh_interval": 3, "diffusion_block_length": 8}),
    ]
    wanted = [expected(name) for name in GOLDEN] + [text_of(server.send(body)) for body in others]
    bodies = [chat_of(name) for name in GOLDEN] + others
    assert len(bodies) == 16
    before = server.metrics()["vllm_dvlm:denoise_steps_total"]
    # In both orders, so that each request meets others in other places of the batch.
    assert asyncio.run(gather(server, bodies)) == wanted
    assert asyncio.run(gather(server, bodies[::-1])) == wanted[::-1]
    assert server.metrics()["vllm_dvlm:denoise_steps_total"] > before
    server.wait_idle()


def test_abort_in_mid_stream_frees_its_blocks(server):
    """The client may be slower than the engine, then it tries again."""
    assert any(0 < steps_of_an_abandoned_stream(server) < 64 for _ in range(10)), "it ran to its end"


def steps_of_an_abandoned_stream(server):
    before = server.metrics()["vllm_dvlm:denoise_steps_total"]
    xargs = {"diffusion_canvas_length": 64, "diffusion_max_steps": 64, "diffusion_block_length": 1}
    stream = server.openai.chat.completions.create(
        **openai_args(chat_of(IMAGE, stream=True, max_tokens=64, ignore_eos=True, xargs=xargs))
    )
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()
    reply = server.send(chat_of(IMAGE))
    assert text_of(reply) == expected(IMAGE)
    server.wait_idle()
    others = server.metrics()["vllm_dvlm:denoise_steps_total"] - before
    return others - reply["kv_transfer_params"]["dvlm"]["denoise_steps"]


# -- metrics and traces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [IMAGE, STOP, "g12_fast_k2_r8_none"])
def test_counters_and_trace(server, trace_dir, name):
    case = load(name)
    server.wait_idle()
    before = server.metrics("vllm_dvlm:")
    reply = server.send(chat_of(name, xargs={"diffusion_trace": 1}))
    path = trace_dir / f"{reply['id']}.json"
    poll(path.exists, 120, "the trace is written")
    server.wait_idle()
    trace = json.loads(path.read_text())
    assert trace["final_ids"] == case.final_ids and trace["prompt_len"] == case.prompt_len
    assert [s["ids"] for s in trace["steps"]] == [s["ids"] for s in case.steps]
    full = case.prompt_len + case.settings["gen_length"]
    query_lens = [step["query_len"] for step in trace["steps"]]
    assert query_lens == [step["forward_len"] for step in case.steps]
    emitted = len(case.final_ids) + (case.stopped_at is not None)
    wanted = {
        "denoise_steps_total": len(case.steps),
        "forward_tokens_total{full}": sum(n for n in query_lens if n == full),
        "forward_tokens_total{cached}": sum(n for n in query_lens if n != full),
        "committed_tokens_total": emitted,
        "canvas_positions_total": case.settings["gen_length"],
    }
    after = server.metrics("vllm_dvlm:")
    assert {key: after[f"vllm_dvlm:{key}"] - before[f"vllm_dvlm:{key}"] for key in wanted} == wanted


# -- prompts as ids and as strings ---------------------------------------------------------------------------------


def answer(server, path, status=200, **body):
    response = server.http.post(path, json={"model": MODEL, **body})
    assert response.status_code == status, response.text
    return response.json()


def test_the_official_conversation_and_one_line_about_it(server, folder):
    """The tokenizer files bring LLaDA's text-only template, as those of the release do."""
    files = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert "image" not in files and server.log_text().count("vllm_dvlm: chat template: LLaDA-V's official") == 1
    case, question = load(TEXT), {"role": "user", "content": load(TEXT).raw["question"]}
    assert answer(server, "/tokenize", messages=[question])["tokens"] == case.prompt_ids
    said = answer(server, "/v1/responses", input=[question], max_output_tokens=16)
    assert said["usage"]["input_tokens"] == len(case.prompt_ids)


def test_strings_of_prompts_with_images(server):
    """The placeholder id lies behind the vocabulary of the tokenizer."""
    shown = answer(server, "/tokenize", messages=with_images(SMALL)["messages"], return_token_strs=True)
    assert shown["count"] == len(shown["tokens"]) == len(shown["token_strs"])
    marked = [token for token, text in zip(shown["tokens"], shown["token_strs"], strict=True) if text == "<image>"]
    assert len(marked) > 729 and set(marked) == {126349}
    text = answer(server, "/detokenize", tokens=shown["tokens"])["prompt"]
    assert text.count("<image>") == len(marked) and text.endswith("assistant<|end_header_id|>\n\n")
    assert text.replace("<image>", "").startswith("<|startoftext|><|start_header_id|>system")
    # Text never becomes the id.
    assert 126349 not in answer(server, "/tokenize", prompt="<|image|> image <reserved>")["tokens"]


@pytest.mark.parametrize("token_id", [126350, 126463, 126464, 2**33, 2**63 - 1])
def test_ids_without_a_string_are_refused(server, token_id):
    for path, field in (("/detokenize", "tokens"), ("/v1/completions", "prompt")):
        message = answer(server, path, 400, **{field: [300, token_id]})["error"]["message"]
        assert str(token_id) in message and len(message) < 200, message


# -- the stock load generator --------------------------------------------------------------------------------------


def test_vllm_bench_serve_with_images(server, checkpoint, tmp_path):
    command = [VLLM, "bench", "serve", "--base-url", server.url, "--model", MODEL]
    command += ["--tokenizer", checkpoint(**BUILD_ARGS), "--backend", "openai-chat"]
    command += ["--endpoint", "/v1/chat/completions", "--num-prompts", "8", "--max-concurrency", "4"]
    command += ["--dataset-name", "random-mm", "--random-input-len", "32", "--random-output-len", "16"]
    command += ["--random-mm-base-items-per-request", "1", "--random-mm-bucket-config", "{(96, 64, 1): 1.0}"]
    command += ["--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}', "--ignore-eos", "--disable-tqdm"]
    command += ["--extra-body", '{"vllm_xargs": {"diffusion_max_steps": 4}}']
    command += ["--save-result", "--result-dir", tmp_path, "--result-filename", "result.json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 8 and result["failed"] == 0
    assert result["total_output_tokens"] == 8 * 16
    assert "Diffusion Decoding" in ran.stdout
    assert result["diffusion_committed_tokens"] == 8 * 16 and result["diffusion_denoising_steps"] == 8 * 4
    assert result["diffusion_steps_per_canvas"] == pytest.approx(4)
    assert result["diffusion_committed_per_step"] == pytest.approx(4)
    server.wait_idle()


# -- refusals ------------------------------------------------------------------------------------------------------


def with_images(*images: bytes, text: str = "What is this?", **changes: Any) -> dict[str, Any]:
    parts = [image_part(data) for data in images] + [{"type": "text", "text": text}]
    return {"model": MODEL, "messages": [{"role": "user", "content": parts}], "max_tokens": 8} | changes


def with_address(url: str) -> dict[str, Any]:
    return with_images() | {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    }


SMALL = (cases.IMAGE_FOLDER / "wide_360x70.png").read_bytes()
BIG = (cases.IMAGE_FOLDER / "big_1600x1200.png").read_bytes()
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
LONG = [300] * (MAX_MODEL_LEN - 6)
REFUSED = {
    "unknown option": (chat_of(TEXT, xargs={"diffusion_block_lenght": 8}), "did you mean diffusion_block_length"),
    "option without bound": (chat_of(TEXT, xargs={"diffusion_refresh_interval": 1e19}), "and at most"),
    "option type": (chat_of(TEXT, xargs={"diffusion_suffix": 5}), "diffusion_suffix must be text"),
    "nested option": (chat_of(TEXT, xargs={"diffusion_suffix": {"a": 1}}), "diffusion_suffix"),
    "option value": (chat_of(TEXT, xargs={"diffusion_remasking": "best"}), "diffusion_remasking.*low_confidence"),
    "contradiction": (chat_of(TEXT, xargs={"diffusion_block_length": 5}), "diffusion_block_length 5 does not divide"),
    "guidance": (chat_of(TEXT, xargs={"diffusion_cfg_scale": 0.5}), "diffusion_cfg_scale"),
    "long canvas": (chat_of(TEXT, xargs={"diffusion_canvas_length": 65}), "diffusion_canvas_length.*at most 64"),
    "full model": (completion_of(TEXT, prompt=LONG), "prompt of 4090, canvas of 16.*4096 positions"),
    "long prompt": (completion_of(TEXT, prompt=[*LONG, *LONG]), "max_model_len|context length|maximum|max_tokens"),
    "no prompt": (completion_of(TEXT, prompt=""), "prompt"),
    "mask token": (completion_of(TEXT, prompt="a <|mdm_mask|>"), "mask token"),
    "beam search": (chat_of(TEXT, use_beam_search=True, n=2), "use_beam_search"),
    "beam search, completion": (completion_of(TEXT, use_beam_search=True, n=2), "use_beam_search"),
    "json": (chat_of(TEXT, response_format={"type": "json_object"}), "response_format"),
    "guided": (completion_of(TEXT, structured_outputs={"choice": ["a"]}), "structured_outputs"),
    "tools": (chat_of(TEXT, tools=[TOOL]), "tool"),
    "tool required": (chat_of(TEXT, tools=[TOOL], tool_choice="required"), "tool_choice"),
    "min_tokens": (chat_of(TEXT, min_tokens=3), "min_tokens"),
    "logit_bias": (chat_of(TEXT, logit_bias={"5": 1}), "logit_bias"),
    "top_p": (chat_of(TEXT, top_p=0.5, temperature=1), "top_p"),
    "penalty": (chat_of(TEXT, presence_penalty=1), "presence_penalty"),
    "prompt_logprobs": (chat_of(TEXT, prompt_logprobs=1), "prompt_logprobs"),
    "echo with logprobs": (completion_of(TEXT, echo=True, logprobs=1), "echo with logprobs"),
    "stop at the mask token": (chat_of(TEXT, stop_token_ids=[MASK_ID]), f"stop_token_ids.*{MASK_ID}, the mask token"),
    "many stop ids": (chat_of(TEXT, stop_token_ids=list(range(300, 500))), "stop_token_ids has 200 ids; .*128"),
    "long stop": (completion_of(TEXT, stop="x" * 5000), "stop: a string of 5000 characters"),
    "long suffix": (completion_of(TEXT, xargs={"diffusion_suffix": "x" * 500_000}), "500000 characters; .*4096"),
    "greedy n": (chat_of(TEXT, n=2, temperature=0), "n must be 1"),
    "option with image": (chat_of(IMAGE, xargs={"diffusion_max_steps": 17, "diffusion_block_length": 8}), "_max_steps"),
    "empty image": (with_images(b""), "image"),
    "cut image": (with_images(SMALL[: len(SMALL) // 2]), "truncated"),
    "no image": (with_images(b"hello world" * 20), "image"),
    "large image": (with_images(BIG), "needs 21 tiles.*max_image_tiles"),
    "image missing": (with_images(text="<image> What?"), "1 image placeholder.*0 image"),
    "placeholder in another message": (
        {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": "Say <image>."},
                *with_images(SMALL, SMALL, text="<image>?")["messages"],
            ],
        },
        r"Message 1 \(system\) has 1 image placeholder.*0 image",
    ),
    "placeholders": (with_images(SMALL, text="<image> <image> What?"), "<image>"),
    "image address without base64": (with_address("data:image/png,abc"), "base64"),
    "image in a file": (with_address("file:///etc/hostname"), "--allowed-local-media-path"),
    "field that vLLM cannot read": (chat_of(TEXT, structured_outputs="a"), "cannot be read.*structured_outputs"),
    "image options": (with_images(SMALL, mm_processor_kwargs={"image_aspect_ratio": "pad"}), "mm_processor_kwargs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_request_is_400_and_the_next_is_answered(server, name):
    body, message = REFUSED[name]
    error = server.send(body, status=400)["error"]
    assert re.search(message, error["message"], re.DOTALL), error["message"]
    assert text_of(server.send(completion_of(TEXT))) == expected(TEXT)


NOTHING = {
    "chat": chat_of(TEXT, logit_bias={}, bad_words=[], stop=[], stop_token_ids=None, response_format={"type": "text"}),
    "chat, echo": chat_of(TEXT, echo=True, top_p=1, top_k=-1, logprob_token_ids=[], tools=[TOOL], tool_choice="none"),
    "completion": completion_of(TEXT, logit_bias={"5": 0}, repetition_penalty=1.0, repetition_detection={}),
}


@pytest.mark.parametrize("name", NOTHING)
def test_parameters_that_ask_for_nothing(server, name):
    assert text_of(server.send(NOTHING[name])) == expected(TEXT)


def test_bad_requests_beside_a_running_one(server):
    """A reply of 64 whole forward passes is streamed while every bad request is refused; it does not notice."""
    lengths = {"diffusion_canvas_length": 64, "diffusion_block_length": 8, "diffusion_max_steps": 64}
    body = chat_of(IMAGE, xargs=lengths, max_tokens=64, temperature=0)
    undisturbed = text_of(server.send(body))
    with server.openai.chat.completions.create(**openai_args(body | {"stream": True})) as chunks:
        deltas = [next(chunks).choices[0].delta.content]
        for body, _ in REFUSED.values():
            server.send(body, status=400)
        deltas += [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(delta or "" for delta in deltas) == undisturbed


def test_open_max_tokens_with_a_suffix(server):
    """vLLM fills in all that the model has room for; canvas and suffix take what the server allows."""
    body = chat_of(TEXT, xargs={"diffusion_suffix": " The end.", "diffusion_refresh_interval": 64})
    for name in ("max_tokens", "max_completion_tokens"):
        body.pop(name, None)
    for name in ("diffusion_canvas_length", "diffusion_block_length", "diffusion_max_steps"):
        body["vllm_xargs"].pop(name, None)
    reply = server.send(body)
    assert reply["usage"]["completion_tokens"] == MAX_CANVAS and text_of(reply).endswith(" The end.")


def test_same_image_right_after_refusals(server):
    """vLLM's own cache would take it for an image that the engine already has."""
    fresh = with_images(SMALL)
    for changes in ({"vllm_xargs": {"diffusion_max_steps": -1}}, {"min_tokens": 2}, {"max_tokens": 5000}):
        server.send(fresh | changes, status=400)
    for _ in range(2):  # whichever of the two API servers answers
        assert text_of(server.send(chat_of(IMAGE))) == expected(IMAGE)


@pytest.mark.parametrize("make", [chat_of, completion_of], ids=["chat", "completion"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vllm_xargs": {"diffusion_block_lenght": 8}}, "did you mean diffusion_block_length"),
        ({"vllm_xargs": {"diffusion_canvas_length": 100_000}}, "diffusion_canvas_length"),
        ({"min_tokens": 2}, "min_tokens"),
    ],
    ids=["option", "length", "parameter"],
)
def test_bad_streamed_request(server, make, changes, message):
    """As if it had not been streamed: the same status and the same body."""
    bad = make(TEXT) | changes
    plain = server.send(bad, status=400)
    streamed = server.send(bad | {"stream": True}, status=400)
    assert streamed == plain
    assert re.search(message, streamed["error"]["message"])


QUESTION = [{"role": "user", "content": "How many circles?"}]
IDS = [300, 301, 302]
# Every endpoint that streams for such models: a body that is served, and changes that are refused.
STREAMS = {
    "/v1/chat/completions": ({"messages": QUESTION, "max_tokens": 8}, {"vllm_xargs": {"nope": 1}}),
    "/v1/completions": ({"prompt": IDS, "max_tokens": 8}, {"min_tokens": 2}),
    "/v1/responses": ({"input": "How many?", "max_output_tokens": 8}, {"vllm_xargs": {"nope": 1}}),
    "/v1/messages": ({"messages": QUESTION, "max_tokens": 8}, {"top_k": 5, "temperature": 1}),
    "/inference/v1/generate": (
        {"token_ids": IDS, "sampling_params": {"max_tokens": 8, "temperature": 0}},
        {"sampling_params": {"max_tokens": 8, "top_k": 5, "temperature": 1}},
    ),
    "/invocations": ({"messages": QUESTION, "max_tokens": 8}, {"vllm_xargs": {"nope": 1}}),
}


@pytest.mark.parametrize("path", STREAMS)
def test_refused_stream_of_every_endpoint(server, path):
    """In the endpoint's own words, as without a stream; a good stream is one."""
    good, changes = STREAMS[path]
    good = {"model": MODEL} | good
    plain = server.http.post(path, json=good | changes)
    streamed = server.http.post(path, json=good | changes | {"stream": True})
    assert plain.status_code == streamed.status_code == 400, (plain.text, streamed.text)
    assert "nope" in streamed.text or "top_k" in streamed.text or "min_tokens" in streamed.text
    assert "event-stream" not in streamed.headers["content-type"]
    assert _without_ids(streamed.json()) == _without_ids(plain.json())
    served = server.http.post(path, json=good | {"stream": True})
    assert served.status_code == 200 and served.headers["content-type"].startswith("text/event-stream")
    assert served.text.count("data: ") > 1 and "error" not in served.text


def test_images_that_another_server_has_processed_are_refused(server):
    """vLLM puts the client's tensors, or none, where an image is said to be: a step would fail for everybody."""
    features = {
        "mm_hashes": {"image": ["x"]},
        "mm_placeholders": {"image": [{"offset": 0, "length": 2}]},
        "kwargs_data": None,
    }
    body = {"token_ids": IDS, "sampling_params": {"max_tokens": 8, "temperature": 0}, "features": features}
    reply = server.http.post("/inference/v1/generate", json={"model": MODEL} | body)
    assert reply.status_code == 400 and "send the images themselves" in reply.text
    assert text_of(server.send(chat_of(TEXT))) == expected(TEXT)


def _broken_png():
    """A second IDAT chunk whose name is none: Pillow raises SyntaxError while it reads the pixels."""
    data = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (256, 256, 3), dtype=np.uint8)).save(data, "PNG")
    data = data.getvalue()
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    return data[:second] + b"\xff\xff\xff\xff" + data[second + 4 :]


def test_a_damaged_image_is_the_clients_fault(server):
    url = "data:image/png;base64," + base64.b64encode(_broken_png()).decode()
    body = chat_of(TEXT)
    body["messages"] = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    assert "image" in server.send(body, status=400)["error"]["message"]


def _without_ids(body):
    return {name: value for name, value in body.items() if name not in ("id", "request_id", "created")}


def test_bad_streamed_request_with_the_openai_package(server):
    body = chat_of(TEXT, xargs={"diffusion_block_lenght": 8}, stream=True)
    with pytest.raises(openai.BadRequestError, match="did you mean diffusion_block_length"):
        server.openai.chat.completions.create(**openai_args(body))
    assert text_of(server.send(chat_of(TEXT))) == expected(TEXT)


def test_refusals_left_nothing_behind(server):
    server.wait_idle()
    assert "EngineDeadError" not in server.log_text() and "EngineCore encountered" not in server.log_text()
