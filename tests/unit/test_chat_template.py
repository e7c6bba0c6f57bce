"""The official conversation as a Jinja template, and the cut at <image>."""

import json
from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from tests.golden import lavida_cases
from vllm_dvlm.checkpoint.chat_template import choose, family_template, mentions_images, reads_variable
from vllm_dvlm.families import LLADA_V
from vllm_dvlm.families.lavida import LAVIDA_DREAM, LAVIDA_LLADA
from vllm_dvlm.synthetic.checkpoint_files import CHAT_TEMPLATE as TEXT_ONLY

GOLDEN = Path(__file__).parents[1] / "golden" / "llada_v"
CASES = sorted(p.stem for p in GOLDEN.glob("*.json") if "question" in json.loads(p.read_text()))
IMAGE = {"type": "image"}


def render(messages, family=LLADA_V, **kwargs):
    texts, _ = render_jinja_template(
        conversations=[messages],
        chat_template=family_template(family),
        # The official code writes begin-of-text as a constant; a tokenizer may call another token that.
        bos_token="<s>",
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


@pytest.mark.parametrize("case", lavida_cases.all_cases(), ids=lambda case: case.name)
def test_text_of_every_lavida_prompt(case):
    family = LAVIDA_DREAM if case.variant == "lavida-dream" else LAVIDA_LLADA
    images, question = [IMAGE] * bool(case.image_record), case.raw["question"]
    assert render([user(*images, text(question))], family) == case.prompt_text
    assert render([user("<image>\n" * len(images) + question)], family) == case.prompt_text


def test_dreams_turns():
    """Contents are not trimmed, and there is no begin of text."""
    answer = {"role": "assistant", "content": "Hello. "}
    whole = render(
        [{"role": "system", "content": "Be brief."}, user(" Hi"), answer, user(text("b"), IMAGE)], LAVIDA_DREAM
    )
    assert whole == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi<|im_end|>\n"
        "<|im_start|>assistant\nHello. <|im_end|>\n<|im_start|>user\nb<image>\n<|im_end|>\n<|im_start|>assistant\n"
    )
    own = render([user(IMAGE, text("Is <image> red? "))], LAVIDA_DREAM)
    assert own.endswith("<|im_start|>user\nIs <image> red? <|im_end|>\n<|im_start|>assistant\n")
    for message, what in (
        (user({"type": "video"}), "video"),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock"}}]}, "tool_calls"),
    ):
        with pytest.raises(TemplateError, match=what):
            render([message], LAVIDA_DREAM)


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


def test_what_has_no_place_is_refused():
    """Nothing a message carries is left out without a word."""
    for message, what in (
        (user({"type": "tool_reference", "name": "clock"}), "tool_reference"),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock"}}]}, "tool_calls"),
    ):
        with pytest.raises(TemplateError, match=what):
            render([message])


LOOP = "{% for m in messages %}"
PARTS = LOOP + "{% for part in m.content %}"
DEMO = json.loads((Path(__file__).parents[2] / "examples/demo_model/tokenizer_config.json").read_text())[
    "chat_template"
]
ABOUT_IMAGES = {
    "ours": family_template(LLADA_V),
    "Dream's": family_template(LAVIDA_DREAM),
    "demo model": DEMO,
    "type": PARTS + "{% if part['type'] == 'image' %}@{% endif %}{% endfor %}{% endfor %}",
    "type of OpenAI": PARTS + "{% if part.type == 'image_url' %}@{% endif %}{% endfor %}{% endfor %}",
    "types": PARTS + "{% if part.type in ['video', 'image'] %}@{% endif %}{% endfor %}{% endfor %}",
    "key": PARTS + "{% if 'image' in part %}@{% endif %}{% endfor %}{% endfor %}",
    "attribute": PARTS + "{% if part.image %}@{% endif %}{% endfor %}{% endfor %}",
    "macro": "{% macro image_of(p) %}@{% endmacro %}" + PARTS + "{{ image_of(part) }}{% endfor %}{% endfor %}",
    "variable": PARTS + "{{ part.text or image_token }}{% endfor %}{% endfor %}",
    "placeholder written": LOOP + "<image>{{ m.content }}{% endfor %}",
    "placeholder replaced": LOOP + "{{ m.content | replace('<image>', '') }}{% endfor %}",
    "another placeholder": LOOP + "{{ '<|image_pad|>' + m.content }}{% endfor %}",
    "other brackets": LOOP + "[IMG]{{ m.content }}{% endfor %}",
    "generation block": LOOP + "{%- generation -%}<image>{{ m.content }}{% endgeneration %}{% endfor %}",
    "loop controls": PARTS + "{% if part.type == 'image' %}{% continue %}{% endif %}{% endfor %}{% endfor %}",
}
TEXT_TEMPLATES = {
    "LLaDA's": TEXT_ONLY,
    "comment": "{# no <image> here, images are not supported #}" + TEXT_ONLY,
    "prose": "You cannot see an image. " + TEXT_ONLY,
    "prose in quotes": "{{ 'Say so if asked about an image.' }}" + TEXT_ONLY,
    "parts of text": PARTS + "{{ part['text'] }}{% endfor %}{% endfor %}",
    "broken": LOOP + "<image>",
    "empty": "",
}


@pytest.mark.parametrize("name", ABOUT_IMAGES)
def test_templates_about_images(name):
    template = ABOUT_IMAGES[name]
    assert mentions_images(template)
    assert choose([template], LLADA_V).template == template
    # vLLM's pick comes first, but only if it knows images.
    assert choose([TEXT_ONLY, template], LLADA_V).template == choose([None, template], LLADA_V).template == template


@pytest.mark.parametrize("name", TEXT_TEMPLATES)
def test_text_templates_give_way_to_the_official_conversation(name):
    template = TEXT_TEMPLATES[name]
    assert not mentions_images(template)
    chosen = choose([template], LLADA_V)
    assert chosen.template == family_template(LLADA_V) and "does not mention images" in chosen.origin
    assert LLADA_V.name in chosen.origin and "none" in choose([None], LLADA_V).origin


def test_variables_of_a_template():
    assert reads_variable("{% if tools %}{{ tools | tojson }}{% endif %}", "tools")
    assert not reads_variable(family_template(LLADA_V), "tools") and not reads_variable("{{ tools", "tools")
    assert not reads_variable("{% set tools = [] %}{{ tools }}", "tools")
