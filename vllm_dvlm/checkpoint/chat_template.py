"""Which Jinja template writes a conversation: one the user names, the checkpoint's own if it knows images, else the
family's.

The official code never asks the tokenizer files for a template: the conversation is a constant (LLaDA-V) or that of the
language model's own release behind a constant system text (LaViDa). But the tokenizer files of such a folder carry the
language model's template, which knows neither the system text nor images. Nothing of vLLM is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

import jinja2
import jinja2.meta
from jinja2 import nodes

from vllm_dvlm.families import Family

# A string of this form is a key or a type ('image', 'image_url'), not prose.
_IMAGE_WORD = re.compile(r"[\w-]*image[\w-]*", re.IGNORECASE)
# Texts that stand for an image: <image>, <|image_pad|>, <img>, [IMG].
_IMAGE_TAG = re.compile(r"<[^<>\s]*(image|img)[^<>\s]*>|\[(img|image)\]", re.IGNORECASE)
# Blocks that transformers adds to Jinja; they mark a region and change no text.
_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")


class Choice(NamedTuple):
    """A template and where it is from, in words for the line at start-up."""

    template: str
    origin: str


def family_template(family: Family) -> str:
    """The official conversation of a family as a Jinja template."""
    folder = resources.files("vllm_dvlm.checkpoint.chat_templates")
    return (folder / family.chat_template).read_text(encoding="utf-8")


def choose(candidates: Iterable[str | None], family: Family) -> Choice:
    """The template of a server for which the user names none.

    candidates: the checkpoint's own templates, best first; None stands for one that it does not have.
    """
    found = [template for template in candidates if template is not None]
    for template in found:
        if mentions_images(template):
            return Choice(template, "the checkpoint's own, which mentions images")
    why = "the checkpoint's own does not mention images" if found else "the checkpoint has none"
    return Choice(family_template(family), f"{family.name}'s official conversation ({family.chat_template}); {why}")


@lru_cache(maxsize=64)
def mentions_images(template: str) -> bool:
    """True if a template does something about images: it compares a type or key with one that is called image, reads a
    variable of that name, or writes a text that stands for an image. Comments and prose do not count, nor does a
    template that cannot be parsed.
    """
    tree = _parse(template)
    if tree is None:
        return False
    kinds = (nodes.Const, nodes.TemplateData, nodes.Name, nodes.Getattr, nodes.Keyword)
    return any(_is_about_images(node) for node in tree.find_all(kinds))


@lru_cache(maxsize=64)
def reads_variable(template: str, name: str) -> bool:
    """True if a template reads this variable of its caller; False if it cannot be parsed."""
    tree = _parse(template)
    return tree is not None and name in jinja2.meta.find_undeclared_variables(tree)


def _is_about_images(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Const):
        text = node.value
        return isinstance(text, str) and bool(_IMAGE_WORD.fullmatch(text) or _IMAGE_TAG.search(text))
    if isinstance(node, nodes.TemplateData):
        return bool(_IMAGE_TAG.search(node.data))
    names = {nodes.Name: "name", nodes.Getattr: "attr", nodes.Keyword: "key"}
    return bool(_IMAGE_WORD.fullmatch(getattr(node, names[type(node)])))


def _parse(template: str) -> nodes.Template | None:
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701 - parsed, never rendered
    try:
        return environment.parse(_GENERATION_BLOCK.sub("", template))
    except jinja2.TemplateSyntaxError:
        return None
