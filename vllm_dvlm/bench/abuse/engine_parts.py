"""R2 by the API, R3 and R4 in child processes, each with one engine inside."""

from vllm_dvlm.bench import child
from vllm_dvlm.bench.abuse.job import Job
from vllm_dvlm.bench.result import Result


def measure_one_group(job: Job) -> Result:
    """In the child: heavy imports happen here."""
    from vllm_dvlm.bench.abuse import batches, engine_aborts, operations
    from vllm_dvlm.bench.abuse.host import Host

    result, host = Result(), Host(job.folder)
    if "R2" in job.parts:
        engine_aborts.measure(job, host, result)
    if "R3" in job.parts:
        batches.measure(job, host, result)
    if "R4" in job.parts:
        operations.measure(job, host, "one_group", result)
    return result


def measure_two_groups(job: Job) -> Result:
    from vllm_dvlm.bench.abuse import operations
    from vllm_dvlm.bench.abuse.host import Host

    result = Result()
    operations.measure(job, Host(job.folder, late_group=True), "two_groups", result)
    return result


def measure(job: Job, result: Result) -> None:
    """Run them; adds to the result."""
    for function in (measure_one_group, measure_two_groups) if "R4" in job.parts else (measure_one_group,):
        # A process for each: vLLM's process groups are global.
        found = child.run(__name__, function.__name__, job)
        result.rows += found.rows
        result.figures |= found.figures
        result.description |= found.description
