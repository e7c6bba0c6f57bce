"""Tables, links, commands and options of the three READMEs are those of the code."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_dvlm.cli import build_parser
from vllm_dvlm.options import DenoiseParams
from vllm_dvlm.pruning.names import METHODS
from vllm_dvlm.settings import ServerSettings
from vllm_dvlm.tools.settings_table import table

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", ROOT / "vllm_dvlm" / "README.md", ROOT / "examples" / "results" / "README.md"]
FRONT, INSIDE, RESULTS = (file.read_text(encoding="utf-8") for file in FILES)
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.S | re.M)


@pytest.mark.parametrize(("name", "cls"), [("options", DenoiseParams), ("settings", ServerSettings)])
def test_tables_of_options_are_current(name, cls):
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", INSIDE, re.S)
    assert found and found[1] == table(cls), "run python -m vllm_dvlm.tools.settings_table and paste the table"


def test_the_front_page_names_every_option_and_method_and_is_short():
    for name in DenoiseParams.__dataclass_fields__:
        assert f"`{name}`" in FRONT, name
    for method in METHODS:
        assert f"`{method}`" in FRONT, method
        assert re.search(rf"^\| `{method}` \|", INSIDE, re.M), method
    assert len(FRONT.encode()) <= 10_000


def anchors(text):
    """Anchors of the headings of a file, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", file.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        found = (file.parent / path).resolve() if path else file
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), target


def commands(text):
    """Command lines of the fenced blocks, as words; comments and variables in front are left out."""
    for block in FENCED.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split()
            while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
                line = line.split(maxsplit=1)[1]
                words = words[1:]
            if words and words[0] in ("vllm-dvlm", "make", "python"):
                yield shlex.split(line, comments=True)


def test_commands_can_be_run():
    parser, targets = build_parser(), re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    lines = [words for text in (FRONT, INSIDE, RESULTS) for words in commands(text)]
    assert {words[0] for words in lines} >= {"vllm-dvlm", "make"}
    for words in lines:
        if words[0] == "vllm-dvlm":
            found, rest = parser.parse_known_args(words[1:])
            # Whatever else some are given is vLLM's.
            assert not rest or getattr(found, "takes_more", False), words
        elif words[0] == "make":
            assert words[1] in targets, words
        elif words[1] == "-m":
            assert find_spec(words[2]) is not None, words
        else:
            assert (ROOT / words[1]).exists(), words


def test_options_in_the_texts_exist():
    """Whatever looks like an option of ours is one."""
    known = {*DenoiseParams.__dataclass_fields__, *ServerSettings.names()}
    for text in (FRONT, INSIDE, RESULTS):
        for name in re.findall(r"`((?:diffusion|prune)_\w+)`", text):
            assert name in known, name
