"""`/metrics` of all replicas at one address: every sample with a `replica` label.

Serve sends a scrape to any one replica. So each opens a small page of its own and enters its address on the board, and
the front collects all of them.
"""

import asyncio
from typing import Any

import aiohttp
import ray
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import Response

COLLECT_S = 2.0  # that a replica has to show its page; one that does not is left out


class Page:
    """A replica's own page."""

    def __init__(self, board: Any, replica: str) -> None:
        self._board, self._replica = board, replica
        self._server: Any = None

    async def open(self, registry: CollectorRegistry) -> None:
        """Show the metrics of this process."""
        host = ray.util.get_node_ip_address()
        self._server, _ = start_http_server(0, host, registry=registry)
        await self._board.enter.remote(self._replica, f"http://{host}:{self._server.server_port}/metrics")

    async def close(self) -> None:
        """End it."""
        await self._board.leave.remote(self._replica)
        self._server.shutdown()


async def collect(board: Any) -> Response:
    """The page of all replicas that show theirs; one where nobody listens any more is struck off the board."""
    addresses = await board.addresses.remote()
    shown: dict[str, str] = {}
    timeout = aiohttp.ClientTimeout(total=COLLECT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def read(replica: str, address: str) -> None:
            try:
                async with session.get(address) as reply:
                    shown[replica] = await reply.text()
            except aiohttp.ClientConnectorError:
                await board.leave.remote(replica)
            except (aiohttp.ClientError, TimeoutError):
                pass

        await asyncio.gather(*(read(*entry) for entry in addresses.items()))
    return Response(merge(shown), media_type=CONTENT_TYPE_PLAIN_0_0_4)


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
