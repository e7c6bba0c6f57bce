"""What a request or a start-up may get wrong: each is one ValueError that names the parameter and the remedy.

The front end is vLLM's own (renderer and InputProcessor), which ``LLM`` and the server both use; no engine runs here.
Over HTTP: test_server.py.
"""

import io
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from vllm import SamplingParams
from vllm.config import CompilationConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import interface
from vllm.sampling_params import BeamSearchParams, RepetitionDetectionParams, StructuredOutputsParams
from vllm.v1.engine import input_processor

from tests.engine import engines
from tests.engine.front_end import MAX_CANVAS, MAX_MODEL_LEN, FrontEnd, engine_config, refused
from tests.golden import cases
from vllm_dvlm.config import _run_eagerly
from vllm_dvlm.patches.vllm import p002_validate_request
from vllm_dvlm.serving.admission import PROMPT_LIMITS_KEY
from vllm_dvlm.serving.errors import InvalidRequest


@pytest.fixture(scope="module")
def front_end(checkpoint):
    made = FrontEnd(engine_config(checkpoint))
    yield made
    made.renderer.shutdown()


def with_image(*images, text="<image>\nHi"):
    return {"prompt": text, "multi_modal_data": {"image": list(images)}}


def small_image():
    return Image.new("RGB", (97, 61))


def test_good_requests_pass(front_end):
    assert front_end.send().prompt_token_ids
    request = front_end.send(with_image(small_image()), stop=["x"], logprobs=3, seed=1, ignore_eos=True)
    assert len(request.prompt_token_ids) > 1000
    assert not request.sampling_params.extra_args, "nothing of ours travels to the engine"
    options = {"diffusion_block_length": 8, "diffusion_max_steps": 8, "diffusion_suffix": " The end."}
    assert front_end.send(extra_args=options).sampling_params.extra_args == options
    assert front_end.send(max_tokens=None).sampling_params.max_tokens > MAX_CANVAS


OPTIONS = [
    ({"diffusion_steps": 4}, "diffusion_steps is not a known option; did you mean diffusion_"),
    ({"diffusion_max_stepss": 4}, "did you mean diffusion_max_steps"),
    ({"keep_ratio": 0.5}, "keep_ratio is not a known option; did you mean prune_keep_ratio"),
    ({"diffusion_canvas_length": "16"}, "diffusion_canvas_length must be an integer"),
    ({"diffusion_canvas_length": 0}, "diffusion_canvas_length must be an integer ≥ 1"),
    ({"diffusion_canvas_length": MAX_CANVAS + 1}, "diffusion_canvas_length 65 is larger.*max_canvas_length 64"),
    ({"diffusion_canvas_length": 16, "diffusion_block_length": 5}, "diffusion_block_length 5 does not divide"),
    ({"diffusion_block_length": MAX_CANVAS + 1}, "diffusion_block_length 65 is larger"),
    ({"diffusion_block_length": [8]}, "diffusion_block_length must be an integer"),
    ({"diffusion_block_length": 8, "diffusion_max_steps": 3}, "diffusion_max_steps 3 must be a multiple"),
    ({"diffusion_max_steps": 1.5}, "diffusion_max_steps must be an integer"),
    ({"diffusion_remasking": "low_confidense"}, "diffusion_remasking must be one of.*did you mean 'low_confidence'"),
    ({"diffusion_remasking": 1}, "diffusion_remasking must be one of"),
    ({"diffusion_threshold": 0}, "diffusion_threshold must be a number > 0"),
    ({"diffusion_threshold": "1"}, "diffusion_threshold must be a number > 0"),
    ({"diffusion_threshold": float("nan")}, "diffusion_threshold must be a number > 0"),
    ({"diffusion_refresh_interval": 0}, "diffusion_refresh_interval must be an integer ≥ 1"),
    ({"diffusion_schedule": "cosine"}, "diffusion_schedule.*use 'uniform'"),
    ({"diffusion_schedule_shift": 3.0}, "diffusion_schedule.*use 'uniform'"),
    ({"diffusion_cfg_scale": 0.5}, "diffusion_cfg_scale.*not supported"),
    ({"diffusion_suffix": 5}, "diffusion_suffix must be text"),
    ({"diffusion_suffix": "a<|mdm_mask|>"}, "diffusion_suffix must not contain the mask token"),
    ({"diffusion_suffix": " word" * MAX_CANVAS}, "canvas and suffix together exceed.*diffusion_suffix"),
    ({"diffusion_suffix": "x" * 700_000}, "diffusion_suffix has 700000 characters; use at most 4096"),
    ({"diffusion_suffix": ["x" * 700_000]}, "diffusion_suffix must be text"),
    ({"x" * 700_000: 1}, r"^x+\.\.\. is not a known option"),
    ({"diffusion_remasking": "x" * 700_000}, "diffusion_remasking must be one of"),
    ({"session_id": "x" * 2000}, "session_id must be a text of at most 1024 characters"),
    ({"session_id": ["x"] * 2000}, "session_id must be a text of at most 1024 characters"),
    ({"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params.*remove it"),
    ({"diffusion_stream": "canvas"}, "diffusion_stream"),
    ({"diffusion_trace": 2}, "diffusion_trace must be 0 or 1"),
    ({"diffusion_trace": 1}, "diffusion_trace: this server writes no traces.*trace_dir"),
    ({"prune_keep_ratio": 1.5}, "prune_keep_ratio must be a number in"),
    ({"_dvlm_resume": 1}, "_dvlm_resume is not an option"),
    ({"diffusion_max_steps": 1e19}, "diffusion_max_steps must be an integer ≥ 1 and at most"),
]


@pytest.mark.parametrize(("options", "match"), OPTIONS, ids=lambda value: str(value)[:40])
def test_bad_option(front_end, options, match):
    error = refused(front_end, match, extra_args=options)
    assert isinstance(error, InvalidRequest)
    # One of the options at fault is named in the field that OpenAI clients read.
    assert error.parameter.split("_")[0].rstrip(".") in " ".join(options)


PARAMETERS = [
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"repetition_penalty": 1.2}, "repetition_penalty"),
    ({"top_p": 0.9, "temperature": 1}, "top_p"),
    ({"top_k": 5, "temperature": 1}, "top_k"),
    ({"min_p": 0.1, "temperature": 1}, "min_p"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"logit_bias": {5: 1.0}}, "logit_bias"),
    ({"allowed_token_ids": [5, 6]}, "allowed_token_ids"),
    ({"bad_words": ["photo"]}, "bad_words"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"prompt_logprob_token_ids": np.array([[5, 6]] * 2)}, "prompt_logprob_token_ids"),
    ({"repetition_detection": RepetitionDetectionParams(max_pattern_size=2, min_count=3)}, "repetition_detection"),
    ({"structured_outputs": StructuredOutputsParams(json={"type": "object"})}, "structured_outputs"),
]


