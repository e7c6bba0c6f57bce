"""The real router before engines that sleep, for `vllm-dvlm bench scale`.

    python -m vllm_dvlm.cluster.sleepers FILE.json

The file names `replicas` (0: one engine behind uvicorn, without a router), `port`, `limit` (requests that a replica
holds), `slots`, `samples` and `seed` (`bench.sleeper.Sleeper`). Serves until SIGTERM.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from vllm_dvlm.cluster.sleeper import Sleeper

APP = "sleepers"


def _serve(job: dict[str, Any]) -> None:
    import ray
    from ray import serve

    from vllm_dvlm.cluster.board import board
    from vllm_dvlm.cluster.serving import Settings, behind_front, deployment

    class Replica(Sleeper):
        """Each sleeps times of its own."""

        def __init__(self, samples: list[list[float]], slots: int, seed: int) -> None:
            super().__init__(samples, slots, seed + serve.get_replica_context().rank.rank)

    ended = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: ended.set())
    address = os.environ.get("RAY_ADDRESS")
    ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    serve.start(http_options={"host": "127.0.0.1", "port": job["port"]})
    settings = Settings(replicas=job["replicas"], max_ongoing_requests=job["limit"], drain_timeout=1.0)
    options = deployment(settings, {"ray_actor_options": {"num_cpus": 0}})
    engines = serve.deployment(Replica, **options).bind(job["samples"], job["slots"], job["seed"])
    shared = board()
    try:
        serve.run(behind_front(engines, settings), name=APP, blocking=False)
        ended.wait()
    finally:
        serve.delete(APP)
        if not serve.status().applications.keys() - {APP}:
            serve.shutdown()
        ray.kill(shared)
        ray.shutdown()


def main(path: str) -> None:
    """Serve as the file says."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    if job["replicas"]:
        _serve(job)
        return
    import uvicorn

    app = Sleeper(job["samples"], job["slots"], job["seed"])
    uvicorn.run(app, host="127.0.0.1", port=job["port"], log_level="warning", lifespan="off")


if __name__ == "__main__":
    main(sys.argv[1])
