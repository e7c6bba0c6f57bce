"""What a replica asks of the Ray cluster, and the environment of its engine. Imports no Ray."""

import os
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from vllm_dvlm.batch.local import bind_threads, has_accelerator, keep_in_process, steps_in_process


@dataclass(frozen=True)
class Resources:
    """Of one replica.

    num_ranks: devices that an engine takes. by_ray: ranks are actors of Ray, which may lie on several nodes, else
    processes on the node of the replica. has_gpus: False on a CPU host. in_process: the engine's steps run in the
    process of the replica. num_replicas: that share the cores of a CPU host.
    """

    num_ranks: int
    by_ray: bool
    has_gpus: bool
    in_process: bool
    num_replicas: int

    @classmethod
    def of(cls, args: Namespace, num_replicas: int) -> "Resources":
        """For vLLM's parsed options on this host."""
        num_ranks = args.tensor_parallel_size * args.pipeline_parallel_size
        by_ray = args.distributed_executor_backend == "ray"
        return cls(num_ranks, by_ray, has_accelerator(), steps_in_process(), num_replicas)

    @property
    def num_gpus(self) -> int:
        """Ray's "GPU"s that a replica holds; on a CPU host ranks by Ray count as such, all others as none."""
        return self.num_ranks if self.has_gpus or self.by_ray else 0

    @property
    def bundles(self) -> list[dict[str, float]] | None:
        """Placement group of a replica whose ranks are actors: itself first, then one bundle per rank."""
        return [{"CPU": 1}, *({"GPU": 1} for _ in range(self.num_ranks))] if self.by_ray else None

    def of_serve(self) -> dict[str, Any]:
        """Options of a Serve deployment."""
        if self.bundles is None:
            return {"ray_actor_options": {"num_cpus": 1, "num_gpus": self.num_gpus}}
        options = {"placement_group_bundles": self.bundles, "placement_group_strategy": "PACK"}
        return options | {"ray_actor_options": {"num_cpus": 1}}

    def enter(self, number: int) -> None:
        """Set the environment of replica `number` in its process; before vLLM is imported."""
        if not self.by_ray:
            # vLLM's ranks would look for a cluster there.
            os.environ.pop("RAY_ADDRESS", None)
        if self.in_process:
            keep_in_process()
        if not self.has_gpus:
            bind_threads(cores_of(number, self.num_replicas), self.num_ranks)


def cores_of(number: int, num_replicas: int) -> list[int]:
    """Cores of a replica on this host, as if all of them were here; every replica has one at least."""
    cores = sorted(os.sched_getaffinity(0))
    if num_replicas >= len(cores):
        return [cores[number % len(cores)]]
    return cores[number * len(cores) // num_replicas : (number + 1) * len(cores) // num_replicas]
