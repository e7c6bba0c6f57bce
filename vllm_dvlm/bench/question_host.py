"""An engine inside this process that answers questions about images, timed step by step.

Importing this module imports vLLM; `engine_env.prepare` comes first.
"""

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.renderers.hf import resolve_chat_template_content_format
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_dvlm.bench.common import Row, describe_run, peak_rss_bytes
from vllm_dvlm.bench.engine_host import KV_BLOCK_SIZE, EngineHost, Run, Step
from vllm_dvlm.bench.question_job import Job
from vllm_dvlm.bench.questions import Item
from vllm_dvlm.bench.scoring import is_match
from vllm_dvlm.bench.settings_grid import Setting
from vllm_dvlm.checkpoint.anyres import num_visual_tokens
from vllm_dvlm.checkpoint.configuration import load_config, resolve_vision_config
from vllm_dvlm.checkpoint.renderer import IMAGE_PLACEHOLDER, default_template
from vllm_dvlm.steps import cdiv, round_up

# A prompt more than this is not run together with others in one step.
MAX_STEP_TOKENS = 2**16


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the engine said: text, whether it matches, and its report (`kv_transfer_params["dvlm"]`)."""

    text: str
    right: bool
    report: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Answered:
    """Questions under one setting, in their order.

    wall_s, cpu_s: time of all engine steps, wall and processor (all threads); reading images and tokenising is not
    part of it, the vision tower is. max_running: most requests that held KV blocks at once.
    """

    answers: list[Answer]
    wall_s: float
    cpu_s: float
    max_running: int


class QuestionHost(EngineHost):
    """The engine of a measurement by questions. ValueError if one does not fit into the model's positions."""

    def __init__(self, job: Job, items: Sequence[Item]) -> None:
        self.job = job
        self.prompt_len = longest_prompt(job.model, items)
        max_len = round_up(self.prompt_len + job.canvas, KV_BLOCK_SIZE)
        self.request_blocks = cdiv(max_len, KV_BLOCK_SIZE)
        # One more: the null block is never handed out.
        self.pool_blocks = (job.pool_prompts or job.batch) * self.request_blocks + 1
        super().__init__(
            job.model,
            max_model_len=max_len,
            max_num_batched_tokens=max(max_len, min(job.batch * max_len, MAX_STEP_TOKENS)),
            max_num_seqs=job.batch,
            limit_mm_per_prompt={"image": max(len(item.images) for item in items)},
            additional_config={"dvlm": {"max_canvas_length": job.canvas}},
            block_size=KV_BLOCK_SIZE,
            num_gpu_blocks_override=self.pool_blocks,
            seed=0,
        )

    def params(self, setting: Setting, seed: int) -> SamplingParams:
        """Greedy sampling parameters of a request; the seed is that of random pruning."""
        extra_args = self.job.request_options(setting)
        return SamplingParams(temperature=0, max_tokens=self.job.canvas, seed=seed, extra_args=extra_args)

    def _add(self, item: Item, setting: Setting, seed: int) -> str:
        content: list[Any] = [{"type": "image_pil", "image_pil": image} for image in item.open_images()]
        content.append({"type": "text", "text": item.question})
        messages: Any = [{"role": "user", "content": content}]
        (name,) = self.llm.enqueue_chat(messages, self.params(setting, seed), use_tqdm=False)
        return name.rsplit("-", 1)[0]  # outputs bear the name without the random part that the engine adds

    def ask(
        self,
        items: Sequence[Item],
        setting: Setting,
        first_seed: int = 0,
        at_once: int | None = None,
        on_answer: Callable[[], Any] = lambda: None,
    ) -> Answered:
        """Ask every question once, `at_once` of them together (None: as many as the engine takes).

        Images are computed anew: what an earlier setting left in the encoder's cache would make this one faster.
        first_seed: seed of the first item; the others follow.
        """
        self.engine.reset_encoder_cache()
        # A few wait in the engine's queue, so that a free place is taken at once; not all, for their pixels.
        room = at_once or 2 * self.job.batch
        waiting = deque(enumerate(items))
        index_of: dict[str, int] = {}
        done: dict[int, Answer] = {}
        steps: list[Step] = []
        running = 0
        while waiting or self.engine.has_unfinished_requests():
            while waiting and len(index_of) - len(done) < room:
                index, item = waiting.popleft()
                index_of[self._add(item, setting, first_seed + index)] = index
            step, finished = self.step()
            steps.append(step)
            running = max(running, len(self.scheduler.running) + len(finished))
            for output in finished:
                index = index_of[output.request_id]
                text = output.outputs[0].text
                right = is_match(text, items[index].answers)
                done[index] = Answer(text, right, output.kv_transfer_params["dvlm"])
                on_answer()
        wall_s, process_s = Run(steps, []).time
        return Answered([done[index] for index in range(len(items))], wall_s, process_s, running)

    def describe(self) -> Row:
        """Machine, shapes and memory, for the report."""
        config = self.llm.model_config.hf_config
        job = self.job
        return describe_run(
            self.llm.model_config.dtype,
            job.seed,
            model=os.path.basename(os.path.normpath(job.model)),
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
            data=job.data_name,
            longest_prompt=self.prompt_len,
            canvas=job.canvas,
            steps=job.num_steps,
            block=job.block or job.canvas,
            batch=job.batch,
            pool_kv_blocks=self.pool_blocks - 1,
            kv_block_size=self.scheduler.block_size,
            engine_peak_rss_gib=peak_rss_bytes() / 2**30,
        )


def longest_prompt(model: str, items: Sequence[Item]) -> int:
    """Tokens of the longest prompt, from the checkpoint's files alone: the engine is sized by it."""
    config = load_config(model)
    layout = config.image_layout(resolve_vision_config(config))
    model_config = EngineArgs(model=model).create_model_config()
    tokenizer = cached_tokenizer_from_config(model_config)
    template = default_template(tokenizer, model_config).template
    content_format = resolve_chat_template_content_format(template, None, "auto", tokenizer, model_config=model_config)
    text_lens: dict[tuple[str, int], int] = {}
    longest = 0
    for item in items:
        key = (item.question, len(item.images))
        if key not in text_lens:
            content: Any = f"{IMAGE_PLACEHOLDER}\n" * key[1] + key[0]
            if content_format == "openai":
                content = [{"type": "image"}] * key[1] + [{"type": "text", "text": key[0]}]
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
            pieces = text.split(IMAGE_PLACEHOLDER)
            text_lens[key] = sum(len(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces)
        visual = sum(num_visual_tokens(*size, layout) for size in item.sizes)
        longest = max(longest, text_lens[key] + visual)
    return longest
