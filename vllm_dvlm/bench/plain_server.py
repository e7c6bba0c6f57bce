"""One engine behind uvicorn alone: what a replica behind Ray Serve is compared with.

    python -m vllm_dvlm.bench.plain_server NUM <options of `vllm serve`>

Engine, web application, cores and threads are those of the first of NUM replicas of `vllm-dvlm serve`; Ray is not
imported.
"""

import asyncio
import os
import sys

from vllm_dvlm.cluster.application import Application, parse
from vllm_dvlm.cluster.resources import Resources

ENTERED = "VLLM_DVLM_PLAIN_SERVER"  # set once the environment is that of a replica


async def _serve(arguments: list[str], host: str, port: int, in_process: bool) -> None:
    import uvicorn

    application = Application()
    await application.start(arguments, in_process)
    try:
        config = uvicorn.Config(application.app, host=host, port=port, log_level="warning", lifespan="off")
        await uvicorn.Server(config).serve()
    finally:
        await application.close()


def main(arguments: list[str]) -> None:
    """Serve until SIGINT or SIGTERM; SystemExit with vLLM's message for wrong options."""
    num_replicas, *options = arguments
    args = parse(options)
    resources = Resources.of(args, int(num_replicas))
    if ENTERED not in os.environ:
        # Torch, imported by now, has read the environment: a new program reads that of a replica, as a replica does.
        resources.enter(0)
        os.environ[ENTERED] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "vllm_dvlm.bench.plain_server", *arguments])
    asyncio.run(_serve(options, args.host or "127.0.0.1", args.port, resources.in_process))


if __name__ == "__main__":
    main(sys.argv[1:])
