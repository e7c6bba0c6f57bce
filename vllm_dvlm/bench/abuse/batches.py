"""R3: mixed batches in exact mode give every request the tokens that it gets alone."""

import random
import time
from typing import Any

from vllm import SamplingParams

from vllm_dvlm.bench.abuse import draws
from vllm_dvlm.bench.abuse.host import Host, Request, tokens
from vllm_dvlm.bench.abuse.job import Job
from vllm_dvlm.bench.common import progress
from vllm_dvlm.bench.result import Result

LONGEST = 16  # canvas
IMAGE_SHARE = 0.3
SIZES = ((96, 64), (300, 100), (384, 384), (120, 500), (17, 23))


def draw_prompt(rng: random.Random, has_image: bool) -> dict[str, Any]:
    """Text or token ids, with one or two pictures."""
    if not has_image:
        ids = [rng.randrange(260, 900) for _ in range(rng.randint(1, 90))]
        return rng.choice([{"prompt_token_ids": ids}, {"prompt": draws.words(rng, rng.randint(1, 60))}])
    images = [draws.picture(rng, rng.choice(SIZES)) for _ in range(rng.choice([1, 1, 2]))]
    pieces = [draws.words(rng, rng.randint(1, 9)) for _ in range(len(images) + 1)]
    return {"prompt": "<image>".join(pieces), "multi_modal_data": {"image": images}}


def draw_request(rng: random.Random, exact: bool = True, longest: int = LONGEST) -> Request:
    """A request with settings of any kind."""
    has_image = rng.random() < IMAGE_SHARE
    options = draws.options(rng, has_image, longest, exact)
    canvas = options["diffusion_canvas_length"]
    more = draws.sampling(rng)
    if rng.random() < 0.3:
        more["logprobs"] = rng.randint(0, 3)
    max_tokens = rng.choice([canvas, canvas, rng.randint(1, canvas)])
    return draw_prompt(rng, has_image), SamplingParams(max_tokens=max_tokens, extra_args=options, **more)


def logprobs_of(output: Any) -> list[float]:
    """Log-probability of each token; [] if none were asked for."""
    found = output.outputs[0].logprobs
    return [step[token].logprob for token, step in zip(tokens(output), found, strict=True)] if found else []


def measure(job: Job, host: Host, result: Result) -> None:
    """Each request of a pool once alone, then in batches drawn from the pool. Prints what differs."""
    names = [f"q{i}" for i in range(job.counts.distinct)]
    pool = {name: draw_request(job.rng("R3", name)) for name in names}
    begin = time.monotonic()
    alone = {name: host.run_named({name: pool[name]})[name] for name in progress(names, "R3 alone")}
    result.description["seconds_R3_alone"] = round(time.monotonic() - begin, 1)
    begin = time.monotonic()
    rng = job.rng("R3", "batches")
    num_runs, unequal, problems, drift = 0, [], [], 0.0
    for number in progress(range(job.counts.batches), "R3 batches"):
        batch = rng.sample(names, min(rng.randint(2, 8), len(names)))
        for name, output in host.run_named({name: pool[name] for name in batch}).items():
            num_runs += 1
            wanted = alone[name]
            same_end = output.outputs[0].finish_reason == wanted.outputs[0].finish_reason
            if tokens(output) != tokens(wanted) or output.outputs[0].text != wanted.outputs[0].text or not same_end:
                unequal.append(name)
                print(f"R3 seed {job.seed} batch {number} {batch}: {name} differs\n   {pool[name][1]}", flush=True)
                print(f"   alone {tokens(wanted)}\n   here  {tokens(output)}", flush=True)
                continue
            pairs = zip(logprobs_of(output), logprobs_of(wanted), strict=True)
            drift = max([drift, *(abs(a - b) for a, b in pairs)])
        problems += host.audit()
    result.description["seconds_R3_batches"] = round(time.monotonic() - begin, 1)
    problems += host.audit_idle()
    num_images = sum("multi_modal_data" in prompt for prompt, _ in pool.values())
    drawn_from = f"{len(pool)} requests ({num_images} with pictures)"
    setting = f"{job.counts.batches} batches of 2 to 8 from {drawn_from}, exact mode: runs unequal to alone"
    result.value("R3_unequal_runs", setting, len(unequal), "= 0", not unequal)
    result.value(
        "R3_pool_problems", "faults of the pool, audited after every batch", len(problems), "= 0", not problems
    )
    result.figures |= {
        "R3_runs": num_runs,
        "R3_unequal_requests": ", ".join(sorted(set(unequal))) or "none",
        "R3_largest_logprob_difference": drift,
        "R3_distinct_tokens": len({token for output in alone.values() for token in tokens(output)}),
    }
