"""`vllm-dvlm bench decisions`: decisions in one forward pass against generating the same answers.

The demo model's questions about held-out pictures, from a `vllm serve`: generated one at a time, decided one at a time,
decided several at once; and all questions about one picture in one request, read apart and jointly. All ways in turns.
Accuracy with its interval, calibration (expected calibration error, reliability plot), questions per second.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import io
import itertools
import json
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dvlm.bench.common import Row, add_output_arguments, describe_run, progress, report
from vllm_dvlm.bench.scale_plan import DEMO_KV_BYTES, num_gpus
from vllm_dvlm.bench.scale_run import Engine, free_port, is_busy, running
from vllm_dvlm.bench.scoring import is_match, wilson_interval
from vllm_dvlm.bench.serving_load import MODEL_NAME
from vllm_dvlm.synthetic import digit_questions as digits

NUMBERS = [str(number) for number in range(10)]
# Places have 144 names, more than a question has options, and are left out.
OPTIONS = {"colour": list(digits.COLOURS), "digit": NUMBERS, "beside": NUMBERS, "count": NUMBERS}
BINS = 10
ROUNDS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; all others are those of `vllm serve`."""
    add_output_arguments(parser)
    parser.add_argument("--model", help="checkpoint folder that knows the demo's questions (default: the demo model)")
    parser.add_argument("--num", type=int, default=1000, help="questions (default 1000)")
    parser.add_argument("--alone", type=int, default=200, help="of them timed one at a time (default 200)")
    parser.add_argument("--pictures", type=int, default=100, help="with several questions about each (default 100)")
    parser.add_argument("--at-once", type=int, default=8, help="decisions at a time (default 8)")
    parser.add_argument("--canvas", type=int, default=8, help="canvas of generated answers (default 8)")
    parser.add_argument("--seed", type=int, default=0)


@dataclass(frozen=True)
class Asked:
    """A question with its options. picture: data URL."""

    picture: str
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Decided:
    """answer and its probability among the options."""

    answer: str
    confidence: float


