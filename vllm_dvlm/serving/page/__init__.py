"""The page at `/dvlm` of a running server: ask about a picture, watch the canvas fill, compare two settings.

Plain files, served as they are; nothing is fetched from elsewhere, so it works without a network.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources
from typing import TYPE_CHECKING

from vllm_dvlm.pruning.names import METHODS

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

# Path below /dvlm -> file and its type.
FILES = {
    "": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
# Nothing but itself, and pictures that the user drops on it.
_POLICY = "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def install(app: FastAPI) -> None:
    """Add the page to a server's application."""
    for path, (name, kind) in FILES.items():
        app.add_route(f"/dvlm{path}", _file(name, kind), methods=["GET"], include_in_schema=False)
    app.add_route("/dvlm/about", _about, methods=["GET"], include_in_schema=False)


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        from starlette.responses import Response

        text = resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
        return Response(text, media_type=f"{kind}; charset=utf-8", headers=headers)

    return send


async def _about(request: Request) -> Response:
    """What the page offers depends on the model."""
    from starlette.responses import JSONResponse

    state = request.app.state
    family = state.engine_client.model_config.hf_config.family
    return JSONResponse(
        {
            "model": state.openai_serving_models.model_name(),
            "family": family.name,
            "has_blocks": family.has_blocks,
            "has_threshold": not family.follows_time_grid,
            # Where the prompt is computed once there is nothing to refresh, unless a request asks for it.
            "has_refresh": family.attentions[0] == "full",
            "prune_methods": ["none", *METHODS],
        }
    )
