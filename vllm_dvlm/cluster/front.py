"""The address: hands every request to a replica, and repeats once what a lost replica had begun.

Serve's own proxy answers 500 for a request whose replica is lost. Here such a request goes to another replica as long
as nothing of its reply was sent; a stream that has begun ends with an error event, as vLLM's own streams do. Answers of
a living replica pass unchanged. Facts: Ray 2.60.
"""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from vllm_dvlm.cluster import metrics_page
from vllm_dvlm.cluster.board import board

Send = Callable[[dict[str, Any]], Awaitable[None]]

# What a replica is told of a request; the rest of a scope belongs to the web server here.
SCOPE = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
)
ATTEMPTS = 2
LOST = "the replica that answered this request was lost"
IDLE_S = 0.1  # between two looks at whether all is answered


class Front:
    """A Serve deployment; as many of them as wanted."""

    async def __init__(self, engines: DeploymentHandle) -> None:
        self._engines = engines.options(stream=True, method_name="respond")
        self._board = board()
        self._name = serve.get_replica_context().replica_id.unique_id
        self._num_open, self._is_closing = 0, False
        self._watch = asyncio.create_task(self._until_closed())

    def __serve_build_asgi_app__(self) -> Any:
        return Starlette(routes=[Route("/metrics", self._metrics), Mount("", app=self._answer)])

    async def _until_closed(self) -> None:
        await self._board.until_closed.remote(self._name)
        self._is_closing = True
        while self._num_open:
            await asyncio.sleep(IDLE_S)
        await self._board.leave.remote(self._name)

    async def __del__(self) -> None:
        self._watch.cancel()
        with contextlib.suppress(RayError):
            await self._board.leave.remote(self._name)

    async def _metrics(self, request: Request) -> Response:
        return await metrics_page.collect(self._board)

    async def _answer(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] != "http":  # Serve's proxy hands on web sockets too
            await send({"type": "websocket.close", "code": 1003})
            return
        if self._is_closing:
            await _refuse(scope, receive, send, "the server is shutting down")
            return
        self._num_open += 1
        try:
            body = await Request(scope, receive).body()
            request = {key: scope[key] for key in SCOPE if key in scope}
            for attempt in range(1, ATTEMPTS + 1):
                if await self._attempt(request, body, send):
                    return
                print(f"a replica was lost in attempt {attempt} of {scope['path']}", flush=True)
            await _refuse(scope, receive, send, f"{LOST}, and so was a second one", 500)
        except BackPressureError:
            await _refuse(scope, receive, send, "too many requests wait here (--max-queued-requests)")
        except DeploymentUnavailableError:
            await _refuse(scope, receive, send, "there are no replicas: those there were failed to start, see the log")
        except ClientDisconnect:
            pass
        finally:
            self._num_open -= 1

    async def _attempt(self, request: dict[str, Any], body: bytes, send: Send) -> bool:
        """Hand on a reply; False if its replica was lost before anything of it was sent."""
        head: dict[str, Any] | None = None
        parts = self._engines.remote(request, body)
        try:
            async for messages in parts:
                head = head or messages[0]
                for message in messages:
                    await send(message)
        except RayActorError:
            if head is None:
                return False
            if not _is_event_stream(head):
                raise  # Serve cuts the connection: a body with a known length cannot be mended
            await send({"type": "http.response.body", "body": _event(LOST), "more_body": False})
        except asyncio.CancelledError:
            parts.cancel()  # the client hung up
            raise
        return True


def _is_event_stream(head: dict[str, Any]) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in head["headers"]
    )


def _error(message: str, status: int) -> dict[str, Any]:
    """As vLLM words it."""
    kind = "InternalServerError" if status == 500 else "ServiceUnavailableError"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _event(message: str) -> bytes:
    """The end of a stream that cannot go on."""
    return f"data: {json.dumps(_error(message, 500))}\n\ndata: [DONE]\n\n".encode()


async def _refuse(scope: dict[str, Any], receive: Any, send: Any, message: str, status: int = 503) -> None:
    await JSONResponse(_error(message, status), status)(scope, receive, send)
