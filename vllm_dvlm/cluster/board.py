"""What the parts of a served application know of each other: pages of metrics, and whether it ends."""

import asyncio
from typing import Any

import ray

NAME, NAMESPACE = "board", "vllm_dvlm"


class _Board:
    """One per cluster; lives as long as the application."""

    def __init__(self) -> None:
        self._addresses: dict[str, str] = {}
        self._fronts: set[str] = set()
        self._closing = asyncio.Event()
        self._owner = ""
        self._num_coming = 0
        self._is_undone = False

    def enter(self, replica: str, address: str) -> None:
        """A replica's page of metrics is at this address."""
        self._addresses[replica] = address

    def leave(self, name: str) -> None:
        """A replica or a front is gone, or a front has nothing more to do."""
        self._addresses.pop(name, None)
        self._fronts.discard(name)

    def addresses(self) -> dict[str, str]:
        """Pages by replica."""
        return dict(self._addresses)

    def come(self) -> None:
        """A command is about to deploy: its fronts are open, whatever the one that serves is at."""
        self._num_coming += 1
        self._closing.clear()

    def own(self, command: str) -> None:
        """The command that came serves from now on."""
        self._owner, self._is_undone = command, False
        self._num_coming -= 1

    def leave_to_others(self, command: str) -> bool:
        """A command ends; True if nobody else serves or is about to, so that it is to delete what there is."""
        if self._owner == command:
            self._owner = ""
        return not self._owner and not self._num_coming

    def owner(self) -> str:
        """The command that serves."""
        return self._owner

    def undo(self) -> None:
        """A command that came could not take the place of the one that serves."""
        self._is_undone = True
        self._num_coming -= 1

    def is_undone(self) -> bool:
        """Asked by the command that serves; True once for each `undo`."""
        found, self._is_undone = self._is_undone, False
        return found

    async def until_closed(self, front: str) -> None:
        """Return when the fronts are to take nothing more."""
        self._fronts.add(front)
        await self._closing.wait()

    async def close(self) -> None:
        """Let the fronts take nothing more; return when they have answered all, or another command comes."""
        self._closing.set()
        while self._fronts and not self._num_coming:
            await asyncio.sleep(0.1)


def board() -> Any:
    """The cluster's board, made if there is none."""
    options = {"name": NAME, "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached", "num_cpus": 0}
    return ray.remote(_Board).options(**options).remote()