@pytest.mark.parametrize(("params", "name"), PARAMETERS, ids=[name for _, name in PARAMETERS])
def test_unsupported_sampling_parameter(front_end, params, name):
    error = refused(front_end, name, **params)
    assert error.parameter == name


def test_beam_search(front_end):
    """The parameters are those of vllm/entrypoints/generate/beam_search; its prompts bypass the renderer."""
    params = SamplingParams(logprobs=4, max_tokens=1, temperature=0, watermarking=False, detokenize=False)
    with pytest.raises(ValueError, match="use_beam_search"):
        front_end.processor.process_inputs("r", {"type": "token", "prompt_token_ids": [5, 6]}, params, ("generate",))


def test_prompt_and_canvas_must_fit(front_end):
    room = MAX_MODEL_LEN - 40
    assert front_end.send({"prompt_token_ids": [300] * room}, max_tokens=40)
    refused(front_end, f"prompt of {room}, canvas of 41.*{MAX_MODEL_LEN} positions",
            {"prompt_token_ids": [300] * room}, max_tokens=41)  # fmt: skip
    refused(front_end, "canvas of 64", {"prompt_token_ids": [300] * room},
            extra_args={"diffusion_canvas_length": 64})  # fmt: skip
    # Without max_tokens the canvas is cut to what is left.
    assert front_end.send({"prompt_token_ids": [300] * room}, max_tokens=None)
    refused(front_end, "maximum.*length", {"prompt_token_ids": [300] * (MAX_MODEL_LEN + 1)})
    refused(front_end, "positions|maximum", {"prompt_token_ids": [300] * MAX_MODEL_LEN})


def test_bad_prompts(front_end):
    refused(front_end, "mask token", {"prompt": "a <|mdm_mask|> b"})
    refused(front_end, "at least one token|empty", {"prompt_token_ids": []})
    refused(front_end, "out of vocabulary", {"prompt_token_ids": [10**6]})


