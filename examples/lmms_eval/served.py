"""Answers for lmms-eval from a running server, decoded per benchmark as LLaDA-V's evaluation script does.

Nothing of lmms-eval is imported here; `run.py` makes this class one of its models. What lmms-eval hands over and
expects back was read in its version 0.7.3 (`lmms_eval/api/task.py`, `construct_requests`; `api/instance.py`).
"""

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from openai import OpenAI
from tqdm import tqdm

IMAGE = "<image>"


@dataclass(frozen=True)
class Decoding:
    """How a benchmark is decoded: canvas (`gen_length`), denoising steps, block, in tokens; what is put behind the
    question (`think_mode`), and strings that end the answer."""

    canvas: int
    steps: int
    block: int
    suffix: str = " /no_think"
    stop: tuple[str, ...] = ()

    def xargs(self) -> dict[str, Any]:
        """The server's request options."""
        return {
            "diffusion_canvas_length": self.canvas,
            "diffusion_max_steps": self.steps,
            "diffusion_block_length": self.block,
        }


SHORT = Decoding(2, 2, 2)  # a letter, a word, yes or no
# Benchmark -> settings of the official script (eval/scripts/evaluate.sh of LLaDA-V).
DECODING = {
    "mmmu_val": SHORT,
    "mmmu_pro_standard": SHORT,
    "mmmu_pro_vision": SHORT,
    "mmstar": SHORT,
    "ai2d": SHORT,
    "seedbench": SHORT,
    "mmbench_en_dev": SHORT,
    "muirbench": SHORT,
    "mme": SHORT,
    "realworldqa": SHORT,
    "chartqa": Decoding(16, 16, 16, stop=("\n",)),
    "docvqa_val": Decoding(32, 16, 32),
    "infovqa_val": Decoding(32, 16, 32),
    "mathvista_testmini": Decoding(96, 48, 96, suffix=" /think"),
    "mathverse_testmini_vision": Decoding(64, 32, 64, suffix=" /think"),
}


def decoding_of(task: str) -> Decoding:
    """Settings of a task; a sub-task such as mathvista_testmini_cot has those of its benchmark, others the default."""
    fitting = [name for name in DECODING if task == name or task.startswith(name + "_")]
    return DECODING[max(fitting, key=len)] if fitting else SHORT


def question_text(context: str, num_images: int, suffix: str) -> str:
    """What the official script asks: places of the images, the task's text, the think mode.

    As there, a context that places its images itself, or has none, is left alone.
    """
    if not num_images or IMAGE in context:
        return context
    return " ".join([IMAGE] * num_images) + "\n" + context + suffix


def image_part(image: Any) -> dict[str, Any]:
    """A PIL image as part of a chat message, without loss."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


class ServedDiffusion:
    """The part of lmms-eval's model interface that generation tasks use.

    Arguments (`--model_args base_url=...,num_concurrent=16,prune_method=redvtp,prune_keep_ratio=0.25`):
        base_url: of the server, with /v1.
        num_concurrent: requests sent at once.
        timeout: seconds for one answer.
        suffix: put behind every question instead of the benchmark's think mode.
        options: any `diffusion_*` or `prune_*` request option; it replaces that of the table.

    Raises ValueError for an argument that is none of these.
    """

    is_simple = True
    task_dict: dict[str, Any]  # filled in by lmms-eval: task -> split -> documents

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000/v1",
        num_concurrent: int = 16,
        timeout: float = 600,
        suffix: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **options: Any,
    ) -> None:
        # lmms-eval passes batch_size, max_batch_size and device to every model; the server knows better.
        super().__init__()
        if unknown := [name for name in options if not name.startswith(("diffusion_", "prune_"))]:
            raise ValueError(f"unknown model_args: {', '.join(unknown)}")
        self.options, self.suffix = options, suffix
        self.num_concurrent = int(num_concurrent)
        self.client = OpenAI(base_url=base_url, api_key="none", timeout=float(timeout))
        self.model_name = self.client.models.list().data[0].id

    def request(self, context: str, visuals: Sequence[Any] | None, task: str) -> dict[str, Any]:
        """Body of the chat request for a document. ValueError for a video."""
        visuals = visuals or []
        if any(isinstance(visual, str) for visual in visuals):
            raise ValueError(f"{task}: videos are not supported, only images")
        decoding = decoding_of(task)
        text = question_text(context, len(visuals), decoding.suffix if self.suffix is None else self.suffix)
        content = [*map(image_part, visuals), {"type": "text", "text": text}]
        xargs = decoding.xargs() | self.options
        body: dict[str, Any] = {
            "model": self.model_name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": xargs["diffusion_canvas_length"],
            "temperature": 0,
            "extra_body": {"vllm_xargs": xargs},
        }
        return body | ({"stop": list(decoding.stop)} if decoding.stop else {})

    def answer(self, request: Any) -> str:
        """Answer of one `Instance`. An error of the server ends the evaluation: its text must not be scored."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        reply = self.client.chat.completions.create(**self.request(context, visuals, task))
        # In this order, as the official script: one full stop at the very end, then white space.
        return (reply.choices[0].message.content or "").removesuffix(".").strip()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers of `Instance`s whose args are (context, gen_kwargs, doc_to_visual, doc_id, task, split), in order.

        The task's own gen_kwargs are for autoregressive models; the table above replaces them.
        """
        with ThreadPoolExecutor(self.num_concurrent) as pool:
            return list(tqdm(pool.map(self.answer, requests), total=len(requests), desc="answers"))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("a diffusion model has no likelihood to serve; use generation tasks")
