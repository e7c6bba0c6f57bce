"""R2 by the API: requests that are aborted at any moment beside others, which do not notice."""

from collections import Counter
from collections.abc import Callable

from vllm_dvlm.bench.abuse.batches import draw_request
from vllm_dvlm.bench.abuse.host import Host, Request, tokens
from vllm_dvlm.bench.abuse.job import Job
from vllm_dvlm.bench.common import progress_bar
from vllm_dvlm.bench.result import Result

NUM_GOOD = 24  # different undisturbed requests
LEAST_GOOD = 4  # of them compared, however few aborts are wanted
BESIDE = 3  # of them at a time
VICTIMS = 4
# Of a victim: before its first step, while that is computed, after it, while a later one is computed, preempted.
MOMENTS = ("before", "in_first", "after_first", "later", "in_later", "preempted")


def is_exact(request: Request) -> bool:
    """Tokens of a cached request may change when it is preempted (README, Limits); those of an exact one may not."""
    return request[1].extra_args.get("diffusion_refresh_interval", 1) == 1


def prunes(request: Request) -> bool:
    """Has pictures, and a method that prunes them."""
    method = request[1].extra_args.get("prune_method", "none")
    return method != "none" and "multi_modal_data" in request[0]


def measure(job: Job, host: Host, result: Result) -> None:
    """Abort requests until so many were aborted and some were compared; any mode, pruned, cached and exact."""
    rng = job.rng("R2", "api")
    good = {f"g{i}": draw_request(job.rng("R2", "good", i), exact=False) for i in range(NUM_GOOD)}
    undisturbed = {name: tokens(host.run_named({name: request})[name]) for name, request in good.items()}
    moments: Counter[str] = Counter()
    victims: dict[str, tuple[str, int]] = {}  # name -> (when to abort it, after how many steps)
    running: dict[str, str] = {}  # name -> good request
    num_good, unequal, problems, count, num_pruning = 0, [], [], 0, 0

    def strike(name: str, moment: str, abort: Callable[[str], None]) -> None:
        moments[moment] += 1
        abort(name)
        victims.pop(name)
        bar.update()

    def between_steps() -> None:
        for name, (moment, after) in list(victims.items()):
            steps = host.request(name).report["denoise_steps"]
            if (moment, steps) in (("before", 0), ("after_first", 1)) or moment == "later" and steps >= after:
                strike(name, moment, host.abort)
            elif moment == "preempted" and steps >= after and all(is_exact(good[key]) for key in running.values()):
                host.preempt()
                strike(name, moment, host.abort)

    def inside_step() -> None:
        nonlocal num_pruning
        for name, (moment, after) in list(victims.items()):
            steps = host.request(name).report["denoise_steps"]  # with the one that is computed now
            if (moment, steps) == ("in_first", 1) or moment == "in_later" and steps > after:
                num_pruning += host.request(name).pruned_plan is not None
                strike(name, moment, host.abort_inside)

    with progress_bar("R2 aborts by the API", job.counts.aborts) as bar:
        while sum(moments.values()) < job.counts.aborts or num_good < LEAST_GOOD:
            while len(running) < BESIDE:
                name, key = f"good{count}", rng.choice(list(good))
                host.add(name, good[key])
                running[name], count = key, count + 1
            while len(victims) < VICTIMS:
                name, moment = f"victim{count}", rng.choice(MOMENTS)
                victim = draw_request(rng, exact=False, longest=32)
                while moment == "in_first" and not prunes(victim):  # the step that prunes is the first
                    victim = draw_request(rng, exact=False, longest=32)
                host.add(name, victim)
                victims[name], count = (moment, rng.randint(2, 9)), count + 1
            between_steps()
            problems += host.audit()
            host.inside = inside_step
            for output in host.step()[1]:
                if (key := running.pop(output.request_id, None)) is None:
                    victims.pop(output.request_id, None)  # it ended before its moment came
                    continue
                num_good += 1
                if tokens(output) != undisturbed[key]:
                    unequal.append(key)
                    print(f"R2 seed {job.seed}: {key} beside aborts differs\n   {good[key][1]}", flush=True)
                    print(f"   alone {undisturbed[key]}\n   here  {tokens(output)}", flush=True)
            problems += host.audit()
        host.inside = None
        for name in [*running, *victims]:
            host.abort(name)
    problems += host.settle()
    for problem in problems[:10]:
        print("R2", problem, flush=True)
    done = sum(moments.values())
    setting = f"{done} aborts by the API beside {num_good} good requests: of those unequal"
    result.value("R2_api_good_unequal", setting, len(unequal), "= 0", not unequal)
    result.value(
        "R2_api_pool_problems",
        "faults of the pool, audited twice a step and at the end",
        len(problems),
        "= 0",
        not problems,
    )
    result.figures |= {f"R2_api_{moment}": moments[moment] for moment in MOMENTS}
    result.figures |= {"R2_api_aborts": done, "R2_api_good": num_good, "R2_api_in_pruning_step": num_pruning}
