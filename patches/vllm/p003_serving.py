"""Add four middlewares, a page and a handler of errors to the API server of our models.

All of them stand in ``vllm_dvlm/serving``: refused streams get HTTP 400 (``stream_status.py``); a stream shows canvases
and its report (``provisional_stream.py``); a reply shows its request's report in a header (``report_header.py``); a
server whose engine died ends with status 1 (``exit_status.py``); a body that cannot be read is HTTP 400
(``unreadable_bodies.py``); `/dvlm` is a page to watch answers on (``page``); `/v1/systemone` decides
(``decisions.py``).

vLLM sends status 200 for a streamed request before it validates the parameters. The seams do not reach that far:
endpoint plugins load only where the user names them in VLLM_PLUGINS, ``--middleware`` is a flag that the user would
have to give, and the renderer, which runs early enough, is not shown the sampling parameters.
"""

import sys
from typing import TYPE_CHECKING, Any

from vllm_dvlm.upstream import Patch, apply

if TYPE_CHECKING:
    from fastapi import FastAPI

_APP = "vllm.entrypoints.launchers.app"
_REGISTER = "vllm.entrypoints.serve.middleware.register"

PATCHES = (
    Patch(
        target=f"{_APP}:init_entrypoints_middleware",
        upstream="none yet; validating parameters before the stream starts would do",
        reason="refused streams must be HTTP 400, replies show their report; no seam adds a middleware without a flag",
        expires="drop when vLLM validates parameters before it starts a stream, and plugins can add middlewares",
        fingerprint="550760bbd971bbf9fa70b284925615411a104946d6f9934d6477c45276a05214",
        test="tests/engine/test_server.py",
        replacement=f"{__name__}:init_entrypoints_middleware",
        sources=(f"{_REGISTER}:init_entrypoints_middleware", f"{_APP}:build_app"),
    ),
)


def init_entrypoints_middleware(args: Any, app: "FastAPI", supported_tasks: tuple[str, ...]) -> None:
    """vLLM's own middleware, then ours around it."""
    from vllm.entrypoints.serve.middleware import register

    from vllm_dvlm.serving import decisions, page, unreadable_bodies
    from vllm_dvlm.serving.exit_status import ExitStatus
    from vllm_dvlm.serving.provisional_stream import ProvisionalStream
    from vllm_dvlm.serving.report_header import ReportHeader
    from vllm_dvlm.serving.stream_status import StreamStatus

    register.init_entrypoints_middleware(args, app, supported_tasks)
    app.add_middleware(ProvisionalStream)
    app.add_middleware(StreamStatus)
    app.add_middleware(ReportHeader)
    app.add_middleware(ExitStatus)
    unreadable_bodies.install(app)
    page.install(app)
    decisions.install()


def install() -> None:
    """Put the replacement in place where this process is an API server; nothing elsewhere.

    Called before the server's application is built, by what only a server of our models creates. Raises
    UpstreamError when vLLM's code is not the one it was written for.
    """
    if _APP in sys.modules:
        apply(PATCHES)
