"""The command `vllm-dvlm`. Heavy imports happen inside the subcommands, after they have set their environment."""

import argparse
import sys


def build_parser() -> argparse.ArgumentParser:
    """Parser with every subcommand; each sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(prog="vllm-dvlm", description="Tools of vllm_dvlm; serving is `vllm serve`.")
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="measure on this machine").add_subparsers(dest="bench", required=True)

    from vllm_dvlm.bench import (
        capacity,
        decisions,
        engine,
        frontier,
        latency,
        lavida,
        pruning_report,
        quality,
        scale,
        scoring_kernels,
        stream,
        throughput,
    )
    from vllm_dvlm.bench.abuse import command as abuse

    for name, module, text in (
        ("engine", engine, "token equality, overhead, speed against plain loops, memory"),
        ("latency", latency, "one request at a time against keep ratio, cost of pruning, LLaDA-FastV"),
        ("throughput", throughput, "requests per second in a small KV pool against keep ratio"),
        ("capacity", capacity, "requests in flight and free KV blocks against keep ratio"),
        ("quality", quality, "exact match of answers for modes, pruning methods and keep ratios"),
        ("frontier", frontier, "quality against throughput: exact match and answers per second side by side"),
        ("pruning", pruning_report, "latency, throughput and capacity in one table and one plot"),
        (
            "scoring",
            scoring_kernels,
            "scoring visual tokens beside the attention of a layer, with and without its log-sum-exp",
        ),
        ("lavida", lavida, "LaViDa: prefix cache against full attention, pruning with both, a batch"),
        ("abuse", abuse, "bad requests, aborts, random batches, killed processes, many requests: what holds"),
    ):
        sub = bench.add_parser(name, help=text)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    text = "decisions in one forward pass against generating the answers: accuracy, calibration, questions/s"
    sub = bench.add_parser("decisions", allow_abbrev=False, help=text)
    decisions.add_arguments(sub)
    sub.set_defaults(run=decisions.run, takes_more=True)
    text = "what it costs to show the canvas of each step in a stream"
    sub = bench.add_parser("stream", allow_abbrev=False, help=text)
    stream.add_arguments(sub)
    sub.set_defaults(run=stream.run, takes_more=True)
    text = "replicas behind Ray Serve: throughput, latency, scaling, the router's cost; more of them simulated"
    sub = bench.add_parser("scale", allow_abbrev=False, help=text)
    scale.add_arguments(sub)
    sub.set_defaults(run=scale.run, takes_more=True)

    from vllm_dvlm.tools import batch_command as batch
    from vllm_dvlm.tools import serve_command as serve_command
    from vllm_dvlm.tools import show

    answers = commands.add_parser(
        "batch", allow_abbrev=False, help="answer a file of questions, on one engine or on replicas by Ray"
    )
    batch.add_arguments(answers)
    answers.set_defaults(run=batch.run, takes_more=True)

    text = "serve replicas behind one address by Ray Serve; one server alone is `vllm serve`"
    replicas = commands.add_parser("serve", allow_abbrev=False, help=text)
    serve_command.add_arguments(replicas)
    replicas.set_defaults(run=serve_command.run, takes_more=True)

    from vllm_dvlm.tools.selftest import command as selftest

    text = "whether everything works on this host and device: recorded runs, attention, KV pages, kernels"
    check = commands.add_parser("selftest", help=text)
    selftest.add_arguments(check)
    check.set_defaults(run=selftest.run)

    from vllm_dvlm.tools.sizing import command as sizing

    text = "weights, KV, requests in flight, FLOPs and a roofline of a checkpoint on a GPU; arithmetic"
    sizes = commands.add_parser("size", help=text)
    sizing.add_arguments(sizes)
    sizes.set_defaults(run=sizing.run)

    # Its own parser reads the rest: it imports much.
    demo = commands.add_parser("demo", add_help=False, help="serve two small models and ask them about pictures")
    demo.set_defaults(run=_run_demo, takes_more=True)

    picture = commands.add_parser("show", help="draw a trace: dropped patches, importance, the canvas filling up")
    show.add_arguments(picture)
    picture.set_defaults(run=show.run)
    return parser


def _run_demo(arguments: argparse.Namespace) -> None:
    from vllm_dvlm.examples import demo

    demo.main(arguments.rest)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; its exit code (0 if it has none), or 2 with a message for arguments that cannot be met."""
    parser = build_parser()
    # `batch` hands what it does not know to vLLM's own parser.
    arguments, rest = parser.parse_known_args(argv)
    if rest and not getattr(arguments, "takes_more", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        code = arguments.run(arguments)
    except ValueError as error:
        print(f"vllm-dvlm: {error}", file=sys.stderr)
        return 2
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
