"""Settings of `vllm-dvlm bench abuse`: plain data that travels between its processes."""

import dataclasses
import random
from pathlib import Path

from vllm_dvlm.bench import child
from vllm_dvlm.synthetic.checkpoint_files import Sizes

# The golden shape, but 64 visual tokens per tile instead of 729: requests are short, and pictures are still pruned.
SIZES = Sizes(patch=48)
MAX_MODEL_LEN = 1024
MAX_CANVAS = 64
MAX_SEQS = 16
MAX_IMAGES = 2
# KV blocks: a few of the longest requests fit at once, so that requests wait for what others give back.
NUM_KV_BLOCKS = 160
PARTS = ("R1", "R2", "R3", "R4", "R5", "R6")


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much of everything."""

    fuzzed: int = 500  # R1: requests
    aborts: int = 500  # R2: by disconnect over HTTP, and as many by the API
    batches: int = 1000  # R3
    distinct: int = 240  # R3: different requests that the batches are drawn from
    operations: int = 10_000  # R4: half with one KV group, half with two
    clients: int = 16  # R5: requests that wait when a process is killed
    requests: int = 20_000  # R6
    warm_up: int = 3000  # R6: requests before, in which caches fill and libraries see their first shapes
    window: int = 1000  # R6: requests at either end whose memory is compared


QUICK = Counts(
    fuzzed=60, aborts=30, batches=40, distinct=30, operations=600, clients=8, requests=600, warm_up=200, window=150
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(child.Job):
    """One run of the command.

    folder: checkpoint. workdir: logs and scratch files. parts: figures to measure.
    """

    folder: Path
    workdir: Path
    counts: Counts
    parts: tuple[str, ...]

    def rng(self, *names: object) -> random.Random:
        """A generator of its own for everything that has a name, so that one draw can be repeated alone."""
        return random.Random("/".join(map(str, (self.seed, *names))))
