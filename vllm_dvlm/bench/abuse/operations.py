"""R4: the KV pool over random operations on a real engine, audited after every one."""

from collections import Counter
from collections.abc import Iterator

from vllm_dvlm.bench.abuse.batches import draw_request
from vllm_dvlm.bench.abuse.host import Host
from vllm_dvlm.bench.abuse.job import Job
from vllm_dvlm.bench.common import progress
from vllm_dvlm.bench.result import Result

MOST = 24  # requests at once: more than the batch and more than the pool hold
# Few operations may miss what is rare: they go on until a running request was preempted and pruning has freed blocks,
# up to so many times as many.
MOST_TIMES = 20


def measure(job: Job, host: Host, name: str, result: Result) -> None:
    """Half of the operations, or more. name: of the engine's layout, for the figures."""
    rng = job.rng("R4", name)
    alive: set[str] = set()
    did: Counter[str] = Counter()
    problems: list[str] = []
    freed_before = host.scheduler.counters["kv_blocks_freed"]
    wanted = max(1, job.counts.operations // 2)

    def num_freed() -> int:
        return host.scheduler.counters["kv_blocks_freed"] - freed_before

    def numbers() -> Iterator[int]:
        for number in range(MOST_TIMES * wanted):
            if number >= wanted and did["preempted"] and num_freed():
                return
            yield number

    for number in progress(numbers(), f"R4 operations, {name}", wanted):
        draw = rng.random()
        if draw < 0.3 and len(alive) < MOST or not alive:
            request, kind = f"r{number}", "add"
            host.add(request, draw_request(rng, exact=False, longest=12))
            alive.add(request)
        elif draw < 0.36:
            request, kind = rng.choice(sorted(alive)), "abort"
            host.abort(request)
            alive.discard(request)
        elif draw < 0.38:
            request, kind = rng.choice(sorted(alive)), "abort_inside"
            host.inside = lambda chosen=request: host.abort_inside(chosen)
            alive -= {output.request_id for output in host.step()[1]}
            host.inside = None
            alive.discard(request)
        elif draw < 0.40:
            kind = "preempt"
            did["preempted"] += host.preempt()
        elif draw < 0.41:
            kind = "reset"
            host.engine.reset_encoder_cache() if not host.scheduler.running else host.engine.reset_prefix_cache()
        else:
            kind = "step"
            alive -= {output.request_id for output in host.step()[1]}
            problems += host.audit_worker()
        did[kind] += 1
        problems += [f"operation {number} ({kind}): {problem}" for problem in host.audit()]
    for request in rng.sample(sorted(alive), len(alive) // 2):
        host.abort(request)
    problems += host.settle()
    for problem in problems[:10]:
        print(f"R4 seed {job.seed} {name}:", problem, flush=True)
    freed = num_freed()
    num = sum(did.values()) - did["preempted"]
    setting = f"{num} random operations, {name.replace('_', ' ')}, {freed} KV blocks freed by pruning: faults"
    result.value(f"R4_{name}_problems", setting, len(problems), "= 0", not problems)
    result.figures |= {f"R4_{name}_{kind}": count for kind, count in sorted(did.items())}
    result.figures[f"R4_{name}_blocks_pruned"] = freed
