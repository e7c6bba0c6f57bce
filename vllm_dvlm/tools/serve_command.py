"""`vllm-dvlm serve`: options. What runs is cluster/serving.py, with Ray; one server without it is `vllm serve`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; all others are those of `vllm serve`."""
    parser.add_argument("model", help="checkpoint folder or hub name")
    for name, kind, default, text in (
        ("replicas", int, 1, "engines behind the address (default 1)"),
        ("min-replicas", int, None, "with --max-replicas: fewest of them (default 1)"),
        ("max-replicas", int, None, "as many replicas as the load needs, up to this"),
        ("target-ongoing-requests", float, 8.0, "requests per replica at which their number changes"),
        ("upscale-delay", float, 30.0, "seconds of a higher load before replicas are added"),
        ("downscale-delay", float, 600.0, "seconds of a lower one before replicas are drained and ended"),
        ("max-ongoing-requests", int, 64, "requests that a replica holds; others wait in front"),
        ("max-queued-requests", int, None, "requests that wait in front; 503 for more (default: any number)"),
        ("fronts", int, 1, "processes that hand requests to replicas, and repeat those of a lost one"),
        ("health-period", float, 2.0, "seconds between two health checks"),
        ("health-timeout", float, 5.0, "seconds until a check has failed"),
        ("drain-timeout", float, 120.0, "seconds that a replica may finish its requests in"),
        ("request-timeout", float, 600.0, "seconds of the longest request"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, help="GPUs of a replica")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal. ValueError for bad arguments, a missing Ray or a cluster that is too small."""
    try:
        from vllm_dvlm.cluster import launch, serving
    except ImportError as error:
        raise ValueError(f"this needs Ray Serve: pip install 'vllm-dvlm[ray]' ({error})") from None
    names = serving.Settings.__dataclass_fields__
    settings = serving.Settings(**{name: getattr(arguments, name) for name in names})
    settings.check()
    engine = ["--model", arguments.model, "-tp", str(arguments.tensor_parallel_size), *arguments.rest]
    launch.run(engine, settings)
    return 0
