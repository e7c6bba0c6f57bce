"""A string for the placeholder id of images, which the vocabulary does not have."""

from __future__ import annotations

from typing import Any

from transformers.utils import to_py_obj


def name_token(tokenizer: Any, token_id: int, text: str) -> None:
    """Let a tokenizer show `token_id` as `text` wherever it turns ids into strings; in place, twice is as good as once.

    The vocabulary stays as it is, so `text` never encodes to the id. An id that has a string keeps it. Like special
    tokens, the id is left out with `skip_special_tokens`. Copies of the tokenizer show it, too.
    """
    if tokenizer.convert_ids_to_tokens(token_id) is not None:
        return
    base: Any = type(tokenizer)

    class NamedTokenizer(base):
        def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
            if isinstance(ids, int):
                return text if ids == token_id else base.convert_ids_to_tokens(self, ids, skip_special_tokens)
            ids = [int(i) for i in ids]
            if skip_special_tokens:
                return base.convert_ids_to_tokens(self, [i for i in ids if i != token_id], True)
            tokens = base.convert_ids_to_tokens(self, ids)
            return [text if i == token_id else token for i, token in zip(ids, tokens, strict=True)]

        def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
            ids = to_py_obj(token_ids)
            ids = [ids] if isinstance(ids, int) else ids
            if len(ids) > 0 and isinstance(ids[0], (list, tuple)):
                return [self.decode(row, skip_special_tokens, **kwargs) for row in ids]
            shown, pieces = "" if skip_special_tokens else text, [[]]
            for i in ids:
                if i == token_id:
                    pieces.append([])
                else:
                    pieces[-1].append(i)
            decode = lambda piece: base.decode(self, piece, skip_special_tokens, **kwargs) if piece else ""  # noqa: E731
            return shown.join(map(decode, pieces))

        def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
            texts = self.decode(sequences, skip_special_tokens, **kwargs)
            return [texts] if isinstance(texts, str) else texts

        def __reduce__(self) -> Any:
            rebuild, arguments = base.__reduce__(self)[:2]
            return _rebuild, (rebuild, arguments, token_id, text)

    # vLLM shows the class's name to clients.
    NamedTokenizer.__name__ = base.__name__
    tokenizer.__class__ = NamedTokenizer


def _rebuild(rebuild: Any, arguments: Any, token_id: int, text: str) -> Any:
    tokenizer = rebuild(*arguments)
    name_token(tokenizer, token_id, text)
    return tokenizer
