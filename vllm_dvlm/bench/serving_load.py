"""Load over HTTP: `vllm serve`, and vLLM's own `vllm bench serve` once per setting.

Light to import; both run as processes of their own, as a user would start them.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_dvlm.bench.common import Row, progress
from vllm_dvlm.bench.question_job import Job
from vllm_dvlm.bench.questions import Item, load_items, write_jsonl
from vllm_dvlm.bench.settings_grid import Setting

VLLM = Path(sys.executable).with_name("vllm")
MODEL_NAME = "model"
START_UP_S = 600
STOP_S = 30


def server_command(job: Job, longest_prompt: int, pool_kv_blocks: int, kv_block_size: int, port: int) -> list[str]:
    """`vllm serve` with the shape of the engine that `frontier` measures."""
    max_len = -(-(longest_prompt + job.canvas) // kv_block_size) * kv_block_size
    options = {
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": MODEL_NAME,
        "--max-model-len": max_len,
        "--max-num-batched-tokens": job.batch * max_len,
        "--max-num-seqs": job.batch,
        "--block-size": kv_block_size,
        "--num-gpu-blocks-override": pool_kv_blocks + 1,
        "--additional-config": json.dumps({"dvlm": {"max_canvas_length": job.canvas}}),
    }
    return [str(VLLM), "serve", job.model, *(str(word) for pair in options.items() for word in pair)]


def client_command(job: Job, setting: Setting, dataset: Path, num: int, port: int, result: Path) -> list[str]:
    """`vllm bench serve` that sends `num` requests of one setting, `job.batch` at a time."""
    options = {
        "--base-url": f"http://127.0.0.1:{port}",
        "--backend": "openai-chat",
        "--endpoint": "/v1/chat/completions",
        "--model": MODEL_NAME,
        "--tokenizer": job.model,
        "--dataset-name": "custom_image",
        "--dataset-path": dataset,
        "--custom-output-len": job.canvas,
        "--num-prompts": num,
        "--max-concurrency": job.batch,
        "--num-warmups": 2,
        "--seed": job.seed,
        "--percentile-metrics": "ttft,e2el",
        "--metric-percentiles": "50,99",
        "--extra-body": json.dumps({"vllm_xargs": job.request_options(setting), "temperature": 0}),
        "--result-dir": result.parent,
        "--result-filename": result.name,
    }
    flags = ["--custom-ensure-client-side-data", "--save-result", "--disable-tqdm"]
    return [str(VLLM), "bench", "serve", *(str(word) for pair in options.items() for word in pair), *flags]


def write_dataset(folder: Path, items: Sequence[Item]) -> Path:
    """The questions in the format of `vllm bench serve --dataset-name custom_image`."""
    rows = [json.loads(line) for line in write_jsonl(folder, items).read_text(encoding="utf-8").splitlines()]
    path = folder / "custom_image.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            names = row.get("images") or [row["image"]]
            files = [str(folder / name) for name in names]
            file.write(json.dumps({"prompt": row["question"], "image_files": files}) + "\n")
    return path


def _environment(threads: int) -> dict[str, str]:
    """Ours without what `engine_env` sets for an engine inside the process."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), VLLM_CPU_OMP_THREADS_BIND="nobind")
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return environment


@contextlib.contextmanager
def serving(
    command: Sequence[str], port: int, threads: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """A server's process while the body runs; RuntimeError with the end of its log if it does not come up."""
    with log.open("wb") as out:
        server = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(threads) | dict(environment or {}),
        )
    try:
        deadline = time.monotonic() + START_UP_S
        while not _is_ready(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not come up:\n" + log.read_text(errors="replace")[-4000:])
            time.sleep(0.5)
        yield server
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(STOP_S)
                break


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except OSError:
        return False


def measure(job: Job, num: int, description: Row) -> dict[str, Row]:
    """Columns by name of the setting, from `num` requests each, `job.batch` at a time.

    description: of the engine run (`QuestionHost.describe`). served/s: completed requests per second; served_ttft_ms
    and the others: median time to the first token, median and 99th percentile of the whole answer, as the client sees
    them. RuntimeError if a request fails.
    """
    items, _ = load_items(job.data, min(num, job.num), job.seed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shape = {name: description[name] for name in ("longest_prompt", "pool_kv_blocks", "kv_block_size")}
    with tempfile.TemporaryDirectory(prefix="vllm-dvlm-bench-") as workdir:
        folder = Path(workdir)
        dataset = write_dataset(folder / "questions", items)
        command = server_command(job, port=port, **shape)
        with serving(command, port, job.threads, folder / "server.log"):
            return {
                setting.name: _send(job, setting, dataset, num, port, folder / f"{setting.name}.json")
                for setting in progress(job.settings, "served")
            }


def _send(job: Job, setting: Setting, dataset: Path, num: int, port: int, path: Path) -> Row:
    command = client_command(job, setting, dataset, num, port, path)
    ran = subprocess.run(command, capture_output=True, text=True, env=_environment(job.threads))
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if ran.returncode or result.get("completed") != num:
        raise RuntimeError(
            f"vllm bench serve, {setting.name}: {result.get('completed')} of {num}\n{ran.stderr[-4000:]}"
        )
    return {
        "served/s": result["request_throughput"],
        "served_ttft_ms": result["median_ttft_ms"],
        "served_p50_ms": result["median_e2el_ms"],
        "served_p99_ms": result["p99_e2el_ms"],
    }
