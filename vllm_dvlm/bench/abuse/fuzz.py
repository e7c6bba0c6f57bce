"""R1: fuzzed requests over HTTP. Each is answered 200 or 4xx with a reason, streams end as they should."""

import asyncio
import dataclasses
import json
from typing import Any

from vllm_dvlm.bench.abuse.fuzz_bodies import Request, request
from vllm_dvlm.bench.abuse.job import Job
from vllm_dvlm.bench.abuse.served import Server, gather_limited, session
from vllm_dvlm.bench.common import progress_bar
from vllm_dvlm.bench.result import Result

CONCURRENT = 8
ANSWER_S = 90
# A known answer that is asked for between the fuzzed requests.
CONTROL = {"prompt": "what is in this picture", "max_tokens": 8, "temperature": 0, "return_token_ids": True}


@dataclasses.dataclass
class Outcome:
    """status: of HTTP, 0 without an answer. fault: what is wrong with the answer, "" if nothing."""

    status: int
    fault: str
    reason: str = ""


def reason_of(text: str) -> str:
    """The message of an error body in any of vLLM's forms; "" if there is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return ""
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found) if found else ""


def stream_fault(path: str, text: str) -> str:
    """What is wrong with a stream that began with 200."""
    events = []
    for line in text.splitlines():
        if line.startswith("data:"):
            payload = line.removeprefix("data:").strip()
            try:
                events.append(payload if payload == "[DONE]" else json.loads(payload))
            except ValueError:
                return f"an event that is no JSON: {payload[:200]}"
    if not events:
        return "a stream without events"
    kinds = [event.get("type") for event in events if isinstance(event, dict)]
    for event in events:
        if isinstance(event, dict) and (event.get("error") or event.get("type") in ("error", "response.failed")):
            return f"an error after status 200: {json.dumps(event)[:300]}"
    if path == "/v1/responses":
        return "" if kinds[-1] in ("response.completed", "response.incomplete") else f"ends with {kinds[-1]}"
    if path == "/v1/messages":
        return "" if "message_stop" in kinds else f"ends with {kinds[-1]}"
    if events[-1] != "[DONE]":
        return "ends without [DONE]"
    chunks = [event for event in events if isinstance(event, dict)]
    begun = {choice["index"] for chunk in chunks for choice in chunk.get("choices", ())}
    ended = {c["index"] for chunk in chunks for c in chunk.get("choices", ()) if c.get("finish_reason")}
    return "" if begun == ended else f"choices {sorted(begun - ended)} without finish_reason"


def whole_fault(text: str) -> str:
    """What is wrong with an answer of status 200 that is not streamed."""
    try:
        found = json.loads(text)
    except ValueError:
        return f"no JSON: {text[:200]}"
    if isinstance(found, dict) and found.get("error"):
        return f"an error with status 200: {text[:300]}"
    for choice in found.get("choices", ()) if isinstance(found, dict) else ():
        if not choice.get("finish_reason"):
            return "a choice without finish_reason"
    return ""


async def send(http: Any, url: str, sent: Request) -> Outcome:
    """Send one request and judge the answer."""
    try:
        async with asyncio.timeout(ANSWER_S):
            headers = {"Content-Type": "application/json"}
            async with http.post(url + sent.path, data=sent.data, headers=headers) as reply:
                text = (await reply.read()).decode("utf-8", "replace")
    except TimeoutError:
        return Outcome(0, f"no answer within {ANSWER_S} s")
    except Exception as error:  # noqa: BLE001 - whatever a client may see
        return Outcome(0, f"{type(error).__name__}: {error}")
    if reply.status == 200:
        streams = reply.content_type == "text/event-stream"
        return Outcome(200, stream_fault(sent.path, text) if streams else whole_fault(text))
    reason = reason_of(text)
    if not 400 <= reply.status < 500:
        return Outcome(reply.status, f"status {reply.status}: {text[:300]}")
    return Outcome(reply.status, "" if reason else f"status {reply.status} without a reason: {text[:200]}", reason)


def offender(seed: int, number: int, sent: Request, fault: str) -> str:
    """A line by which a failure can be repeated."""
    body = sent.data[:400].decode("utf-8", "replace")
    return f"R1 seed {seed} case {number} {sent.path} ({sent.what}): {fault}\n   {body}"


def measure(job: Job, server: Server, result: Result, cases: list[int] | None = None) -> None:
    """Send the requests, or only those of these numbers. Prints what went wrong."""
    numbers = cases or list(range(job.counts.fuzzed))
    sent = [request(job.rng("R1", number)) for number in numbers]
    control = server.post("/v1/completions", CONTROL)["choices"][0]["token_ids"]
    wrong_controls = 0

    async def run() -> list[Outcome]:
        nonlocal wrong_controls
        with progress_bar("R1 fuzzed requests", len(sent)) as bar:
            async with session() as http:

                async def one(number: int, what: Request) -> Outcome:
                    nonlocal wrong_controls
                    outcome = await send(http, server.url, what)
                    if outcome.fault:
                        print(offender(job.seed, number, what, outcome.fault), flush=True)
                    if number % 20 == 0:
                        wrong_controls += not await _control_holds(http, server.url, control)
                    bar.update()
                    return outcome

                return await gather_limited([one(*pair) for pair in zip(numbers, sent, strict=True)], CONCURRENT)

    outcomes = asyncio.run(run())
    left = server.left_over() if server.is_alive() else {"the engine": 0}
    faults = [outcome for outcome in outcomes if outcome.fault]
    num_streams = sum(one.streams for one in sent)
    setting = f"{len(sent)} fuzzed requests over HTTP, {num_streams} streamed, {CONCURRENT} at a time: bad answers"
    result.value("R1_faults", setting, len(faults), "= 0", not faults)
    result.value("R1_engine_alive", "server and engine alive afterwards", server.is_alive(), "True", server.is_alive())
    result.value("R1_blocks_or_requests_left", "requests or KV blocks left afterwards", len(left), "= 0", not left)
    what = "known requests between them that got another answer"
    result.value("R1_wrong_neighbours", what, wrong_controls, "= 0", not wrong_controls)
    result.figures["R1_requests"] = len(sent)
    for name, low, high in (("200", 200, 299), ("4xx", 400, 499), ("5xx", 500, 599), ("no_answer", 0, 0)):
        result.figures[f"R1_status_{name}"] = sum(low <= outcome.status <= high for outcome in outcomes)
    lengths = [len(outcome.reason) for outcome in outcomes]
    result.figures["R1_longest_reason_chars"] = max(lengths)
    result.figures["R1_longest_reason_case"] = numbers[lengths.index(max(lengths))]
    result.figures["R1_left"] = ", ".join(f"{name}={value:g}" for name, value in left.items()) or "nothing"


async def _control_holds(http: Any, url: str, wanted: list[int]) -> bool:
    try:
        async with http.post(url + "/v1/completions", json={"model": "m"} | CONTROL) as reply:
            return (await reply.json())["choices"][0]["token_ids"] == wanted
    except Exception:  # noqa: BLE001 - any failure counts
        return False
