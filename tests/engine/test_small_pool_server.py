"""One server with a small KV pool: the adapter of `examples/lmms_eval`, vLLM's load client, pruning over HTTP."""

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai
import pytest

from tests.engine.server import BUILD_ARGS, MODEL, Server, chat_of, load, text_of
from tests.golden import cases
from vllm_dvlm.bench import serving_load
from vllm_dvlm.bench.question_job import Job
from vllm_dvlm.bench.questions import Item, _png
from vllm_dvlm.bench.settings_grid import Mode, Setting

IMAGE, PRUNED = "b1_image_steps_eq_gen", "f2_redvtp_keep50"
# One request of case b1 with a canvas of 32 has 961 tokens, 31 KV blocks of 32; at keep ratio 0.1 it has 178, 6 blocks.
NUM_BLOCKS = 64
BLOCKS_FULL, BLOCKS_PRUNED = 31, 6
NUM_REQUESTS = 8
SOURCE = Path(__file__).parents[2] / "examples" / "lmms_eval" / "served.py"


def _import_adapter():
    spec = importlib.util.spec_from_file_location("served", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["served"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


served = _import_adapter()


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    flags = ("--max-model-len", "2000", "--num-gpu-blocks-override", str(NUM_BLOCKS))
    flags += ("--served-model-name", MODEL, serving_load.MODEL_NAME)
    settings = {"dvlm": {"prune_keep_ratio": 0.1}}
    made = Server(checkpoint(**BUILD_ARGS), tmp_path_factory.mktemp("server") / "log.txt", settings, *flags)
    yield made
    made.stop()


def model_of(server, documents, task, **arguments):
    """The adapter as lmms-eval makes it: model_args, then the tasks' documents."""
    model = served.ServedDiffusion(f"{server.url}/v1", batch_size="1", device=None, **arguments)
    model.task_dict = {task: {"test": documents}}
    return model


def instance(context, doc_id, task):
    """lmms-eval's `Instance` of a generation task for a model with `is_simple`."""
    gen_kwargs = {"max_new_tokens": 1024, "until": ["\n\n"], "do_sample": False}
    return SimpleNamespace(args=(context, gen_kwargs, lambda doc: doc["images"], doc_id, task, "test"))


def own_text(name):
    """A golden case's question with its image places, which the adapter leaves as it is."""
    text = cases.prompt_text(load(name)).split("user<|end_header_id|>\n\n")[1].split("<|eot_id|>")[0]
    assert text.startswith("<image>")
    return text


@pytest.mark.parametrize(
    ("name", "task", "options"),
    [
        # ChartQA's canvas, steps and block of 16 are those of this case.
        (IMAGE, "chartqa", {}),
        (PRUNED, "chartqa", {"prune_method": "redvtp", "prune_keep_ratio": 0.5, "diffusion_max_steps": 8}),
    ],
)
def test_answers_of_the_official_code(server, name, task, options):
    documents = [{"images": cases.images(load(name))}]
    model = model_of(server, documents, task, **options)
    wanted = load(name).raw["final_text"].removesuffix(".").strip()
    assert model.generate_until([instance(own_text(name), 0, task)] * 3) == [wanted] * 3


def test_documents_of_several_tasks_keep_their_order_and_settings(server):
    """Two tokens for a letter, sixteen for a chart, and the think mode behind the text."""
    images = [cases.images(cases.load(name))[0] for name in (IMAGE, "b4_image_after_text")]
    model = model_of(server, [], "mme", num_concurrent=3)
    model.task_dict = {task: {"test": [{"images": [image]} for image in images]} for task in ("mme", "chartqa")}
    work = [("mme", 0), ("chartqa", 1), ("mme", 1), ("chartqa", 0)]
    said = model.generate_until([instance("What is this?", doc_id, task) for task, doc_id in work])
    for (task, doc_id), text in zip(work, said, strict=True):
        length = {"mme": 2, "chartqa": 16}[task]
        # The same, spelt out by hand.
        body = {
            "model": "tiny",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        served.image_part(images[doc_id]),
                        {"type": "text", "text": "<image>\nWhat is this? /no_think"},
                    ],
                }
            ],
            "max_tokens": length,
            "temperature": 0,
            "vllm_xargs": {"diffusion_canvas_length": length, "diffusion_max_steps": length},
        }
        assert text == text_of(server.send(body)).split("\n")[0].removesuffix(".").strip()
    assert len(set(said)) > 2


