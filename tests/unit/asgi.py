"""A small ASGI application behind a middleware, for tests of middlewares."""

import asyncio


def sent_by(middleware, headers, bodies, scope_type="http"):
    """Messages that reach the client when the application answers with these headers and chunks."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for i, body in enumerate(bodies):
            await send({"type": "http.response.body", "body": body, "more_body": i + 1 < len(bodies)})

    async def send(message):
        sent.append(message)

    asyncio.run(middleware(app)({"type": scope_type}, None, send))
    return sent
