"""R2 over HTTP: clients that leave at any moment, streamed or not, beside others, who do not notice."""

import asyncio
import random
from collections import Counter
from typing import Any

from vllm_dvlm.bench.abuse import draws
from vllm_dvlm.bench.abuse.fuzz_bodies import MODEL, Body, image_part
from vllm_dvlm.bench.abuse.job import Job
from vllm_dvlm.bench.abuse.served import Server, session
from vllm_dvlm.bench.common import progress_bar
from vllm_dvlm.bench.result import Result

CHAT = "/v1/chat/completions"
NUM_GOOD = 16
GOOD_AT_ONCE, VICTIMS_AT_ONCE = 3, 6
LONGEST_STAY_S, LONGEST_STREAM_S = 0.6, 30.0
# However slow the machine is, clients go on leaving until so many answers beside them have been compared, and until one
# has left at each of these moments; those beyond the wanted number let an answer come between them.
LEAST_GOOD = 8
LEAST_MOMENTS = ("waiting", "in_stream")
MOST_TRIES = 20  # per abort or answer that is wanted: a client that got its whole answer first does not count


def _body(rng: random.Random, longest: int) -> Body:
    has_image = rng.random() < 0.4
    parts: list[Body] = [{"type": "text", "text": draws.words(rng, rng.randint(1, 40))}]
    if has_image:
        parts.insert(0, image_part(rng))
    options = draws.options(rng, has_image, longest)
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": options["diffusion_canvas_length"]}
    return {"model": MODEL, "vllm_xargs": options} | body | draws.sampling(rng)


def good_body(rng: random.Random) -> Body:
    """A request whose answer is compared."""
    return _body(rng, 16) | {"return_token_ids": True}


def victim_body(rng: random.Random) -> Body:
    """A request of many steps."""
    body = _body(rng, 64)
    canvas = 64 if rng.random() < 0.7 else body["vllm_xargs"]["diffusion_canvas_length"]
    body["vllm_xargs"] |= {"diffusion_canvas_length": canvas, "diffusion_max_steps": canvas}
    for name in ("diffusion_threshold", "diffusion_suffix"):
        body["vllm_xargs"].pop(name, None)
    streams = rng.random() < 0.5
    body["vllm_xargs"]["diffusion_block_length"] = 1 if streams else rng.choice([1, canvas])  # chunks from the start
    return body | {"max_tokens": canvas, "ignore_eos": True, "stop_token_ids": [], "stop": [], "stream": streams}


async def leave(http: Any, url: str, body: Body, rng: random.Random) -> str:
    """Send a request and close the connection. Returns when: "" if the answer was there first."""
    chunks = rng.choice([0, 0, 1, 2, 5]) if body["stream"] else 0
    stay = rng.uniform(0, LONGEST_STAY_S) if not chunks else LONGEST_STREAM_S
    received = 0

    async def listen() -> bool:
        """True at the end of the answer, False after so many chunks."""
        nonlocal received
        async with http.post(url + CHAT, json=body) as reply:
            async for line in reply.content:
                received += line.startswith(b"data: {")
                if chunks and received > chunks:  # the first chunk has the role alone
                    reply.close()
                    return False
        return True

    # Ending the task closes the connection.
    try:
        async with asyncio.timeout(stay):
            ended = await listen()
    except TimeoutError:
        ended = False
    if ended:
        return ""
    if not body["stream"]:
        return "waiting"
    return "in_stream" if received else "before_first_chunk"


def measure(job: Job, server: Server, result: Result) -> None:
    """So many clients leave, or more. Prints good requests that were answered otherwise than undisturbed."""
    good = [good_body(job.rng("R2", "http good", i)) for i in range(NUM_GOOD)]

    def ids(reply: Body) -> Any:
        return reply["choices"][0]["token_ids"]

    undisturbed = [ids(server.post(CHAT, body)) for body in good]
    moments: Counter[str] = Counter()
    unequal, num_good, tries = [], 0, 0
    most_tries = MOST_TRIES * (job.counts.aborts + LEAST_GOOD)

    def is_enough() -> bool:
        wanted = sum(moments.values()) >= job.counts.aborts and num_good >= LEAST_GOOD
        return wanted and all(moments[moment] for moment in LEAST_MOMENTS)

    async def run(bar: Any) -> None:
        async with session() as http:
            enough = asyncio.Event()

            async def neighbour(number: int) -> None:
                nonlocal num_good
                rng = job.rng("R2", "neighbour", number)
                while not enough.is_set():
                    i = rng.randrange(NUM_GOOD)
                    async with http.post(server.url + CHAT, json=good[i]) as reply:
                        found = ids(await reply.json()) if reply.status == 200 else await reply.text()
                    num_good += 1
                    if found != undisturbed[i]:
                        unequal.append(i)
                        print(f"R2 seed {job.seed} good request {i}: {found} not {undisturbed[i]}", flush=True)

            async def another_answer() -> None:
                before = num_good
                while num_good == before and not all(task.done() for task in neighbours):
                    await asyncio.sleep(0.01)

            async def client() -> None:
                nonlocal tries
                while not enough.is_set() and tries < most_tries:
                    rng = job.rng("R2", "victim", tries)
                    tries += 1
                    if moment := await leave(http, server.url, victim_body(rng), rng):
                        moments[moment] += 1
                        bar.update()
                    if is_enough():
                        enough.set()
                    elif sum(moments.values()) >= job.counts.aborts:
                        await another_answer()

            neighbours = [asyncio.create_task(neighbour(i)) for i in range(GOOD_AT_ONCE)]
            await asyncio.gather(*(client() for _ in range(VICTIMS_AT_ONCE)))
            enough.set()
            await asyncio.gather(*neighbours)

    with progress_bar("R2 clients that leave", job.counts.aborts) as bar:
        asyncio.run(run(bar))
    left = server.left_over() if server.is_alive() else {"the engine": 0}
    done = sum(moments.values())
    setting = f"{done} clients leave before their answer ends, beside {num_good} good requests: of those unequal"
    result.value("R2_http_good_unequal", setting, len(unequal), "= 0", not unequal)
    result.value("R2_http_left", "requests or KV blocks left afterwards", len(left), "= 0", not left)
    result.value(
        "R2_http_good_compared", "answers compared beside them", num_good, f">= {LEAST_GOOD}", num_good >= LEAST_GOOD
    )
    result.value(
        "R2_http_aborts",
        "clients that left in time",
        done,
        f">= {job.counts.aborts}",
        done >= job.counts.aborts,
    )
    result.figures |= {
        f"R2_http_{moment}": moments[moment] for moment in ("waiting", "before_first_chunk", "in_stream")
    }
    result.figures["R2_http_good"] = num_good
