"""The engine of the benches of pruning: a random model of any family, one prompt with a picture.

Importing this module imports vLLM; `engine_env.prepare` comes first.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from vllm import SamplingParams

from vllm_dvlm.bench.common import Row, describe_run, peak_rss_bytes
from vllm_dvlm.bench.engine_host import KV_BLOCK_SIZE, EngineHost, Request
from vllm_dvlm.bench.pruning_job import CACHED, Job
from vllm_dvlm.checkpoint.anyres import ImageLayoutConfig, lavida_layout, num_visual_tokens
from vllm_dvlm.reference.model import conversation, prompt_token_ids
from vllm_dvlm.steps import cdiv, pruned_prompt_len
from vllm_dvlm.synthetic.checkpoint_files import Sizes
from vllm_dvlm.synthetic.random_checkpoint import write_random_checkpoint
from vllm_dvlm.synthetic.random_lavida import write_random_lavida


@dataclasses.dataclass(frozen=True)
class BenchFamily:
    """What differs between model families here.

    write: writes a random checkpoint: folder, sizes, seed. layout: image layout of its config and vision config.
    exact / cached: options of a request that recomputes everything in every step, and of one that reads KV of earlier
    steps.
    """

    write: Callable[..., Path]
    layout: Callable[..., ImageLayoutConfig]
    exact: dict[str, Any]
    cached: dict[str, Any]


REFRESH = "diffusion_refresh_interval"
ATTENTION = "diffusion_attention"
FAMILIES = {
    "llada_v": BenchFamily(write_random_checkpoint, ImageLayoutConfig.from_hf_config, {REFRESH: 1}, {REFRESH: CACHED}),
    "lavida": BenchFamily(write_random_lavida, lavida_layout, {ATTENTION: "full"}, {ATTENTION: "prefix"}),
}
QUESTION = "<image>\nPlease describe this image in detail."


class PruningHost(EngineHost):
    """The engine of a measurement of pruning, and its prompt with a picture.

    pool_prompts: KV pool in unpruned requests of `prompt`; None for ample.
    """

    def __init__(
        self,
        job: Job,
        sizes: Sizes,
        pool_prompts: int | None = None,
        max_num_seqs: int = 2,
        batched_prompts: int = 1,
        **defaults: Any,
    ) -> None:
        self.job, self.family = job, FAMILIES[job.family]
        folder = Path(job.workdir) / f"model-{sizes.hidden}-{sizes.layers}"
        if not folder.exists():
            self.family.write(folder, sizes, seed=job.seed)
        width, height = job.image
        pixels = np.random.RandomState(job.seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        self.prompt = {"prompt": conversation(QUESTION), "multi_modal_data": {"image": image}}
        self.prompt_len, self.num_visual = prompt_lengths(folder, job.image, self.family)
        self.request_blocks = self.kv_blocks(1.0)
        max_len = self.prompt_len + max(64, job.canvas)
        # One more: the null block is never handed out.
        blocks = {} if pool_prompts is None else {"num_gpu_blocks_override": pool_prompts * self.request_blocks + 1}
        super().__init__(
            folder,
            max_model_len=max_len,
            max_num_batched_tokens=max_len * batched_prompts,
            max_num_seqs=max_num_seqs,
            limit_mm_per_prompt={"image": 1},
            additional_config={"dvlm": {"max_canvas_length": max(64, job.canvas), **defaults}},
            block_size=KV_BLOCK_SIZE,
            **blocks,
        )
        self.run([self.request(1.0, cached=False)], max_steps=1)  # fills the encoder cache

    def request_len(self, keep_ratio: float) -> int:
        """Tokens of a request, canvas included, once it keeps this share of its visual tokens."""
        return pruned_prompt_len(self.prompt_len, self.num_visual, keep_ratio) + self.job.canvas

    def kv_blocks(self, keep_ratio: float) -> int:
        """KV blocks of one request, all layers in one group."""
        return cdiv(self.request_len(keep_ratio), KV_BLOCK_SIZE)

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one KV block; with two groups of layers a block belongs to one of them."""
        config = self.scheduler.kv_cache_config
        return sum(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks

    def request(self, keep_ratio: float, cached: bool, method: str | None = None, **options: Any) -> Request:
        """A greedy request; keep ratio 1 is unpruned (`none`), method None the job's."""
        extra: dict[str, Any] = {
            "diffusion_canvas_length": self.job.canvas,
            "diffusion_max_steps": self.job.num_steps,
            "prune_method": "none",
            **(self.family.cached if cached else self.family.exact),
        }
        if keep_ratio < 1:
            extra |= {"prune_method": method or self.job.method, "prune_keep_ratio": keep_ratio}
        return self.prompt, SamplingParams(temperature=0, max_tokens=self.job.canvas, extra_args=extra | options)

    def describe(self) -> Row:
        """Machine, shapes and memory, for the report."""
        config = self.runner.model_config.hf_config
        return describe_run(
            "float32",
            self.job.seed,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            image="x".join(map(str, self.job.image)),
            canvas=self.job.canvas,
            steps=self.job.num_steps,
            **{name.replace("diffusion", "cached"): value for name, value in self.family.cached.items()},
            kv_block_size=self.scheduler.block_size,
            engine_peak_rss_gib=peak_rss_bytes() / 2**30,
        )


def prompt_lengths(folder: Path, image_size: tuple[int, int], family: BenchFamily) -> tuple[int, int]:
    """(tokens of the prompt, visual tokens among them), from the checkpoint's files alone."""
    from transformers import PreTrainedTokenizerFast

    config = json.loads((folder / "config.json").read_text())
    vision = json.loads((folder / config["mm_vision_tower"] / "config.json").read_text())
    layout = family.layout(SimpleNamespace(**config), SimpleNamespace(**vision))
    num_visual = num_visual_tokens(*image_size, layout)
    ids = prompt_token_ids(PreTrainedTokenizerFast.from_pretrained(folder), conversation(QUESTION))
    return len(ids) - 1 + num_visual, num_visual


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over repeats of ratios within a repeat: a slow minute of the machine slows both sides."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
