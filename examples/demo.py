"""Serve a LLaDA-V checkpoint, ask about a photo through the OpenAI client, show what pruning gave back.

    python examples/demo.py [--model FOLDER] [--out FOLDER]

Without --model: examples/demo_model if it is there, else a small random-weight checkpoint in LLaDA-V's layout, whose
answers are random words; the path through the server is the same.
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
from pathlib import Path

from openai import OpenAI
from PIL import Image

HERE = Path(__file__).resolve().parent
SHOWN = ("denoise_steps", "forward_tokens", "committed_tokens", "requests_pruned", "visual_tokens_pruned", "kv_blocks")


def main() -> None:
    """Run the demo; exits with an error if the server does not come up or an answer is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.model or checkpoint(args.out)
    photo = args.out / "photo.png"
    real_photo().save(photo)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"dvlm": {"trace_dir": str(args.out / "traces")}}
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--port", str(port)]
    command += ["--additional-config", json.dumps(settings), "--max-model-len", "8192", "--host", "127.0.0.1"]
    print("$", " ".join(command), flush=True)
    with (args.out / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", server)
            ask_all(f"http://127.0.0.1:{port}", str(model), photo, args.out)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def checkpoint(out: Path) -> Path:
    """The shipped demo model, or a random one made on the spot."""
    shipped = HERE / "demo_model"
    if (shipped / "config.json").exists():
        return shipped
    from vllm_dvlm.bench.random_checkpoint import Sizes, write_random_checkpoint

    folder = out / "random_checkpoint"
    if not (folder / "config.json").exists():
        write_random_checkpoint(folder, Sizes(), seed=0)
    return folder


def real_photo() -> Image.Image:
    """A photo that ships with scikit-learn."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


def wait_until_ready(url: str, server: subprocess.Popen, limit_s: float = 300) -> None:
    """Poll /health; RuntimeError if the server ends or takes too long."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError("the server ended; see server.log")
        try:
            with urllib.request.urlopen(url + "/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server was not ready after {limit_s:.0f} s; see server.log")


def ask_all(url: str, model: str, photo: Path, out: Path) -> None:
    """Ask three ways: exact, cached with threshold, pruned; print answers and figures."""
    client = OpenAI(base_url=url + "/v1", api_key="none")
    buffer = io.BytesIO()
    Image.open(photo).save(buffer, format="PNG")
    link = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    question = "What is in this picture?"
    content = [{"type": "image_url", "image_url": {"url": link}}, {"type": "text", "text": question}]
    common = {"diffusion_canvas_length": 32, "diffusion_trace": 1}
    pruned = {"prune_method": "redvtp", "prune_keep_ratio": 0.25}
    ways = {
        "exact": {},
        "cached": {"diffusion_refresh_interval": 32, "diffusion_threshold": 1.0},
        "pruned": {"diffusion_refresh_interval": 32, **pruned},
    }
    print(f"\nQ: {question}  ({photo})")
    for name, options in ways.items():
        start = time.perf_counter()
        reply = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            max_tokens=32,
            temperature=0,
            extra_body={"vllm_xargs": common | options},
        )
        seconds = time.perf_counter() - start
        text = reply.choices[0].message.content
        report = (reply.model_extra.get("kv_transfer_params") or {}).get("dvlm", {})
        print(f"\n[{name}] {json.dumps(options)} {seconds:.2f} s\nA: {text!r}\n{json.dumps(report)}")
        trace = out / "traces" / f"{reply.id}.json"
        picture = out / f"{name}.png"
        command = [sys.executable, "-m", "vllm_dvlm.cli", "show", str(trace), "--image", str(photo)]
        subprocess.run([*command, "--model", model, "--out", str(picture)], check=True)
    print("\nstreamed: ", end="")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=32,
        temperature=0,
        stream=True,
        extra_body={"vllm_xargs": {"diffusion_canvas_length": 32, "diffusion_block_length": 8}},
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="|", flush=True)
    print("\n\n/metrics:")
    with urllib.request.urlopen(url + "/metrics", timeout=10) as page:
        for line in page.read().decode().splitlines():
            if line.startswith("vllm_dvlm:") and any(word in line for word in SHOWN) and "_created" not in line:
                print(" ", line)


if __name__ == "__main__":
    main()
