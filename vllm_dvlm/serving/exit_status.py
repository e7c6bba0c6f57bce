"""A server whose engine died ends with status 1, so that a supervisor that restarts failed services restarts it.

vLLM's API server notices a dead engine, answers whoever waits with an error and ends, but as if it had been told to:
with status 0. Several API servers (``--api-server-count``) end with 1 already.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]


class ExitStatus:
    """ASGI middleware; see the module. Requests pass untouched."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Callable[..., Any], send: Callable) -> None:
        """Serve one connection, or the life of the server."""

        client = None

        async def send_last(message: Message) -> None:
            nonlocal client
            if message["type"] == "lifespan.startup.complete":
                client = scope["app"].state.engine_client  # vLLM takes the state away at the end
            is_last = message["type"] == "lifespan.shutdown.complete"  # every waiting client has had its answer
            if is_last and client is not None and client.errored and _ends_by_itself():
                # Raised in a callback it leaves the event loop, and vLLM's own cleaning up follows.
                asyncio.get_running_loop().call_soon(sys.exit, 1)
            await send(message)

        await self.app(scope, receive, send_last if scope["type"] == "lifespan" else send)


def _ends_by_itself() -> bool:
    """False if the server was told to end: vLLM then ends the engine, too, and has cancelled the task that serves.

    Where its watchdog found the engine dead, that task (``uvicorn.Server.serve``) is still there and waits for us.
    """
    return any(getattr(task.get_coro(), "__name__", "") == "serve" for task in asyncio.all_tasks())
