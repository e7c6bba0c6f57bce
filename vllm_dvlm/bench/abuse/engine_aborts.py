"""R2 by the API: requests that are aborted at any moment beside others, which do not notice."""

from collections import Counter

from vllm_dvlm.bench.abuse.batches import draw_request
from vllm_dvlm.bench.abuse.host import Host, tokens
from vllm_dvlm.bench.abuse.job import Job
from vllm_dvlm.bench.common import progress_bar
from vllm_dvlm.bench.engine_job import Result

NUM_GOOD = 24  # different undisturbed requests
BESIDE = 3  # of them at a time
VICTIMS = 4
# Of a victim: before its first step, while that is computed, after it, while a later one is computed, preempted.
MOMENTS = ("before", "in_first", "after_first", "later", "in_later", "preempted")


def measure(job: Job, host: Host, result: Result) -> None:
    """Abort requests until so many were aborted; any mode, pruned, cached and exact."""
    rng = job.rng("R2", "api")
    good = {f"g{i}": draw_request(job.rng("R2", "good", i), exact=False) for i in range(NUM_GOOD)}
    undisturbed = {name: tokens(host.run({name: request})[name]) for name, request in good.items()}
    moments: Counter[str] = Counter()
    victims: dict[str, tuple[str, int]] = {}  # name -> (when to abort it, after how many steps)
    running: dict[str, str] = {}  # name -> good request
    num_good, unequal, problems, count, num_pruning = 0, [], [], 0, 0

    def strike(name: str, moment: str, inside: bool) -> None:
        nonlocal num_pruning
        moments[moment] += 1
        if moment == "in_first":
            num_pruning += any(
                r.pruned_plan is not None for i, r in host.scheduler.requests.items() if i.startswith(f"{name}-")
            )
        (host.abort_inside if inside else host.abort)(name)
        victims.pop(name)
        bar.update()

    with progress_bar("R2 aborts by the API", job.counts.aborts) as bar:
        while sum(moments.values()) < job.counts.aborts:
            while len(running) < BESIDE:
                name, key = f"good{count}", rng.choice(list(good))
                host.add(name, good[key])
                running[name], count = key, count + 1
            while len(victims) < VICTIMS:
                name, moment = f"victim{count}", rng.choice(MOMENTS)
                host.add(name, draw_request(rng, exact=False, longest=24))
                victims[name], count = (moment, rng.randint(2, 9)), count + 1
            inside = []
            for name, (moment, after) in list(victims.items()):
                steps = host.steps_of(name)
                if moment == "before" and steps == 0:
                    strike(name, moment, inside=False)
                elif moment == "in_first" and steps == 0 or moment == "in_later" and steps >= after:
                    inside.append((name, moment))
                elif moment == "after_first" and steps == 1 or moment == "later" and steps >= after:
                    strike(name, moment, inside=False)
                elif moment == "preempted" and steps >= after:
                    host.preempt()
                    strike(name, moment, inside=False)
            problems += host.audit()
            if inside:
                host.inside = lambda todo=inside: [strike(name, moment, inside=True) for name, moment in todo]
            for output in host.step():
                if (key := running.pop(output.request_id, None)) is None:
                    victims.pop(output.request_id, None)  # it ended before its moment came
                    continue
                num_good += 1
                if tokens(output) != undisturbed[key]:
                    unequal.append(key)
                    print(f"R2 seed {job.seed}: {key} beside aborts differs\n   {good[key][1]}", flush=True)
                    print(f"   alone {undisturbed[key]}\n   here  {tokens(output)}", flush=True)
            problems += host.audit()
        for name in [*running, *victims]:
            host.abort(name)
    problems += host.settle()
    for problem in problems[:10]:
        print("R2", problem, flush=True)
    done = sum(moments.values())
    setting = f"{done} aborts by the API beside {num_good} good requests"
    result.value("R2_api_good_unequal", setting, len(unequal), "= 0", not unequal)
    result.value("R2_api_pool_problems", "audited twice a step, and at the end", len(problems), "= 0", not problems)
    result.figures |= {f"R2_api_{moment}": moments[moment] for moment in MOMENTS}
    result.figures |= {"R2_api_aborts": done, "R2_api_good": num_good, "R2_api_in_pruning_step": num_pruning}
