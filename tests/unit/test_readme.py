"""The README's tables and links are those of the code."""

import re
from pathlib import Path

import pytest

from vllm_dvlm.options import DenoiseParams
from vllm_dvlm.pruning.names import METHODS
from vllm_dvlm.settings import ServerSettings
from vllm_dvlm.settings_table import table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "cls"), [("options", DenoiseParams), ("settings", ServerSettings)])
def test_tables_of_options_are_current(name, cls):
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.S)
    assert found and found[1] == table(cls), "run python -m vllm_dvlm.settings_table and paste the table"


def test_every_method_has_a_row():
    assert set(METHODS) == set(re.findall(r"^\| `(\w+)` \| (?!.*default)", README, re.M)) & set(METHODS)
    for method in METHODS:
        assert re.search(rf"^\| `{method}` \|", README, re.M), method


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
