"""Chats to prompts through vLLM's front end: which template writes them, where images stand, what ids are shown as."""

import asyncio
import copy
import pickle

import pytest
import torch
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.renderers import ChatParams

from tests.engine import prompt_rendering
from tests.engine.prompt_rendering import chat, front_end_of, images_of, load, render, same_as
from vllm_dvlm.synthetic import checkpoint_files as files


@pytest.fixture(scope="module")
def front_end(tmp_path_factory):
    """Of a checkpoint whose tokenizer files bring LLaDA's text-only chat template, as those of the release do."""
    prompt_rendering.register()
    made = front_end_of(tmp_path_factory.mktemp("tiny"))
    yield made
    made.shutdown()


@pytest.fixture
def fresh(front_end):
    front_end.clear_mm_cache()
    return front_end


def is_official(front_end, name):
    """Chats that repeat a recorded prompt, the places of images left to the template or written in the text."""
    case = load(name)
    parts = [{"type": "image_pil", "image_pil": image} for image in images_of(case)]
    text = {"type": "text", "text": case["question"].replace("<image>\n", "")}
    same_as(case, chat(front_end, [*parts, text]))
    same_as(case, chat(front_end, [*parts, {"type": "text", "text": case["question"]}]))
    plain = load("a1_text_single_block")
    assert chat(front_end, plain["question"])["prompt_token_ids"] == plain["prompt_ids"]
    return True


@pytest.mark.parametrize("name", ["b1_image_steps_eq_gen", "i1_two_images_anyres"])
def test_chat_is_the_official_conversation(fresh, name):
    """The tokenizer files bring LLaDA's template, which knows neither the system text nor images."""
    assert fresh.get_tokenizer().name_or_path and is_official(fresh, name)
    with pytest.raises(VLLMValidationError, match="placeholder"):
        chat(fresh, load(name)["question"])


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": None},
        {"chat_template": [{"name": "default", "template": files.CHAT_TEMPLATE}, {"name": "x", "template": "<image>"}]},
        {"chat_template": [{"name": "x", "template": "<image>"}, {"name": "y", "template": "y"}]},
        # The official code writes begin-of-text as a constant.
        {"bos_token": None, "chat_template": None},
    ],
    ids=["none", "named", "named without default", "no begin of text"],
)
def test_official_conversation_whatever_the_files_lack(tmp_path, settings):
    front_end = front_end_of(tmp_path, **settings)
    plain = load("a1_text_single_block")
    assert chat(front_end, plain["question"])["prompt_token_ids"] == plain["prompt_ids"]
    front_end.shutdown()


OWN = "{% for m in messages %}{{ m.role }}: {{ m.content | replace('<image>', '[<image>]') }};{% endfor %}"
OF_PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{% if part.type == 'image' %}[<image>]"
    "{% else %}{{ part.text }}{% endif %}{% endfor %};{% endfor %}"
)


def text_of(front_end, *content, **kwargs):
    """Prompt text of one user turn; "@" stands for an image."""
    image = {"type": "image_pil", "image_pil": Image.new("RGB", (20, 20))}
    parts = [image if part == "@" else {"type": "text", "text": part} for part in content]
    return chat(front_end, parts, **kwargs)["prompt"]


def write_jinja(folder, settings):
    (folder / "chat_template.jinja").write_text(OF_PARTS)


def write_processor(folder, settings):
    """Files of a processor, with a template of its own and image settings that the official code has as constants."""
    clip = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.3], "size": {"shortest_edge": 100}}
    files.write_json(folder / "preprocessor_config.json", clip | {"processor_class": "LlavaProcessor"})
    of_processor = {"processor_class": "LlavaProcessor", "image_token": "[CLS]", "patch_size": 14}
    files.write_json(folder / "processor_config.json", of_processor | {"vision_feature_select_strategy": "default"})
    files.write_json(folder / "chat_template.json", {"chat_template": settings.pop("of_processor")})


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"chat_template": OF_PARTS}, None),
        ({"chat_template": [{"name": "default", "template": OF_PARTS}, {"name": "tool_use", "template": "x"}]}, None),
        ({}, write_jinja),
        ({"of_processor": OF_PARTS}, write_processor),
    ],
    ids=["tokenizer_config.json", "named", "chat_template.jinja", "processor"],
)
def test_a_template_of_the_checkpoint_that_knows_images_is_kept(tmp_path, settings, change):
    """Content stays parts, as it asks for; so images stand where their parts do."""
    front_end = front_end_of(tmp_path, **settings, **({"change": change} if change else {}))
    assert text_of(front_end, "a", "@", "b") == "user: a[<image>]b;"
    assert front_end.get_tokenizer().get_chat_template() == OF_PARTS
    case = load("b1_image_steps_eq_gen")
    prompt = {"prompt": case["prompt_text"], "multi_modal_data": {"image": images_of(case)}}
    same_as(case, render(front_end, prompt))
    # A request may name another one, or bring it.
    assert text_of(front_end, "a", "@", "b", chat_template=OWN) == "user: [<image>]\na\nb;"
    assert text_of(front_end, "a", "@", chat_template_kwargs={"chat_template": OWN}) == "user: [<image>]\na;"
    front_end.shutdown()


def test_a_processors_template_for_text_gives_way(tmp_path):
    front_end = front_end_of(tmp_path, write_processor, of_processor=files.CHAT_TEMPLATE)
    assert is_official(front_end, "b1_image_steps_eq_gen")
    front_end.shutdown()


