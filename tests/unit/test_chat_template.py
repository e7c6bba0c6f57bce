"""The official conversation as a Jinja template, and the cut at <image>."""

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

GOLDEN = Path(__file__).parents[1] / "golden" / "llada_v"
TEMPLATE = Path(__file__).parents[2] / "vllm_dvlm" / "chat_templates" / "llava_llada.jinja"
CASES = sorted(p.stem for p in GOLDEN.glob("*.json") if "question" in json.loads(p.read_text()))
IMAGE = {"type": "image"}


def render(messages, **kwargs):
    texts, _ = render_jinja_template(
        conversations=[messages],
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
        bos_token="<|startoftext|>",
        **kwargs,
    )
    return texts[0]


def text(value):
    return {"type": "text", "text": value}


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def turn(content):
    """The user's turn between the fixed beginning and the fixed end."""
    whole = render([content])
    before = "<|start_header_id|>user<|end_header_id|>\n\n"
    after = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert whole.count(before) == 1 and whole.endswith(after)
    return whole.split(before)[1].removesuffix(after)


@pytest.mark.parametrize("name", CASES)
def test_text_of_every_golden_prompt(name):
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    question = case["question"]
    assert render([user(question)]) == case["prompt_text"]
    assert render([user(text(question))]) == case["prompt_text"]
    placed, rest = question.count("<image>\n"), question.replace("<image>\n", "")
    if "<image>" not in rest:
        assert render([user(*[IMAGE] * placed, text(rest))]) == case["prompt_text"]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_assistant_header_is_always_last(add_generation_prompt):
    whole = render([user("Hi")], add_generation_prompt=add_generation_prompt)
    assert whole.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_system_message_replaces_the_default():
    whole = render([{"role": "system", "content": " Be brief.\n"}, user("Hi")])
    assert whole.startswith("<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>")
    assert "helpful language and vision" not in whole


def test_begin_of_text_stands_once():
    answer = {"role": "assistant", "content": "Hello."}
    whole = render([user("Hi"), answer, user("Again")])
    assert whole.count("<|startoftext|>") == 1 and whole.startswith("<|startoftext|>")
    assert whole.count("<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>") == 1


def test_places_of_images():
    assert turn(user(IMAGE, text("What?"))) == "<image>\nWhat?"
    assert turn(user(text("Left "), IMAGE, text("right "), IMAGE, text("?"))) == ("Left <image>\nright <image>\n?")
    assert turn(user(IMAGE)) == "<image>\n"
    # The token after a placeholder is dropped: it must not be the end of the turn.
    assert turn(user(text("Look: "), IMAGE)) == "Look: <image>\n"
    # As vLLM does for templates that know no parts: the text's own places count.
    assert turn(user(IMAGE, text(" Is <image> red? "))) == "Is <image> red?"


def test_empty_contents():
    assert turn({"role": "user", "content": ""}) == ""
    assert turn({"role": "user", "content": []}) == ""
    assert turn({"role": "user", "content": None}) == ""
