"""`/metrics` of all replicas at one address: every sample with a `replica` label.

Serve sends a scrape to any one replica. So each opens a small page of its own and enters its address on a board, and
whoever is asked collects all of them.
"""

import asyncio
from typing import Any

import aiohttp
import ray
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.parser import text_string_to_metric_families

COLLECT_S = 2.0  # that a replica has to show its page; one that does not is left out


@ray.remote
class Board:
    """Addresses of the replicas' own pages."""

    def __init__(self) -> None:
        self._addresses: dict[str, str] = {}

    def enter(self, replica: str, address: str) -> None:
        self._addresses[replica] = address

    def leave(self, replica: str) -> None:
        self._addresses.pop(replica, None)

    def addresses(self) -> dict[str, str]:
        return dict(self._addresses)


class Page:
    """A replica's own page, and the joint one in its application."""

    def __init__(self, board: Any, replica: str) -> None:
        self._board, self._replica = board, replica
        self._server: Any = None

    async def open(self, app: Any) -> None:
        """Show the page, and put the joint one in place of the application's own."""
        from starlette.routing import Route
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        host = ray.util.get_node_ip_address()
        self._server, _ = start_http_server(0, host, registry=get_prometheus_registry())
        await self._board.enter.remote(self._replica, f"http://{host}:{self._server.server_port}/metrics")
        app.router.routes.insert(0, Route("/metrics", self._respond))

    async def close(self) -> None:
        await self._board.leave.remote(self._replica)
        self._server.shutdown()

    async def _respond(self, request: Any) -> Any:
        from starlette.responses import Response

        addresses = await self._board.addresses.remote()
        timeout = aiohttp.ClientTimeout(total=COLLECT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            pages = await asyncio.gather(*(_read(session, address) for address in addresses.values()))
        shown = {replica: page for replica, page in zip(addresses, pages, strict=True) if page is not None}
        for replica in addresses.keys() - shown.keys():
            await self._board.leave.remote(replica)
        return Response(merge(shown), media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def _read(session: aiohttp.ClientSession, address: str) -> str | None:
    try:
        async with session.get(address) as reply:
            return await reply.text()
    except (aiohttp.ClientError, TimeoutError):
        return None


def merge(pages: dict[str, str]) -> bytes:
    """One page from several; every sample with the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, page in pages.items():
        for family in text_string_to_metric_families(page):
            joint = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            joint.samples += [
                sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples
            ]

    class Joint:
        def collect(self) -> list[Metric]:
            return list(families.values())

    registry = CollectorRegistry()
    registry.register(Joint())  # type: ignore[arg-type]
    return generate_latest(registry)