def test_bad_images(front_end):
    refused(front_end, "exactly once per image", with_image(small_image(), small_image()))
    refused(front_end, "exactly once per image", with_image(small_image(), text="<image> <image>"))
    refused(front_end, "exactly once per image", {"prompt": "<image>\nHi"})
    refused(front_end, "needs 21 tiles.*max_image_tiles", with_image(Image.new("RGB", (1600, 1200))))
    data = io.BytesIO()
    Image.effect_noise((97, 61), 50).save(data, "png")
    cut = Image.open(io.BytesIO(data.getvalue()[: len(data.getvalue()) // 2]))
    refused(front_end, "cannot be read", with_image(cut))
    # The same image is good afterwards.
    assert front_end.send(with_image(small_image()))


def test_request_of_another_model_passes(front_end):
    """Only parameters that vLLM has just shown to our validator belong to one of our models."""
    engine_input = front_end.renderer.render_cmpl([{"prompt": "Hi"}])[0]
    params = SamplingParams(top_p=0.5)
    input_processor.current_platform.validate_request(engine_input, params)
    with pytest.raises(ValueError, match="top_p"):
        front_end.processor.process_inputs("r", engine_input, params, ("generate",))
    input_processor.current_platform.validate_request(engine_input, params)


def test_same_checks_on_other_platforms(front_end, monkeypatch):
    """A platform that inherits vLLM's empty method, as CUDA does, checks through the patch."""
    long = {"prompt_token_ids": [300] * (MAX_MODEL_LEN - 40)}
    monkeypatch.setattr(input_processor, "current_platform", interface.UnspecifiedPlatform())
    assert front_end.send(long, max_tokens=41), "nothing is checked without the patch"
    original = vars(interface.Platform)["validate_request"]
    monkeypatch.setattr(interface.Platform, "validate_request", original)  # restored after the test
    p002_validate_request.install()
    refused(front_end, "positions", long, max_tokens=41)
    refused(front_end, "top_p", top_p=0.5, temperature=1)
    assert front_end.send(long, max_tokens=40)


def test_chat_and_async_prompts_are_checked_too(front_end):
    import asyncio

    from vllm.renderers import ChatParams

    renderer = front_end.renderer
    conversation = [[{"role": "user", "content": "Hi"}]]
    inputs = [
        renderer.render_chat(conversation, ChatParams())[1][0],
        asyncio.run(renderer.render_chat_async(conversation, ChatParams()))[1][0],
        asyncio.run(renderer.render_cmpl_async([with_image(small_image())]))[0],
    ]
    for engine_input in inputs:
        assert engine_input[PROMPT_LIMITS_KEY] is renderer.prompt_limits
    assert renderer.prompt_limits.mask_token_id in cases.load("k1_mask_token_predicted").final_ids


START_UP = [
    ({"pipeline_parallel_size": 2}, "pipeline parallelism: use --tensor-parallel-size"),
    ({"enable_lora": True}, "LoRA"),
    ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}}, "speculative"),
    ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "kv-transfer"),
    ({"enable_prompt_embeds": True}, "prompt-embeds"),
    ({"async_scheduling": True}, "async-scheduling"),
    ({"enable_prefix_caching": True}, "remove --enable-prefix-caching"),
    ({"enable_chunked_prefill": True}, "remove --enable-chunked-prefill"),
    ({"kv_cache_dtype": "int8_per_token_head"}, "int8_per_token_head.*use auto"),
    ({"kv_cache_dtype": "fp8"}, "kv-cache-dtype fp8.*use auto"),
    ({"compilation_config": {"cudagraph_mode": "FULL"}}, "remove cudagraph_mode"),
    ({"attention_backend": "FLASHINFER"}, "remove --attention-backend"),
    ({"max_num_scheduled_tokens": 64}, "--max-num-batched-tokens instead of --max-num-scheduled-tokens"),
    ({"additional_config": {"dvlm": {"prune_method": "fastv", "prune_layer": 9}}}, "prune_layer must be from 1 to 3"),
    ({"additional_config": {"dvlm": {"attention_whole": "xformers"}}}, 'needs an NVIDIA GPU.*use "auto"'),
    ({"additional_config": {"dvlm": {"attention_whole": "flash"}}}, "attention_whole must be"),
    ({"tokenizer_mode": "slow"}, "tokenizer"),
    ({"logprobs_mode": "raw_logits"}, "remove --logprobs-mode raw_logits"),
    ({"logprobs_mode": "processed_logprobs"}, "remove --logprobs-mode processed_logprobs"),
    ({"logits_processors": ["mine:Processor"]}, "remove --logits-processors"),
    ({"return_sampling_mask": True, "logprobs_mode": "processed_logprobs"}, "remove --return-sampling-mask"),
    ({"enable_trace_replay": True}, "remove --enable-trace-replay"),
    ({"skip_tokenizer_init": True}, "remove --skip-tokenizer-init"),
    ({"runner": "pooling", "convert": "embed"}, "remove --runner pooling"),
    ({"convert": "embed"}, "remove --(runner|convert)"),
    ({"override_generation_config": {"top_p": 0.9}}, "the others from --override-generation-config"),
    ({"mm_processor_cache_type": "shm"}, "remove --mm-processor-cache-type shm"),
    ({"enable_mm_embeds": True}, "remove --enable-mm-embeds"),
    ({"mm_encoder_only": True}, "remove --mm-encoder-only"),
    ({"mm_encoder_attn_dtype": "fp8"}, "remove --mm-encoder-attn-dtype fp8"),
    ({"video_pruning_rate": 0.5}, "remove --video-pruning-rate"),
    ({"long_prefill_token_threshold": 64}, "remove --long-prefill-token-threshold"),
    ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "remove --scheduler-cls"),
    ({"kv_sharing_fast_prefill": True}, "remove --kv-sharing-fast-prefill"),
    ({"kv_offloading_size": 1}, "remove --kv-offloading-size"),
    ({"kv_events_config": {"enable_kv_cache_events": True}}, "remove --kv-events-config"),
    ({"enable_batch_sharded_sampling": True, "tensor_parallel_size": 2}, "remove --enable-batch-sharded-sampling"),
    ({"enable_expert_parallel": True, "tensor_parallel_size": 2}, "remove --enable-expert-parallel"),
    ({"enable_dbo": True, "all2all_backend": "deepep_low_latency"}, "remove --enable-dbo"),
    ({"ubatch_size": 2, "all2all_backend": "deepep_low_latency"}, "remove.*--ubatch-size"),
    ({"watermark_config": {"algorithm": "gumbel", "key": 1}}, "remove --watermark-config"),
    ({"diffusion_config": {"canvas_length": 8}}, "remove --diffusion-config"),
    ({"compilation_config": {"mode": 3}}, "remove mode from --compilation-config"),
    ({"compilation_config": {"compile_mm_encoder": True}}, "remove compile_mm_encoder"),
    ({"tensor_parallel_size": 3}, "4 attention heads.*--tensor-parallel-size 3 does not divide.*use 1, 2"),
    ({"additional_config": {"max_canvas_length": 5}}, 'takes max_canvas_length inside "dvlm"'),
    ({"additional_config": {"dlvm": {"max_canvas_length": 5}}}, "finds its settings under \"dvlm\", not 'dlvm'"),
    ({"additional_config": {"dvlm": {"max_canvas_lenght": 5}}}, "max_canvas_lenght.*did you mean max_canvas_length"),
    ({"additional_config": {"dvlm": {"max_canvas_length": "5"}}}, "max_canvas_length must be an integer"),
    ({"additional_config": {"dvlm": {"diffusion_remasking": "x"}}}, "diffusion_remasking must be one of"),
    ({"additional_config": {"dvlm": 5}}, "must be an object"),
]


