"""Images named by address: what is wrong with the address is HTTP 400, as what is wrong with the image.

vLLM answers a data URL without base64 with 501, and a file that it may not or cannot read with 500. A host that does
not answer stays 5xx, as vLLM means it: the client may try again.
"""

import errno
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
    except InvalidRequest:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "--allowed-local-media-path" in str(error):
            raise InvalidRequest(str(error), parameter="messages") from error
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise InvalidRequest("a file in the messages has too long a name", parameter="messages") from error
        if _is_of_pillow(error):
            raise InvalidRequest(f"an image in the messages cannot be read: {error}", parameter="messages") from error
        raise


def _is_of_pillow(error: Exception) -> bool:
    """True if Pillow raised it: of a damaged image, in errors of every kind."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "PIL"
