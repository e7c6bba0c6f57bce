"""The error for bad requests, which vLLM answers with HTTP 400 and Python callers catch as ValueError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.exceptions import VLLMValidationError


class InvalidRequest(VLLMValidationError, ValueError):
    """A request that cannot be served as it is; the message names the parameter and the remedy.

    vLLM's own class gives HTTP 400 and the ``param`` field of the reply, but is no ValueError.
    """


@contextmanager
def refusals_are_value_errors() -> Iterator[None]:
    """Turn vLLM's own validation errors, raised inside, into ``InvalidRequest``."""
    try:
        yield
    except InvalidRequest:
        raise
    except VLLMValidationError as error:
        # args, not str(): the text of the latter already ends with the parameter.
        raise InvalidRequest(*error.args, parameter=error.parameter, value=error.value) from error
