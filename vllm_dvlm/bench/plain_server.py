"""One engine behind uvicorn alone: what a replica behind Ray Serve is compared with.

    python -m vllm_dvlm.bench.plain_server NUM <options of `vllm serve`>

Engine, web application and cores are those of the first of NUM replicas of `vllm-dvlm serve`; Ray is not imported.
"""

import asyncio
import sys

from vllm_dvlm.cluster.application import Application, parse
from vllm_dvlm.cluster.resources import Resources


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
    num_replicas, *arguments = arguments
    args = parse(arguments)
    resources = Resources.of(args, int(num_replicas))
    resources.enter(0)
    asyncio.run(_serve(arguments, args.host or "127.0.0.1", args.port, resources.in_process))


if __name__ == "__main__":
    main(sys.argv[1:])
