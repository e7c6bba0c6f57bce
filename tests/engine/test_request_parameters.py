"""Sampling parameters: what asks for nothing passes, what is refused is named as the request spells it, all has bounds.

Through vLLM's own protocols, renderer and InputProcessor; no engine runs here. Over HTTP: test_server.py.
"""

import asyncio

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import RepetitionDetectionParams

from tests.engine.front_end import FrontEnd, engine_config, refused


@pytest.fixture(scope="module")
def front_end(checkpoint):
    made = FrontEnd(engine_config(checkpoint))
    yield made
    made.renderer.shutdown()


NOTHING = [
    {"logit_bias": {}},
    {"logit_bias": {5: 0.0, 6: -0.0}},
    {"bad_words": []},
    {"logprob_token_ids": []},
    {"stop": [], "stop_token_ids": []},
    {"presence_penalty": -0.0, "frequency_penalty": 0, "repetition_penalty": 1},
    {"top_p": 1, "top_k": -1, "min_p": 0.0, "temperature": 1},
    {"top_k": 0, "temperature": 1},
    {"top_p": 0.5, "top_k": 3},  # at temperature 0, which takes the best token whatever they say
    {"min_tokens": 0, "thinking_token_budget": -1},
    {"repetition_detection": RepetitionDetectionParams()},
    {"extra_args": {}},
    {"extra_args": {"session_id": "a", "kv_cache_report_mode": "full"}},
]


@pytest.mark.parametrize("params", NOTHING, ids=str)
def test_parameters_that_ask_for_nothing_pass(front_end, params):
    assert front_end.send(**params)


def test_stop_ids_that_no_reply_contains(front_end):
    """Such an id would stop a reply before it began, or never."""
    limits = front_end.renderer.prompt_limits
    ids = limits.token_ids
    roles = {ids.mask_token_id: "mask token", limits.image_token_id: "image", ids.num_tokens: "tokenizer"}
    roles |= {token_id: "never writes" for token_id in ids.forbidden_token_ids if token_id != ids.mask_token_id}
    assert {ids.bos_token_id, ids.eos_token_id} & roles.keys(), "tokens that begin and end a text"
    for token_id, role in roles.items():
        error = refused(front_end, f"stop_token_ids.*{token_id}.*({role}|image)", stop_token_ids=[300, token_id])
        assert error.parameter == "stop_token_ids"
    good = [300, ids.end_of_turn_token_id]
    assert front_end.send(stop_token_ids=good).sampling_params.stop_token_ids == good


def test_end_tokens_of_the_generation_config_are_no_requests_own(checkpoint, tmp_path):
    """vLLM adds them to every request's stop ids behind our check; LLaDA's file names a token that is never written."""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 1, 2, 3, 300]}')
    made = FrontEnd(engine_config(checkpoint, generation_config=str(tmp_path)))
    try:
        assert 300 in made.send().sampling_params.stop_token_ids
    finally:
        made.renderer.shutdown()


TOO_LONG = [
    ({"stop_token_ids": list(range(300, 300 + 129))}, "stop_token_ids has 129 ids; use at most 128"),
    ({"stop_token_ids": [300 + i % 500 for i in range(100_000)]}, "stop_token_ids has 500 ids; use at most 128"),
    ({"stop": ["x" + str(i) for i in range(129)]}, "stop: 129 strings; use at most 128"),
    ({"stop": "x" * 700_000}, "stop: a string of 700000 characters; use at most 1024"),
]


@pytest.mark.parametrize(("params", "match"), TOO_LONG, ids=[match for _, match in TOO_LONG])
def test_every_list_and_text_has_a_bound(front_end, params, match):
    refused(front_end, match, **params)


def test_as_many_as_allowed_pass(front_end):
    params = {"stop_token_ids": list(range(300, 428)), "stop": ["x" * 1024] * 128, "logprobs": 20}
    assert len(front_end.send(**params).sampling_params.stop_token_ids) == 128