class Server:
    """Requests to a running server."""

    def __init__(self, port: int, model: str = MODEL_NAME) -> None:
        self.url, self.model = f"http://127.0.0.1:{port}", model

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps({"model": self.model} | body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)

    def generate(self, asked: Asked, canvas: int) -> str:
        """The reply to a chat, exact mode."""
        content = [
            {"type": "image_url", "image_url": {"url": asked.picture}},
            {"type": "text", "text": asked.question},
        ]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": canvas, "temperature": 0}
        return self._post("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def decide(self, asked: Sequence[Asked], reading: str = "separate") -> list[Decided]:
        """Questions about the first one's picture."""
        questions = {
            str(number): {
                "type": "choice",
                "instructions": each.question,
                "criteria": dict.fromkeys(OPTIONS[each.kind]),
            }
            for number, each in enumerate(asked)
        }
        body = {
            "state": None,
            "images": [asked[0].picture],
            "questions": questions,
            "chat_template_kwargs": {"decision_labels": "words", "decision_reading": reading},
        }
        answers = self._post("/v1/systemone", body)["answers"]
        found = [answers[name] for name in questions]
        return [Decided(each["choice"], each["probabilities"][each["choice"]]) for each in found]


def questions(num: int, seed: int) -> list[Asked]:
    """Held-out questions whose answers are few enough to be options."""
    found: list[Asked] = []
    for each in digits.held_out(num * len(digits.KINDS) // len(OPTIONS) + len(digits.KINDS), seed):
        if each.kind in OPTIONS:
            found.append(Asked(_data_url(each.image), each.question, each.answer, each.kind))
    return found[:num]


def groups(num: int, seed: int) -> list[list[Asked]]:
    """Several questions about each of `num` pictures: how often each digit occurs, and the colour of those that occur
    once."""
    import numpy as np

    rng = np.random.default_rng((seed, 0xDEC1))
    side = digits.GRID
    scenes = digits.draw_scenes(rng, np.zeros(num, dtype=np.int64), side, side)
    pixels = digits.join_cells(digits.paint(rng, scenes, side, side, digits.held_out_glyphs()))
    found = []
    for place in range(num):
        picture, shown = _data_url(pixels[place]), scenes.digits[place].tolist()
        own = []
        for digit in sorted(set(shown)):
            own.append(Asked(picture, f"how many {digit} are there?", str(shown.count(digit)), "count"))
            if shown.count(digit) == 1:
                colour = list(digits.COLOURS)[scenes.colours[place, shown.index(digit)]]
                own.append(Asked(picture, f"what colour is the {digit}?", colour, "colour"))
        found.append(own)
    return found


def _data_url(pixels: Any) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def calibration(decided: Sequence[Decided], right: Sequence[bool]) -> tuple[float, list[tuple[float, float, int]]]:
    """Expected calibration error, and (mean confidence, share right, number) of each bin of equal width with any."""
    bins: list[list[int]] = [[] for _ in range(BINS)]
    for place, each in enumerate(decided):
        bins[min(BINS - 1, int(each.confidence * BINS))].append(place)
    found, error = [], 0.0
    for places in filter(None, bins):
        sure = sum(decided[i].confidence for i in places) / len(places)
        share = sum(right[i] for i in places) / len(places)
        found.append((sure, share, len(places)))
        error += len(places) / len(decided) * abs(sure - share)
    return error, found


def _row(name: str, right: Sequence[bool], per_s: float) -> Row:
    low, high = wilson_interval(sum(right), len(right))
    share = sum(right) / len(right)
    return {
        "way": name,
        "questions": len(right),
        "right": share,
        "low": low,
        "high": high,
        "questions/s": per_s,
    }


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. ValueError for arguments that cannot be met."""
    from vllm_dvlm.bench.question_job import model_of

    if wrong := [name for name in ("num", "alone", "pictures", "at_once", "canvas") if getattr(arguments, name) < 1]:
        raise ValueError(f"--{wrong[0].replace('_', '-')} must be at least 1")
    model, gpus, port = model_of(arguments.model), num_gpus(), free_port()
    options = list(arguments.rest)
    if not gpus and not any(word.startswith("--kv-cache-memory-bytes") for word in options):
        options += ["--kv-cache-memory-bytes", str(DEMO_KV_BYTES)]
    engine = Engine(model, arguments.at_once, 1, bool(gpus), tuple(options))
    asked, several = questions(arguments.num, arguments.seed), groups(arguments.pictures, arguments.seed)
    with (
        tempfile.TemporaryDirectory(prefix="vllm-dvlm-bench-") as folder,
        running(engine.alone(port, 1), port, Path(folder) / "server.log"),
    ):
        busy = is_busy()
        rows, figures, found = measure(Server(port), asked, several, arguments)
    about = {"busy": "yes" if busy else "no", "at_once": arguments.at_once, "canvas": arguments.canvas}
    description = describe_run("checkpoint", arguments.seed, **about)
    report(arguments, rows, figures, description, lambda axes: _draw(axes, *found))
    return 0


class Ways:
    """Ways to ask: each with its questions and answers, and the seconds that they took."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[Asked, Any]]] = {}
        self.seconds: dict[str, float] = {}

    def ask(self, name: str, asked: Sequence[Asked], answers: Callable[[], Iterable[Any]]) -> None:
        """Take the time of `answers`, one for each question."""
        begin = time.perf_counter()
        found = list(answers())
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - begin
        self.found.setdefault(name, []).extend(zip(asked, found, strict=True))

    def rate(self, name: str) -> float:
        """Questions per second."""
        return len(self.found[name]) / self.seconds[name]

    def right(self, name: str) -> list[bool]:
        pairs = self.found[name]
        return [a.answer == q.answer if isinstance(a, Decided) else is_match(a, [q.answer]) for q, a in pairs]


def _ask_all(
    server: Server, asked: Sequence[Asked], several: Sequence[Sequence[Asked]], arguments: argparse.Namespace
) -> Ways:
    """Every way in turns, so that what slows the machine down slows all of them down."""
    canvas, ways, join = arguments.canvas, Ways(), itertools.chain.from_iterable
    alone = asked[: arguments.alone]
    with concurrent.futures.ThreadPoolExecutor(arguments.at_once) as pool:

        def ask(one: Sequence[Asked], every: Sequence[Asked], groups: Sequence[Sequence[Asked]]) -> None:
            own = list(join(groups))
            ways.ask("generated", one, lambda: (server.generate(a, canvas) for a in one))
            ways.ask("decided", one, lambda: (server.decide([a])[0] for a in one))
            ways.ask("decided at once", every, lambda: pool.map(lambda a: server.decide([a])[0], every))
            # The same questions, all of them generated, for accuracy alone.
            ways.ask("all generated", every, lambda: pool.map(lambda a: server.generate(a, canvas), every))
            ways.ask("several generated", own, lambda: (server.generate(a, canvas) for a in own))
            ways.ask("several", own, lambda: join(map(server.decide, groups)))
            ways.ask("several at once", own, lambda: join(pool.map(server.decide, groups)))
            ways.ask("several joint", own, lambda: join(server.decide(group, "joint") for group in groups))

        for turn in progress(range(ROUNDS), "turns"):
            ask(alone[turn::ROUNDS], asked[turn::ROUNDS], several[turn::ROUNDS])
    return ways


def measure(
    server: Server, asked: Sequence[Asked], several: Sequence[Sequence[Asked]], arguments: argparse.Namespace
) -> tuple[list[Row], Row, tuple[float, list[tuple[float, float, int]]]]:
    """Rows, figures and the calibration of all decisions."""
    for each in asked[: arguments.at_once]:  # warms up
        server.generate(each, arguments.canvas)
        server.decide([each])
    ways = _ask_all(server, asked, several, arguments)
    at_once = f"{arguments.at_once} at a time"
    table = (  # title, way, the way that tells how many are right
        ("generated, one at a time", "generated", "all generated"),
        ("decided, one at a time", "decided", "decided at once"),
        (f"decided, {at_once}", "decided at once", "decided at once"),
        ("several a picture: generated, one at a time", "several generated", "several generated"),
        ("several a picture: decided", "several", "several"),
        (f"several a picture: decided, {at_once}", "several at once", "several at once"),
        ("several a picture: decided jointly", "several joint", "several joint"),
    )
    rows = [_row(title, ways.right(judged), ways.rate(way)) for title, way, judged in table]
    rate = {way: ways.rate(way) for way in ways.found}
    share = {way: sum(ways.right(way)) / len(ways.found[way]) for way in ways.found}
    together, generated = dict(ways.found["decided at once"]), dict(ways.found["all generated"])
    right = {q: d.answer == q.answer for q, d in together.items()}
    right_text = {q: is_match(text, [q.answer]) for q, text in generated.items()}
    singly = ways.found["decided"]
    error, bins = calibration([d for _, d in ways.found["decided at once"]], ways.right("decided at once"))
    figures: Row = {
        "C3_times_generating": rate["decided at once"] / rate["generated"],
        "C3_times_generating_one_at_a_time": rate["decided"] / rate["generated"],
        "C3_right_minus_generated": share["decided at once"] - share["all generated"],
        "C3_only_decided_right": sum(right[q] and not right_text[q] for q in right),
        "C3_only_generated_right": sum(right_text[q] and not right[q] for q in right),
        "C3_same_answer_one_at_a_time": sum(together[q].answer == d.answer for q, d in singly) / len(singly),
        "C3_several_times_generating": rate["several"] / rate["several generated"],
        "C3_several_at_once_times_generating": rate["several at once"] / rate["several generated"],
        "C3_several_right_minus_generated": share["several"] - share["several generated"],
        "C3_joint_times_separate": rate["several joint"] / rate["several"],
        "C3_joint_right_minus_separate": share["several joint"] - share["several"],
        "expected_calibration_error": error,
    }
    for kind in OPTIONS:
        if own := [is_right for q, is_right in right.items() if q.kind == kind]:
            figures[f"right_{kind}"] = sum(own) / len(own)
    return rows, figures, (error, bins)


def _draw(axes: Any, error: float, bins: Sequence[tuple[float, float, int]]) -> None:
    most = max(num for _, _, num in bins)
    axes.plot([0, 1], [0, 1], ":", color="grey")
    axes.scatter([s for s, _, _ in bins], [r for _, r, _ in bins], [20 + 280 * n / most for _, _, n in bins])
    axes.set(xlabel="probability of the answer", ylabel="share right", title=f"expected calibration error {error:.3f}")
