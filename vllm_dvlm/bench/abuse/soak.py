"""R6: what hours of requests leave behind: memory and open files of the server's processes over many short requests."""

import asyncio
import random
import statistics
import time
from typing import Any

from vllm_dvlm.bench.abuse import draws
from vllm_dvlm.bench.abuse.fuzz_bodies import MODEL, Body, image_part
from vllm_dvlm.bench.abuse.job import Job
from vllm_dvlm.bench.abuse.served import Server, gather_limited, session
from vllm_dvlm.bench.common import Row, progress_bar
from vllm_dvlm.bench.result import Result

CONCURRENT = 32
SAMPLES = 10  # of memory and files in each window
# Memory may grow by so much between the windows: pages that an allocator touches late.
LEVEL = 0.02
LEVEL_FILES = 8  # connections come and go
MIN_WINDOWS = 6  # with fewer the last window says nothing: caches still fill, and connections are still opened


def body(rng: random.Random) -> tuple[str, Body]:
    """Path and body of a short request: one to four positions; text, pictures, streams, and some that are refused."""
    options: Body = {"diffusion_canvas_length": rng.randint(1, 4)}
    found: Body = {"model": MODEL, "max_tokens": 4, "temperature": 0, "vllm_xargs": options}
    if rng.random() < 0.2:
        found["stream"] = True
    draw = rng.random()
    if draw < 0.03:
        options["diffusion_max_steps"] = -1
    if draw < 0.1:
        parts = [image_part(rng), {"type": "text", "text": draws.words(rng, 4)}]
        options |= {"prune_method": "redvtp", "prune_keep_ratio": 0.5}
        return "/v1/chat/completions", found | {"messages": [{"role": "user", "content": parts}]}
    if draw < 0.3:
        return "/v1/chat/completions", found | {"messages": [{"role": "user", "content": draws.words(rng, 6)}]}
    return "/v1/completions", found | {"prompt": [rng.randrange(260, 900) for _ in range(rng.randint(1, 30))]}


def measure(job: Job, server: Server, result: Result) -> None:
    """Send the requests; memory and files of the first and the last window, each sampled while it runs.

    Requests before the first window are not counted: oneDNN keeps code for each new shape of a batch, some 250 MB
    until its cache is full (ONEDNN_PRIMITIVE_CACHE_CAPACITY, 1,024).
    """
    total, window, warm_up = job.counts.requests, job.counts.window, job.counts.warm_up
    every = max(1, window // SAMPLES)
    points: list[Row] = []
    failed, sent = 0, -warm_up
    begin = time.monotonic()

    async def run(bar: Any) -> None:
        async with session(keep_alive=True) as http:

            async def one(number: int) -> None:
                nonlocal failed, sent
                path, what = body(job.rng("R6", number))
                async with http.post(server.url + path, json=what) as reply:
                    await reply.read()
                failed += reply.status not in (200, 400)
                sent += 1
                bar.update()
                at = sent
                if at % every == 0 and (0 < at <= window or at > total - window or at % (10 * every) == 0):
                    memory, files = await asyncio.to_thread(lambda: (server.memory_bytes(), server.open_files()))
                    points.append({"requests": at, "memory_mb": memory / 1e6, "open_files": files})

            await gather_limited([one(number) for number in range(warm_up + total)], CONCURRENT)

    with progress_bar("R6 short requests", warm_up + total) as bar:
        asyncio.run(run(bar))
    seconds = time.monotonic() - begin
    left = server.left_over()
    points.sort(key=lambda point: point["requests"])
    first = [p for p in points if 0 < p["requests"] <= window]
    last = [p for p in points if p["requests"] > total - window]
    memory = [statistics.median(p["memory_mb"] for p in part) for part in (first, last)]
    files = [statistics.median(p["open_files"] for p in part) for part in (first, last)]
    growth = memory[1] / memory[0] - 1
    counted = f"{total} requests over HTTP after {warm_up}, {CONCURRENT} at a time"
    setting = f"{counted}: growth of resident memory, last {window} against first"
    is_long = total >= MIN_WINDOWS * window
    result.value("R6_memory_growth", setting, growth, f"<= {LEVEL}", growth <= LEVEL if is_long else None)
    more_files = files[1] - files[0]
    is_level = more_files <= LEVEL_FILES if is_long else None
    result.value("R6_open_files_growth", "open files", more_files, f"<= {LEVEL_FILES}", is_level)
    result.value("R6_failed", "answers that are neither 200 nor 400", failed, "= 0", not failed)
    result.value("R6_left", "requests or KV blocks left afterwards", len(left), "= 0", not left)
    result.figures |= {
        "R6_memory_first_mb": memory[0],
        "R6_memory_last_mb": memory[1],
        "R6_open_files_first": files[0],
        "R6_open_files_last": files[1],
        "R6_memory_cold_mb": points[0]["memory_mb"],
        "R6_warm_up_requests": warm_up,
        "R6_requests_per_s": (warm_up + total) / seconds,
    }
    result.growth += points
