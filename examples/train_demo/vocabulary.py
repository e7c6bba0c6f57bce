"""The demo model's words, its prompt, and the tokenizer files of its checkpoint.

Words, digits, single signs and line breaks are tokens; spaces are not; any other word is the unknown token, so no
text can fail. The prompt is what the chat template gives for a picture and a question.
"""

import functools
import json
import re
from pathlib import Path

from vllm_dvlm.synthetic.digit_questions import ORDINALS

SPECIAL = (
    "<|unk|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
)
ROLES = ("user", "assistant", "system")
_WORDS = (
    *("\n", "?", ".", ",", "!", ":", *ROLES),
    *(str(digit) for digit in range(10)),
    *("red", "green", "blue", "yellow", "orange", "purple", "pink", "white"),
    *("what", "which", "where", "how", "many", "is", "are", "the", "there", "of", "colour", "digit", "row", "column"),
    *("left", "right"),
    *ORDINALS,
)
TOKENS = (*SPECIAL, *_WORDS)
IDS = {token: i for i, token in enumerate(TOKENS)}
NUM_ROWS = 128  # rows of the embedding; those above len(TOKENS) are unused
UNK, BOS, EOS, MASK = (IDS[t] for t in ("<|unk|>", "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"))
EOT = IDS["<|eot_id|>"]

_PIECE = r"\n|[a-z]+|[0-9]+|[^\sa-z0-9]"

# As the official conversation, but without system text and line breaks: 144 visual tokens should not meet 60 of text.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- set ns = namespace(text='', own=false) -%}
  {%- if message['content'] is string -%}
    {%- set ns.text = message['content'] | trim -%}
  {%- elif message['content'] -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' and '<image>' in part['text'] -%}
        {%- set ns.own = true -%}
      {%- endif -%}
    {%- endfor -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}
        {%- set ns.text = ns.text + part['text'] -%}
      {%- elif not ns.own -%}
        {%- set ns.text = ns.text + '<image>\\n' -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set ends_with_image = ns.text.endswith('<image>\\n') and not ns.own -%}
    {%- set ns.text = ns.text | trim -%}
    {%- if ends_with_image -%}
      {%- set ns.text = ns.text + '\\n' -%}
    {%- endif -%}
  {%- endif -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>' + ns.text + '<|eot_id|>' -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>' -}}
"""


@functools.cache
def encode(text: str) -> tuple[int, ...]:
    """Ids of plain text (no special tokens), as tokenizer.json gives them."""
    return tuple(IDS.get(piece, UNK) for piece in re.findall(_PIECE, _normalise(text)))


def decode(ids: list[int]) -> str:
    """Text of ids, special tokens left out."""
    return " ".join(TOKENS[i] for i in ids if len(SPECIAL) <= i < len(TOKENS))


def _normalise(text: str) -> str:
    return re.sub(r"color\b", "colour", text.lower())


def before_image() -> tuple[int, ...]:
    """Prompt ids before the visual tokens."""
    return (BOS, IDS["<|start_header_id|>"], IDS["user"], IDS["<|end_header_id|>"])


def after_question() -> tuple[int, ...]:
    """Prompt ids between the question and the canvas."""
    return (EOT, IDS["<|start_header_id|>"], IDS["assistant"], IDS["<|end_header_id|>"])


def tokenizer_json() -> dict:
    """Content of tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    # Special, as the header signs around them: no part of a text that is shown.
    roles = [{"id": IDS[role], "content": role, **flags, "single_word": True} for role in ROLES]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in enumerate(SPECIAL)] + roles,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Lowercase"},
                {"type": "Replace", "pattern": {"Regex": r"color\b"}, "content": "colour"},
            ],
        },
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": _PIECE}, "behavior": "Removed", "invert": True},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": IDS, "unk_token": "<|unk|>"},
    }


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json (chat template included) and special_tokens_map.json."""
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    names["unk_token"] = "<|unk|>"
    settings = names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (
        ("tokenizer.json", tokenizer_json()),
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", names),
    ):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