def test_a_template_for_text_that_knows_images_is_kept(tmp_path):
    front_end = front_end_of(tmp_path, chat_template=OWN)
    assert text_of(front_end, "a", "@", "b") == "user: [<image>]\na\nb;"
    front_end.shutdown()


def test_a_named_template_wins(fresh):
    """The checkpoint's own by argument, as a user would who wants it: no system text, images first."""
    text = text_of(fresh, "a", "@", "b", chat_template=files.CHAT_TEMPLATE)
    assert text.startswith("<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n<image>\na\nb<|eot_id|>")
    assert text_of(fresh, "a", "@", "b", chat_template=OF_PARTS) == "user: a[<image>]b;"
    assert "assistant. You are able" in text_of(fresh, "a", "@", "b")


def test_tools_are_not_left_out(fresh):
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(VLLMValidationError, match="tools: the chat template"):
        text_of(fresh, "a", chat_template_kwargs={"tools": tools})
    writes_them = "{{ tools[0].function.name }}: {{ messages[0].content }}"
    assert text_of(fresh, "a", chat_template=writes_them, chat_template_kwargs={"tools": tools}) == "f: a"
    assert text_of(fresh, "a", chat_template_kwargs={"tools": tools}, tool_choice="none").count("a<|eot_id|>") == 1


@pytest.mark.parametrize("rebuild", [lambda t: t, copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_the_placeholder_has_a_string_and_no_word(fresh, rebuild):
    tokenizer = rebuild(fresh.get_tokenizer())
    ids = [300, 126349, 126349, 301]
    a, b = tokenizer.decode([300]), tokenizer.decode([301])
    assert tokenizer.convert_ids_to_tokens(ids)[1:3] == ["<image>"] * 2 and None not in tokenizer.convert_ids_to_tokens(
        ids
    )
    assert (
        tokenizer.convert_ids_to_tokens(126349) == tokenizer.decode(126349) == tokenizer.decode([126349]) == "<image>"
    )
    assert tokenizer.decode(ids) == tokenizer.decode(torch.tensor(ids)) == f"{a}<image><image>{b}"
    assert tokenizer.batch_decode([ids, [300], []]) == [f"{a}<image><image>{b}", a, ""]
    assert tokenizer.decode(ids, skip_special_tokens=True) == a + b
    assert len(tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)) == 2
    # The vocabulary does not know.
    assert len(tokenizer) == tokenizer.max_token_id + 1 == 126349
    assert "<image>" not in tokenizer.get_vocab() and 126349 not in tokenizer.get_vocab().values()
    assert 126349 not in tokenizer.encode("a <image> b")


def turns(*messages):
    """Messages of (role, contents); "@" stands for an image."""
    image = {"type": "image_pil", "image_pil": Image.new("RGB", (20, 20))}
    parts = lambda content: [image if part == "@" else {"type": "text", "text": part} for part in content]  # noqa: E731
    return [{"role": role, "content": c if isinstance(c, str) else parts(c)} for role, c in messages]


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        # As many places as images, but an image would stand in another message than its own.
        ([("user", "What is <image>?"), ("user", ["@", "@", "<image>"])], 1),
        ([("user", ["@", "@", "<image>"]), ("user", "What is <image>?")], 1),
        ([("user", ["@", "<image> <image>"]), ("user", ["@", "@", "<image>"])], 1),
        ([("user", ["@", "Hi"]), ("user", ["@", "@", "<image>"]), ("assistant", "<image>")], 2),
        ([("system", ["<image>"]), ("user", ["@", "@", "<image>"])], 1),
        ([("user", ["@", "@", "<image>"]), ("tool", "saw <image>"), ("user", "?")], 1),
        ([("user", ["@", "a"]), ("tool", "saw <image>"), ("user", "?")], 2),
        ([("user", ["<ima", "ge>"]), ("user", ["@", "@", "<image>"])], 1),
        ([("user", ["@"]), ("user", ["<image>"])], 2),
        ([("user", "Is <image> a tag?")], 1),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_images_stay_in_their_message(fresh, messages, wrong, is_async):
    with pytest.raises(VLLMValidationError, match=rf"Message {wrong} \(.*write <image> once per image of the same"):
        if is_async:
            asyncio.run(fresh.render_chat_async([turns(*messages)], ChatParams()))
        else:
            fresh.render_chat([turns(*messages)], ChatParams())


def test_templates_for_text_cannot_misplace_images(tmp_path):
    """vLLM itself writes what a message lacks, so a place in another message is one too many."""
    front_end = front_end_of(tmp_path, chat_template=OWN)
    for messages in (
        [("user", "What is <image>?"), ("user", ["@", "@", "<image>"])],
        [("user", ["@", "@", "<image>"]), ("assistant", "<image>")],
    ):
        with pytest.raises(VLLMValidationError, match="3 image placeholder.*2 image"):
            front_end.render_chat([turns(*messages)], ChatParams())
    front_end.shutdown()


def test_messages_that_place_their_own_images(fresh):
    messages = turns(
        ("user", ["@", "@", "a <image> b <image>"]), ("assistant", "c"), ("user", ["d", "@"]), ("user", "e")
    )
    prompt = fresh.render_chat([messages], ChatParams())[1][0]
    assert prompt["prompt"].count("<image>") == len(prompt["mm_placeholders"]["image"]) == 3
    assert "a <image> b <image><|eot_id|>" in prompt["prompt"] and "d<image>\n<|eot_id|>" in prompt["prompt"]
