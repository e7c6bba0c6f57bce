"""Serve the demo model, ask real questions about pictures through the OpenAI client, show what pruning gave back.

    vllm-dvlm demo [--model FOLDER] [--out FOLDER] [--questions N]

The demo models (examples/demo_model, a LLaDA-V, and examples/demo_lavida, see examples/train_demo; both are part of the
package) answer questions about coloured handwritten digits; the questions here are about digits that they never saw.
LaViDa is asked the last one. With --model another checkpoint is asked about a photo.
"""

import argparse
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from openai import OpenAI
from PIL import Image

HERE = Path(__file__).resolve().parent
DEMO_MODEL, DEMO_LAVIDA = HERE / "demo_model", HERE / "demo_lavida"
SHOWN = (
    "denoise_steps",
    "forward_tokens",
    "committed_tokens",
    "requests_pruned",
    "visual_tokens",
    "kv_blocks",
    "prune",
)
PRUNED = {"prune_method": "redvtp", "prune_keep_ratio": 0.25}


@dataclass
class Item:
    """One question about one picture, and what became of it; answer None: nobody knows the right one."""

    name: str
    image: Image.Image
    question: str
    answer: str | None = None
    path: Path = Path()
    replies: dict[str, str] = field(default_factory=dict)


@dataclass
class Recipe:
    """A recipe, and the sums over its questions."""

    name: str
    options: dict
    seconds: float = 0.0
    flops: int = 0
    blocks: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo; exits with an error if a server does not come up or a reply is missing."""
    parser = argparse.ArgumentParser(prog="vllm-dvlm demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    parser.add_argument("--questions", type=int, default=10)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    is_demo = args.model.resolve() == DEMO_MODEL
    items = digit_items(args.questions + 1) if is_demo else [photo_item()]
    for item in items:
        item.path = args.out / f"{item.name}.png"
        item.image.save(item.path)
    canvas = 8 if is_demo else 32
    recipes = [
        Recipe("exact", {}),
        Recipe("cached", {"diffusion_refresh_interval": canvas, "diffusion_threshold": 1.0}),
        Recipe("pruned", PRUNED),
    ]
    own = items[: args.questions]
    with serve(args.model, args.out, [] if is_demo else ["--max-model-len", "8192"]) as url:
        client = ask_all_recipes(url, args.model, own, recipes, canvas, args.out)
        print_answers(own, recipes)
        stream(client, items[0], str(args.model), canvas)
        if is_demo:
            watch(client, items[0], str(args.model), canvas)
            decide(url, items[0], str(args.model))
        print(f"\nwhile the server runs, its page is {url}/dvlm")
        print_metrics(url)
    if is_demo:
        # LaViDa computes its prompt once, whatever the options.
        recipes = [Recipe("prefix", {}), Recipe("pruned", PRUNED)]
        with serve(DEMO_LAVIDA, args.out) as url:
            ask_all_recipes(url, DEMO_LAVIDA, items[-1:], recipes, canvas, args.out)
            print_answers(items[-1:], recipes)


@contextmanager
def serve(model: Path, out: Path, more: Sequence[str] = ()) -> Iterator[str]:
    """The address of `vllm serve` for a checkpoint; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"dvlm": {"trace_dir": str(out / "traces")}}
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--port", str(port)]
    command += ["--additional-config", json.dumps(settings), "--host", "127.0.0.1", *more]
    print("\n$", " ".join(command), flush=True)
    with (out / f"server_{model.name}.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, server, log.name)
            yield url
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def ask_all_recipes(url: str, model: Path, items: list[Item], recipes: list[Recipe], canvas: int, out: Path) -> OpenAI:
    """Every question in every recipe; the client, for more."""
    client = OpenAI(base_url=url + "/v1", api_key="none")
    ask(client, items[0], str(model), {"diffusion_canvas_length": canvas})  # warms up
    for recipe in recipes:
        for item in items:
            ask_with(client, item, recipe, str(model), {"diffusion_canvas_length": canvas, "diffusion_trace": 1}, out)
    return client


def digit_items(num: int) -> list[Item]:
    """Questions about digits that the demo model was not trained on."""
    from vllm_dvlm.synthetic.digit_questions import held_out

    asked = held_out(num, seed=2026)
    return [Item(f"{i}_{q.kind}", Image.fromarray(q.image), q.question, q.answer) for i, q in enumerate(asked, 1)]


def photo_item() -> Item:
    """A photo that ships with scikit-learn."""
    from sklearn.datasets import load_sample_image

    return Item("photo", Image.fromarray(load_sample_image("china.jpg")), "What is in this picture?")


def wait_until_ready(url: str, server: subprocess.Popen, log: str, limit_s: float = 300) -> None:
    """Poll /health; RuntimeError if the server ends or takes too long."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended; see {log}")
        try:
            with urllib.request.urlopen(url + "/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server was not ready after {limit_s:.0f} s; see {log}")


def ask(client: OpenAI, item: Item, model: str, options: dict, **more):
    """One chat request about the item's picture."""
    buffer = io.BytesIO()
    item.image.save(buffer, format="PNG")
    link = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": link}}, {"type": "text", "text": item.question}]
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=options["diffusion_canvas_length"],
        temperature=0,
        extra_body={"vllm_xargs": options},
        **more,
    )


