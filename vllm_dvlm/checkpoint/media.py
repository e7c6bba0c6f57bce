"""Images named by address: what is wrong with the address is HTTP 400, as what is wrong with the image.

vLLM answers a data URL without base64 with 501, and a file that it may not or cannot read with 500. A host that does
not answer stays 5xx, as vLLM means it: the client may try again.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm_dvlm.serving.errors import InvalidRequest

_FILE_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


@contextmanager
def address_errors_are_refusals() -> Iterator[None]:
    """Turn what vLLM raises for an address that it cannot use, inside, into ``InvalidRequest``."""
    try:
        yield
    except NotImplementedError as error:
        raise InvalidRequest(str(error), parameter="messages") from error
    except _FILE_ERRORS as error:
        raise InvalidRequest(
            f"a file in the messages cannot be read: {error.strerror}", parameter="messages"
        ) from error
    except RuntimeError as error:
        if "--allowed-local-media-path" not in str(error):
            raise
        raise InvalidRequest(str(error), parameter="messages") from error
