"""A request body that vLLM cannot even read is HTTP 400.

vLLM's checks of a body's fields expect sound types: ``structured_outputs: "a"`` ends in an AttributeError, a body of
three thousand brackets in a RecursionError, and both would be answered with 500.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

# Who reads bodies, by module: FastAPI for typed endpoints, Starlette and pydantic where vLLM does it by hand.
_READERS = ("fastapi.dependencies.utils", "starlette.requests", "pydantic.type_adapter")
_ERRORS = (AttributeError, KeyError, IndexError, RecursionError, AssertionError)


def install(app: "FastAPI") -> None:
    """Add the handlers to a server's application."""
    for error in _ERRORS:
        app.add_exception_handler(error, _answer)


async def _answer(request: Any, error: Exception) -> Any:
    """400 for an error that a body caused; any other goes its way."""
    from vllm.entrypoints.serve.exception_handling.handlers.exception import exception_handler

    place = reader_frames(error)
    if not place:
        raise error
    reason = f"{type(error).__name__} {error}".strip()
    problem = f"the request body cannot be read ({reason}, in {place[-1]}); check the types of its fields"
    return await exception_handler(request, ValueError(problem))


def reader_frames(error: BaseException) -> list[str]:
    """Functions from where a body was read to where the error was raised; [] if it has to do with no body.

    vLLM's checks are named after the fields, so the last one tells which it was.
    """
    trace, names = error.__traceback__, []
    while trace is not None:
        if names or trace.tb_frame.f_globals.get("__name__") in _READERS:
            names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    # Comprehensions have frames without a name of their own.
    return [name for name in names if not name.startswith("<")]
