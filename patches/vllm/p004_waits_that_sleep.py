"""Let the engine and its workers sleep while they wait for each other on a CPU host.

vLLM's readers of the shared-memory queue ask it again and again and call ``sched_yield`` in between, for a second after
the last message: while requests are in flight, that is always. On a GPU host two such processes are two cores of many.
On a CPU host they take the cores that the model, the API server, image preprocessing and a browser on the same host
need, and a Linux scheduler that moves a yielding task behind the others only within its own session leaves those others
waiting for most of a second.

Here a reader that has waited for 0.3 ms sleeps for 50 microseconds between two looks. A step of the smallest model
takes milliseconds.

A seam will not do: the wait is a module global of vLLM's, called without the queue. Waiting on the queue's notification
instead (``SpinCondition`` with a shorter ``busy_loop_s``) loses a wake-up now and then, which stops the engine for five
seconds: the notifications are sent through a socket that may drop them, which is safe after a second of silence only.
"""

from os import sched_yield
from time import monotonic, sleep

from vllm_dvlm.upstream import Patch, apply

_QUEUE = "vllm.distributed.device_communicators.shm_broadcast"

PATCHES = (
    Patch(
        target=f"{_QUEUE}:sched_yield",
        upstream="https://github.com/vllm-project/vllm/pull/52848",
        reason="engine and worker keep two cores busy while they wait, and nothing configures it",
        expires="drop when vLLM's shared-memory queue can be told to sleep between two looks",
        fingerprint="ff24a1e920a63c4d59a3abf7c8a97e62841f3c529807d1aeb6c90888bae3c85a",
        test="tests/upstream/test_waits.py",
        replacement=f"{__name__}:rest",
        sources=(
            "vllm.distributed.utils:sched_yield",
            f"{_QUEUE}:SpinCondition.wait",
            f"{_QUEUE}:MessageQueue.acquire_write",
            f"{_QUEUE}:MessageQueue.acquire_read",
        ),
    ),
)

# Work that is nearly done is not slept through: the engine hands out the next step within half a millisecond.
SPIN_S = 3e-4
# Linux wakes a sleeper up to 50 microseconds late; asking for less gains nothing.
SLEEP_S = 5e-5
# Two looks that lie further apart than this belong to two waits.
GAP_S = 1e-3


class Rest:
    """What a reader or a writer of the queue does between two looks, in the place of ``sched_yield``.

    One for all threads of a process: what another one does decides only between yielding and sleeping.
    """

    def __init__(self) -> None:
        self.began = self.last = -GAP_S

    def __call__(self) -> None:
        """Yield in the first ``SPIN_S`` seconds of a wait, then sleep for ``SLEEP_S``."""
        now = monotonic()
        if now - self.last > GAP_S:
            self.began = now
        if now - self.began < SPIN_S:
            sched_yield()
        else:
            sleep(SLEEP_S)
        self.last = monotonic()


rest = Rest()


def install() -> None:
    """Put the replacement in place; raises UpstreamError when vLLM's code is not the one it was written for."""
    apply(PATCHES)