def test_every_setting_of_the_table_is_accepted(server):
    image = cases.images(load(IMAGE))[0]
    tasks = {decoding: task for task, decoding in served.DECODING.items()}
    assert len(tasks) == 5
    for decoding, task in tasks.items():
        # Several images at the shortest setting; the others cost enough with one.
        model = model_of(server, [{"images": [image] * (2 if decoding is served.SHORT else 1)}], task)
        before = server.metrics("vllm_dvlm:")
        model.generate_until([instance("Which?", 0, task)])
        server.wait_idle()
        after = server.metrics("vllm_dvlm:")
        canvas, steps = (
            after[name] - before[name] for name in ("vllm_dvlm:canvas_positions_total", "vllm_dvlm:denoise_steps_total")
        )
        assert canvas == decoding.canvas and 0 < steps <= decoding.steps, task


def test_refused_request_ends_the_evaluation(server):
    """Its message must not be scored as an answer."""
    documents = [{"images": cases.images(load(IMAGE))}]
    model = model_of(server, documents, "mme", diffusion_block_lenght=2)
    with pytest.raises(openai.BadRequestError, match="did you mean diffusion_block_length"):
        model.generate_until([instance("What?", 0, "mme")])


def test_text_and_settings():
    assert served.question_text("What?", 2, " /no_think") == "<image> <image>\nWhat? /no_think"
    assert served.question_text("See <image>?", 1, " /think") == "See <image>?"
    assert served.question_text("1 + 1?", 0, " /think") == "1 + 1?"
    assert served.decoding_of("mathvista_testmini_cot").canvas == 96
    assert served.decoding_of("mmmu_pro_vision_cot") is served.DECODING["mmmu_pro_vision"]
    assert served.decoding_of("docvqa_val") == served.Decoding(32, 16, 32)
    assert served.decoding_of("something_else") is served.SHORT


def test_what_the_adapter_does_not_do(server):
    with pytest.raises(ValueError, match="num_concurent"):
        served.ServedDiffusion(f"{server.url}/v1", num_concurent=3)
    with pytest.raises(ValueError, match="videomme: videos"):
        model_of(server, [], "videomme").request("What?", ["film.mp4"], "videomme")
    with pytest.raises(NotImplementedError, match="likelihood"):
        model_of(server, [], "mme").loglikelihood([])


def test_load_of_one_setting(server, checkpoint, tmp_path):
    """`bench frontier --serve`: vLLM's client sends our questions with the options of a setting."""
    pixels = [np.full((40, 60, 3), value, dtype=np.uint8) for value in (20, 200)]
    items = [Item("What colour?", ("x",), "all", (_png(image),), ((60, 40),)) for image in pixels]
    setting = Setting(Mode(32), "redvtp", 0.25)
    job = Job(
        model=str(checkpoint(**BUILD_ARGS)),
        data=None,
        num=4,
        seed=0,
        threads=1,
        batch=2,
        canvas=8,
        num_steps=4,
        block=None,
        settings=(setting,),
    )
    dataset = serving_load.write_dataset(tmp_path / "questions", items)
    before = server.metrics("vllm_dvlm:")["vllm_dvlm:requests_pruned_total"]
    row = serving_load._send(job, setting, dataset, 4, server.port, tmp_path / "result.json")
    assert row["served/s"] > 0 and 0 < row["served_ttft_ms"] <= row["served_p50_ms"] <= row["served_p99_ms"]
    server.wait_idle()
    pruned = server.metrics("vllm_dvlm:")["vllm_dvlm:requests_pruned_total"] - before
    assert pruned >= 4, "four questions, and what the client sends to warm up"
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 4 and result["max_concurrency"] == 2


# -- pruning -------------------------------------------------------------------------------------------------------