@pytest.mark.parametrize(("changes", "match"), START_UP, ids=lambda value: str(value)[:40])
def test_refused_at_start_up(checkpoint, changes, match):
    with pytest.raises(ValueError, match=match):
        engine_config(checkpoint, **changes)


@pytest.mark.parametrize("name", ["VLLM_COMPUTE_NANS_IN_LOGITS", "VLLM_RAISE_ON_LOGIT_NANS", "VLLM_USE_RUST_FRONTEND"])
def test_switches_of_the_environment(checkpoint, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=f"unset {name}"):
        engine_config(checkpoint)
    monkeypatch.setenv(name, "0")
    assert engine_config(checkpoint)


def test_a_config_that_the_hooks_have_seen_passes_again(checkpoint):
    """vLLM builds copies of configs; what we have set there is not the user's."""
    config = engine_config(checkpoint)
    config.model_config.config_updated = False
    config.diffusion_config = None
    config.try_verify_and_update_config()
    assert len(config.model_config.logits_processors) == 1


DEMO = Path(__file__).parents[2] / "examples" / "demo_model"


@pytest.mark.parametrize(("ranks", "mode"), [(1, "weights"), (2, "data")])
def test_a_tower_that_the_ranks_do_not_divide_is_copied(ranks, mode):
    """The demo model's tower has three heads; its text model has four."""
    args = EngineArgs(model=str(DEMO), tensor_parallel_size=ranks, distributed_executor_backend="mp")
    config = args.create_engine_config()
    assert config.model_config.hf_config.vision_config.num_attention_heads == 3
    assert config.model_config.multimodal_config.mm_encoder_tp_mode == mode