CHAT = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 1}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
RESPONSE = {"input": "Hi", "temperature": 1}
# Endpoint, what the body says, what the refusal must name and may not (names that vLLM made of it); None: it passes.
SPELLED = [
    ("chat", {"logit_bias": {}, "bad_words": [], "logprob_token_ids": [], "stop": None}, None, None),
    ("chat", {"response_format": {"type": "text"}, "tools": [TOOL], "tool_choice": "none"}, None, None),
    ("chat", {"echo": True}, None, None),
    ("chat", {"echo": True, "logprobs": True}, None, None),
    ("chat", {"max_completion_tokens": 2000, "logprobs": True, "top_logprobs": 3}, None, None),
    ("chat", {"echo": True, "logprobs": True, "top_logprobs": 2}, "echo with top_logprobs", "prompt_logprobs"),
    ("chat", {"prompt_logprobs": 1}, "prompt_logprobs=1", "echo"),
    ("chat", {"echo": True, "return_token_ids": True, "logprobs": True, "top_logprobs": 2}, "echo", None),
    ("chat", {"response_format": {"type": "json_object"}}, "response_format", "structured_outputs"),
    ("chat", {"response_format": SCHEMA}, "response_format", "structured_outputs"),
    ("chat", {"structured_outputs": {"regex": "a"}}, "structured_outputs", "response_format"),
    ("chat", {"tools": [TOOL], "tool_choice": "required"}, "tools", "structured_outputs"),
    ("chat", {"tools": [TOOL], "tool_choice": TOOL | {"function": {"name": "look"}}}, "tools", "structured_outputs"),
    ("chat", {"logit_bias": {"5": 1}}, "logit_bias", None),
    (
        "chat",
        {"max_completion_tokens": 64, "vllm_xargs": {"diffusion_suffix": " a" * 99}},
        "diffusion_suffix",
        "max_tokens",
    ),
    ("completion", {"logit_bias": {}, "response_format": {"type": "text"}, "stop_token_ids": None}, None, None),
    ("completion", {"echo": True}, None, None),
    ("completion", {"echo": True, "logprobs": 1}, "echo with logprobs", "prompt_logprobs"),
    ("completion", {"echo": True, "return_token_ids": True, "logprobs": 1}, "echo", None),
    ("completion", {"prompt_logprobs": 1}, "prompt_logprobs=1", "echo"),
    ("completion", {"response_format": {"type": "json_object"}}, "response_format", None),
    ("completion", {"structured_outputs": {"choice": ["a"]}}, "structured_outputs", None),
    ("response", {"logit_bias": {}, "text": {"format": {"type": "text"}}, "tools": []}, None, None),
    ("response", {"text": {"format": {"type": "json_object"}}}, "text.format", None),
    ("response", {"top_p": 0.5}, "top_p=0.5", None),
    ("response", {"stop_token_ids": list(range(300, 500))}, "stop_token_ids has 200", None),
]


@pytest.mark.parametrize(("endpoint", "body", "named", "unnamed"), SPELLED, ids=lambda value: str(value)[:50])
def test_refusals_name_what_the_request_says(front_end, endpoint, body, named, unnamed):
    """Each request through vLLM's own protocol, renderer and translation, as its endpoint does it."""
    online = OnlineRenderer(
        front_end.renderer.model_config,
        front_end.renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        tool_parser="hermes",
        enable_auto_tools=True,
    )

    def sent():
        if endpoint == "chat":
            request = ChatCompletionRequest(**CHAT, **body)
            prompt = asyncio.run(online.render_chat(request))[1][0]
        elif endpoint == "completion":
            request = CompletionRequest(prompt="Hi", temperature=1, **body)
            prompt = asyncio.run(online.render_completion(request))[0]
        else:
            request = ResponsesRequest(**RESPONSE, **body)
            prompt = asyncio.run(online.render_responses(request)).engine_input
        params = request.to_sampling_params(body.get("max_completion_tokens", 16), {})
        return front_end.processor.process_inputs("r", prompt, params, ("generate",)).sampling_params

    if named is None:
        assert sent().prompt_logprobs is None, "no work that nobody asked for"
        return
    with pytest.raises(ValueError, match=named.replace(".", r"\.")) as caught:
        sent()
    assert unnamed is None or unnamed not in str(caught.value)
    assert caught.value.parameter in {None, "prompt_logprobs", *body, *body.get("vllm_xargs", {})}, "what clients read"


def test_a_length_that_the_engine_finds_later(front_end, monkeypatch):
    """``--max-model-len auto``: the engine tells the front end how many positions fit, behind our back."""
    prompt = {"prompt_token_ids": [300] * 1000}
    assert front_end.send(prompt, max_tokens=16)
    monkeypatch.setattr(front_end.renderer.model_config, "max_model_len", 1010)
    error = refused(front_end, "exceed the model's 1010 positions", prompt, max_tokens=16)
    assert error.parameter == "max_tokens"
