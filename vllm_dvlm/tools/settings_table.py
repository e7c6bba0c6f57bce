"""The README's tables of options, made from the dataclasses: ``python -m vllm_dvlm.tools.settings_table``."""

from __future__ import annotations

from dataclasses import fields

from vllm_dvlm.options import DenoiseParams
from vllm_dvlm.settings import ServerSettings


def table(cls: type) -> str:
    """Markdown table of the documented fields of ``cls``."""
    lines = ["| option | values | default | meaning |", "|---|---|---|---|"]
    for f in fields(cls):
        if "doc" in f.metadata:
            values = f.metadata["values"].replace("|", ", ")
            default = "–" if f.default in (None, "") else f"`{f.default}`"
            lines.append(f"| `{f.name}` | {values} | {default} | {f.metadata['doc']} |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables."""
    print(table(DenoiseParams))
    print()
    print(table(ServerSettings))


if __name__ == "__main__":
    main()