def test_a_tower_that_the_ranks_divide_is_cut(checkpoint):
    config = engine_config(checkpoint, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert config.model_config.multimodal_config.mm_encoder_tp_mode == "weights"


@pytest.mark.parametrize(("is_off", "groups"), [(None, "auto"), (True, "one")])
def test_one_kv_group_where_vllm_has_no_manager_of_several(checkpoint, is_off, groups):
    changes = {"additional_config": {"dvlm": {"prune_method": "fastv"}}, "disable_hybrid_kv_cache_manager": is_off}
    assert engine_config(checkpoint, **changes).additional_config["dvlm"]["fastv_kv_groups"] == groups


def test_a_named_generation_config_that_suggests_penalties(checkpoint, tmp_path):
    """Suggestions for other kinds of models; they would refuse every request."""
    (tmp_path / "generation_config.json").write_text('{"presence_penalty": 0.5, "top_k": -1, "temperature": 0.3}')
    with pytest.raises(ValueError, match="takes no presence_penalty.*--override-generation-config"):
        engine_config(checkpoint, generation_config=str(tmp_path))
    undone = engine_config(
        checkpoint, generation_config=str(tmp_path), override_generation_config={"presence_penalty": 0}
    )
    assert undone.model_config.get_diff_sampling_param()["temperature"] == 0.3


@pytest.mark.parametrize("given", [None, False])
def test_off_unless_forced_on(checkpoint, given):
    config = engine_config(checkpoint, enable_prefix_caching=given, enable_chunked_prefill=given)
    assert not config.cache_config.enable_prefix_caching
    assert not config.scheduler_config.enable_chunked_prefill


def test_neither_compiler_nor_cuda_graphs(checkpoint):
    config = engine_config(checkpoint).compilation_config
    assert config.mode.name == "NONE" and config.cudagraph_mode.name == "NONE"
    assert "all" in config.custom_ops, "vLLM's own kernels"
    # A CPU host would have switched graphs off by itself; on a GPU the hook is all there is.
    stock = SimpleNamespace(compilation_config=CompilationConfig())
    assert stock.compilation_config.cudagraph_mode is None, "not yet resolved, as in the hook"
    _run_eagerly(stock)
    assert stock.compilation_config.mode.name == stock.compilation_config.cudagraph_mode.name == "NONE"


def test_model_runner_v1_is_refused(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.delenv("VLLM_DVLM_WROTE_MODEL_RUNNER", raising=False)
    with pytest.raises(ValueError, match="unset VLLM_USE_V2_MODEL_RUNNER"):
        engine_config(checkpoint)


def test_after_a_model_of_vllms_own_in_the_same_process(checkpoint, monkeypatch):
    """Such a model leaves Model Runner V1 behind, which vLLM reads from the environment."""
    from vllm_dvlm.cpu_host.platform import DvlmCpuPlatform

    for name in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_DVLM_WROTE_MODEL_RUNNER"):
        monkeypatch.setenv(name, "1")
    DvlmCpuPlatform.choose_runner(is_ours=False)
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert engine_config(checkpoint).use_v2_model_runner


def test_offline(engine):
    """``LLM`` raises ValueError and goes on, also with an image that only refused requests have brought so far."""
    case = cases.load("b1_image_steps_eq_gen")
    good = (engines.case_prompt(case), engines.case_params(case))
    bad = SamplingParams(max_tokens=8, extra_args={"diffusion_stepz": 4})
    for _ in range(2):
        with pytest.raises(ValueError, match="diffusion_stepz is not a known option"):
            engine.llm.generate(good[0], bad, use_tqdm=False)
        with pytest.raises(ValueError, match="positions"):
            engine.llm.generate({"prompt_token_ids": [300] * (engines.MAX_MODEL_LEN - 4)}, good[1], use_tqdm=False)
        with pytest.raises(ValueError, match="use_beam_search"):
            engine.llm.beam_search([{"prompt": "Hi"}], BeamSearchParams(beam_width=2, max_tokens=4))
        output = engine.llm.generate(*good, use_tqdm=False)[0].outputs[0]
        assert list(output.token_ids) == case.final_ids
    engine.finish()
    engine.assert_idle()