def at_once(server, **options):
    """Replies to the same request, sent ``NUM_REQUESTS`` times at once: more than the pool holds."""
    body = chat_of(IMAGE, max_tokens=32, ignore_eos=True)
    body["vllm_xargs"] = {"diffusion_canvas_length": 32, "diffusion_refresh_interval": 32} | options
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        replies = list(pool.map(lambda _: server.send(body), range(NUM_REQUESTS)))
    server.wait_idle()
    return replies


def test_what_pruning_frees_is_counted(server):
    """By the ratio that is this server's default. How many requests run at once is counted in test_pool.py."""
    before = server.metrics("vllm_dvlm:")
    at_once(server)
    assert server.metrics("vllm_dvlm:")["vllm_dvlm:kv_blocks_freed_total"] == before["vllm_dvlm:kv_blocks_freed_total"]
    replies = at_once(server, prune_method="redvtp")
    after = server.metrics("vllm_dvlm:")
    freed = after["vllm_dvlm:kv_blocks_freed_total"] - before["vllm_dvlm:kv_blocks_freed_total"]
    assert freed == NUM_REQUESTS * (BLOCKS_FULL - BLOCKS_PRUNED)
    assert after["vllm_dvlm:requests_pruned_total"] - before["vllm_dvlm:requests_pruned_total"] == NUM_REQUESTS
    report = replies[0]["kv_transfer_params"]["dvlm"]
    assert (report["kv_blocks_before"], report["kv_blocks_after"]) == (BLOCKS_FULL, BLOCKS_PRUNED)
    assert report["visual_tokens_before"] == 869
    assert report["visual_tokens_after"] == 86
    spent = after["vllm_dvlm:prune_seconds_total"] - before["vllm_dvlm:prune_seconds_total"]
    assert spent == pytest.approx(sum(r["kv_transfer_params"]["dvlm"]["prune_ms"] for r in replies) / 1000)
    assert len({reply["choices"][0]["message"]["content"] for reply in replies}) == 1


@pytest.mark.parametrize("options", [{}, {"prune_method": "redvtp", "prune_keep_ratio": 0.25}], ids=["none", "pruned"])
def test_report_in_a_header(server, options):
    """Also for clients that know no other fields than OpenAI's; a stream's headers are sent before it is known."""
    body = chat_of(IMAGE, max_tokens=8, ignore_eos=True)
    body["vllm_xargs"] = {"diffusion_canvas_length": 8} | options
    reply = server.http.post("/v1/chat/completions", json=body)
    report = json.loads(reply.headers["x-vllm-dvlm"])
    assert report == reply.json()["kv_transfer_params"]["dvlm"]
    assert report["denoise_steps"] > 1 and bool(report.get("prune_ms")) == bool(options)
    streamed = server.http.post("/v1/chat/completions", json=body | {"stream": True})
    assert streamed.status_code == 200 and "x-vllm-dvlm" not in streamed.headers
    server.wait_idle()


def test_no_named_length_is_the_familys_default_canvas(server):
    """Not all that fits: the official demo's 128 tokens, in one block with a step per position."""
    cached = {"diffusion_refresh_interval": 32}
    plain = {"model": MODEL, "ignore_eos": True, "vllm_xargs": cached}
    body = plain | {"messages": [{"role": "user", "content": "hi"}]}
    reply = server.send(body)
    assert reply["usage"]["completion_tokens"] == 128
    assert reply["kv_transfer_params"]["dvlm"]["denoise_steps"] == 128
    picture = chat_of(IMAGE, ignore_eos=True, vllm_xargs=cached)
    del picture["max_tokens"]
    assert server.send(picture)["usage"]["completion_tokens"] == 128
    response = server.http.post("/v1/responses", json=plain | {"input": "hi"})
    assert response.json()["usage"]["output_tokens"] == 128
    # What is named is untouched.
    few = cached | {"diffusion_max_steps": 8}
    assert server.send(body | {"max_tokens": 140, "vllm_xargs": few})["usage"]["completion_tokens"] == 140
    named = server.send(body | {"vllm_xargs": few | {"diffusion_canvas_length": 160}})
    assert named["usage"]["completion_tokens"] == 160