def ask_with(client: OpenAI, item: Item, recipe: Recipe, model: str, common: dict, out: Path) -> None:
    """Ask, note reply and figures; draw what was pruned."""
    start = time.perf_counter()
    reply = ask(client, item, model, common | recipe.options)
    recipe.seconds += time.perf_counter() - start
    item.replies[recipe.name] = reply.choices[0].message.content
    report = reply.model_extra["kv_transfer_params"]["dvlm"]
    recipe.flops += report["flops"]
    if "kv_blocks_before" in report:
        recipe.blocks.append(f"{report['kv_blocks_before']} → {report['kv_blocks_after']}")
        picture = out / f"{item.name}_{recipe.name}.png"
        command = [sys.executable, "-m", "vllm_dvlm.cli", "show", str(out / "traces" / f"{reply.id}.json")]
        subprocess.run([*command, "--image", str(item.path), "--model", model, "--out", str(picture)], check=True)


def print_answers(items: list[Item], recipes: list[Recipe]) -> None:
    """Questions with the expected answer and all replies, then what each recipe cost."""
    for item in items:
        print(f"\nQ: {item.question}   ({item.path})")
        if item.answer is not None:
            print(f"   expected      {item.answer}")
        for recipe in recipes:
            mark = "" if item.answer is None else "  ✓" if item.replies[recipe.name].strip() == item.answer else "  ✗"
            print(f"   {recipe.name:<13} {item.replies[recipe.name]!r}{mark}")
    print(f"\n{'recipe':<8} {'right':>6} {'s/question':>11} {'GFLOP':>8}  {'KV blocks':<10} options")
    known = [item for item in items if item.answer is not None]
    for recipe in recipes:
        right = sum(item.replies[recipe.name].strip() == item.answer for item in known)
        score = f"{right}/{len(known)}" if known else "-"
        figures = f"{recipe.seconds / len(items):>11.3f} {recipe.flops / 1e9:>8.2f}"
        blocks = recipe.blocks[0] if recipe.blocks else "-"
        print(f"{recipe.name:<8} {score:>6} {figures}  {blocks:<10} {json.dumps(recipe.options)}")


def stream(client: OpenAI, item: Item, model: str, canvas: int) -> None:
    """The first question once more, streamed in blocks of a quarter of the canvas."""
    print(f"\nstreamed: {item.question} ", end="")
    options = {"diffusion_canvas_length": canvas, "diffusion_block_length": canvas // 4}
    for chunk in ask(client, item, model, options, stream=True):
        print(chunk.choices[0].delta.content or "", end="|", flush=True)


def watch(client: OpenAI, item: Item, model: str, canvas: int) -> None:
    """The same, with the canvas of each step."""
    print("\n\nwatched:")
    options = {"diffusion_canvas_length": canvas, "diffusion_stream": "provisional"} | PRUNED
    for chunk in ask(client, item, model, options, stream=True):
        shown = (chunk.choices[0].delta.model_extra or {}).get("diffusion", {})
        if shown.get("event") == "snapshot":
            print(f"  step {shown['step']}: {shown['text']!r}, {shown['masked']} masked")
        elif shown.get("event") == "pruned":
            print(f"  visual tokens {shown['visual_tokens']}, KV blocks given back: {shown['kv_blocks_freed']}")


def decide(url: str, item: Item, model: str) -> None:
    """The first question as a decision between colours, in one forward pass."""
    buffer = io.BytesIO()
    item.image.save(buffer, format="PNG")
    picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    colours = ("red", "green", "blue", "yellow", "white", "orange", "pink", "purple")
    body = {
        "model": model,
        "state": None,
        "images": [picture],
        "questions": {"colour": {"type": "choice", "instructions": item.question, "criteria": dict.fromkeys(colours)}},
        "chat_template_kwargs": {"decision_labels": "words"},
    }
    request = urllib.request.Request(
        url + "/v1/systemone", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer = json.load(reply)["answers"]["colour"]
    likely = sorted(answer["probabilities"].items(), key=lambda pair: -pair[1])[:3]
    print("\ndecided:", item.question, ", ".join(f"{name} {share:.1%}" for name, share in likely))


def print_metrics(url: str) -> None:
    """What the server counted."""
    print("\n\n/metrics:")
    with urllib.request.urlopen(url + "/metrics", timeout=10) as page:
        for line in page.read().decode().splitlines():
            if line.startswith("vllm_dvlm:") and any(word in line for word in SHOWN) and "_created" not in line:
                print(" ", line)


if __name__ == "__main__":
    main()
