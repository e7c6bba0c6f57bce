"""Checks of a self-test that need a running engine, in a process of their own.

    python -m vllm_dvlm.tools.selftest.engine_checks '{"folder": ..., "checkpoint": "llada_v", "checks": [...], ...}'

Appends a JSON row per check to the job's `out`, so that what was found before a crash is not lost.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_dvlm.tools.selftest.report import FAIL, NOT_HERE, PASS, Row
from vllm_dvlm.tools.selftest.sync import check_sync

# Largest difference between attention and its dense reference, as a share of the largest number.
ATTENTION = {"float32": 1e-3, "bfloat16": 0.03, "float16": 0.01}
REPORT = "report it with the file of --json"


@dataclasses.dataclass(frozen=True)
class Job:
    """checkpoint: key of goldens.json. dtype, backend: None is vLLM's own choice. label: stands before each check."""

    folder: str
    checkpoint: str
    out: str
    checks: list[str]
    label: str = ""
    dtype: str | None = None
    backend: str | None = None
    ranks: int = 1


def goldens(checkpoint: str) -> list[dict[str, Any]]:
    """Recorded runs: prompt, picture, options, token ids."""
    text = resources.files("vllm_dvlm.tools.selftest").joinpath("goldens.json").read_text(encoding="utf-8")
    return json.loads(text)[checkpoint]


class Host:
    """An engine and what is checked of it. Every check returns (status, detail, remedy)."""

    def __init__(self, job: Job) -> None:
        from vllm import LLM

        self.job = job
        options: dict[str, Any] = {} if job.backend is None else {"attention_config": {"backend": job.backend}}
        if job.dtype is not None:
            # A CPU host follows the setting, a GPU vLLM's option.
            options |= {"dtype": job.dtype, "additional_config": {"dvlm": {"cpu_dtype": job.dtype}}}
        self.llm = LLM(
            job.folder,
            max_model_len=2048,
            max_num_seqs=8,
            kv_cache_memory_bytes=64 * 2**20,
            tensor_parallel_size=job.ranks,
            limit_mm_per_prompt={"image": 1},
            **options,
        )

    def requests(self, names: list[str] | None = None) -> list[tuple[dict[str, Any], Any]]:
        """Recorded runs as requests; of these names only."""
        from PIL import Image
        from vllm import SamplingParams

        found = []
        for row in goldens(self.job.checkpoint):
            if names is not None and row["name"] not in names:
                continue
            prompt: dict[str, Any] = {"prompt": row["prompt"]}
            if row["image"] is not None:
                path = resources.files("vllm_dvlm.tools.selftest").joinpath("images", row["image"])
                with path.open("rb") as file, Image.open(file) as image:
                    prompt["multi_modal_data"] = {"image": image.convert("RGB")}
            params = SamplingParams(
                temperature=0,
                max_tokens=row["max_tokens"],
                ignore_eos=self.job.checkpoint != "llada_v",  # there the end of turn was part of the recording
                extra_args=dict(row["options"]),
            )
            found.append((prompt, params))
        return found

    def generate(self, names: list[str] | None = None) -> list[list[int]]:
        """Token ids of recorded runs, all in one batch."""
        prompts, params = zip(*self.requests(names), strict=True)
        outputs = self.llm.generate(list(prompts), list(params), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    # -- tokens ------------------------------------------------------------------------------------------------

    def tokens(self) -> tuple[str, str, str]:
        """Recorded runs, in one batch: token for token in float32, the share of equal tokens otherwise."""
        recorded = goldens(self.job.checkpoint)
        found = self.generate()
        num, equal, differ = 0, 0, []
        for row, own in zip(recorded, found, strict=True):
            wanted = row["token_ids"]
            if len(own) != len(wanted) and self.job.dtype == "float32":
                return FAIL, f"{row['name']}: {len(own)} tokens, {len(wanted)} recorded", REPORT
            num += len(wanted)
            same = [a == b for a, b in zip(own, wanted, strict=False)]
            equal += sum(same)
            if own != wanted:
                place = same.index(False) if False in same else len(same)
                differ.append(f"{row['name']} from token {place}")
        if self.job.dtype == "float32":
            if differ:
                return FAIL, f"{equal} of {num} tokens as recorded; differ: {', '.join(differ)}", REPORT
            return PASS, f"{len(found)} recorded runs in one batch, {num} tokens equal", ""
        note = f"; differ: {', '.join(differ)}" if differ else ""
        return PASS, f"{equal / num:.0%} of {num} tokens as in float32{note}", ""

    # -- inside ------------------------------------------------------------------------------------------------

    @cached_property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @cached_property
    def runner(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self) -> Any:
        return self.runner.model

    @property
    def dtype_name(self) -> str:
        return str(self.model.lm_head.weight.dtype).removeprefix("torch.")

    def attention(self) -> tuple[str, str, str]:
        """Rows of attention of real steps against a dense reference."""
        import torch

        from vllm_dvlm.tools.selftest import attention

        names = [row["name"] for row in goldens(self.job.checkpoint) if "prune_method" not in row["options"]]
        with torch.inference_mode(), attention.recorded(self.model, self.runner.model_state) as steps:
            self.generate(names)
            found = attention.compare(steps, [layer.self_attn for layer in self.model.model.layers])
        (backend,) = {group.backend.get_name() for groups in self.runner.attn_groups for group in groups}
        limit = ATTENTION[self.dtype_name]
        apart = f", {found.apart} of prompts alone" if found.apart else ""
        detail = (
            f"{backend}, {self.dtype_name}: off by {found.worst:.1e} in {found.rows} rows of attention, "
            f"{found.cached} with cached keys{apart}"
        )
        if not found.rows or not found.cached:
            return FAIL, detail + ": too few were seen", REPORT
        if not found.worst < limit:
            remedy = f"{backend} does not attend as asked here; name another: --attention-backend TRITON_ATTN"
            return FAIL, f"{detail}; more than {limit:g}", remedy
        return PASS, detail, ""

    def scoring(self) -> tuple[str, str, str]:
        """Attention to visual tokens, as pruning scores it, against its twin in float64."""
        import torch

        from vllm_dvlm.models import whole_attention
        from vllm_dvlm.models.probe import attention_to_columns, attention_to_columns_reference

        device = self.runner.device
        dtype = getattr(torch, self.dtype_name)
        # Rows, tokens, heads, KV heads, head size, visual tokens: LLaDA-V 8B, LaViDa-Dream 7B, and odd sizes.
        shapes = ((32, 3800, 32, 32, 128, 3645), (32, 1100, 28, 4, 128, 1008), (37, 203, 4, 2, 72, 90))
        worst = 0.0
        for rows, tokens, heads, kv_heads, size, columns in shapes:
            generator = torch.Generator().manual_seed(rows)
            query = torch.randn(rows, heads, size, generator=generator).to(dtype)
            key = torch.randn(tokens, kv_heads, size, generator=generator).to(dtype)
            places = torch.randperm(tokens, generator=generator)[:columns].sort().values
            expected = attention_to_columns_reference(query, key, size**-0.5, places)
            out = torch.zeros(rows, columns, device=device)
            attention_to_columns(query.to(device), key.to(device), size**-0.5, places.to(device), out)
            worst = max(worst, float(((out.cpu() - expected).abs() / expected).max()))
        detail = f"{len(shapes)} shapes on {device.type}, {self.dtype_name}: off by {worst:.1e} of each number"
        whole = self.model.model.layers[0].self_attn.attend_whole
        used = "a second pass over the keys"
        if whole is not None and whole_attention.sums_are_worth_it(whole):
            used = "the attention"
        detail += f"; denominators used: {used}; from attention: {self._other_denominators(shapes[2])}"
        if not worst < 2e-3:
            return FAIL, detail, "pruning would keep other tokens here; " + REPORT
        return PASS, detail, ""

    def _other_denominators(self, shape: tuple[int, ...]) -> str:
        """What scoring would be off by with the log-sum-exp of each attention that has one here."""
        import torch

        from vllm_dvlm.bench import scoring_kernels
        from vllm_dvlm.models.probe import attention_to_columns, attention_to_columns_reference

        rows, tokens, heads, kv_heads, size, visual = shape
        device, found = self.runner.device.type, []
        x = scoring_kernels.make((tokens, visual, heads, kv_heads, size), rows, device, 0)
        query = x.q[-rows:]
        expected = attention_to_columns_reference(query.cpu(), x.k.cpu(), x.scale, x.columns.cpu())
        for name, attention in scoring_kernels.attentions(device).items():
            try:
                lse = attention(x, True)[1][-rows:]
                out = torch.zeros(rows, visual, device=device)
                attention_to_columns(query, x.k, x.scale, x.columns, out, lse)
                found.append(f"{name} off by {float(((out.cpu() - expected).abs() / expected).max()):.1e}")
            except (ImportError, ValueError, RuntimeError, NotImplementedError):
                found.append(f"{name} not here")
        return ", ".join(found)

    def compaction(self) -> tuple[str, str, str]:
        """Kept KV rows moved together, in the cache's real memory order: the same memory as if written there."""
        import torch
        from vllm.forward_context import set_forward_context

        from vllm_dvlm.kv.compaction import compact_rows
        from vllm_dvlm.worker.pruning import StepPruner

        layer = self.model.model.layers[0].self_attn
        cache, name = layer.attn.kv_cache, layer.attn.layer_name
        blocks, size = cache.shape[0], self.core.scheduler.block_size
        generator = torch.Generator().manual_seed(0)
        block_ids = torch.randperm(blocks - 1, generator=generator)[:5].add(1).int()
        rows = torch.arange(5 * size - 7)
        kept = (torch.rand(len(rows), generator=generator) < 0.3).nonzero()[:, 0]

        def normal(num: int) -> torch.Tensor:
            drawn = torch.randn(num, layer.num_kv_heads, layer.padded_dim, generator=generator)
            return drawn.to(cache.dtype).to(cache.device)

        keys, values = normal(len(rows)), normal(len(rows))

        def write(k: torch.Tensor, v: torch.Tensor, at: torch.Tensor) -> None:
            slots = (block_ids[at // size].long() * size + at % size).to(cache.device)
            with set_forward_context(None, self.runner.vllm_config, num_tokens=len(at), slot_mapping={name: slots}):
                torch.ops.vllm.unified_kv_cache_update(k, v, name)

        before = cache.clone()
        try:
            with torch.inference_mode():
                write(keys, values, rows)
                compact_rows(cache, StepPruner._layout(layer), block_ids.to(cache.device), kept.to(cache.device), None)
                moved = cache.clone()
                write(keys, values, rows)
                write(keys[kept.to(cache.device)], values[kept.to(cache.device)], torch.arange(len(kept)))
                is_equal = torch.equal(moved, cache)
        finally:
            cache.copy_(before)
        order = "x".join(map(str, cache.shape)) + f", strides {'x'.join(map(str, cache.stride()))}"
        if not is_equal:
            return FAIL, f"rows are not where vLLM would write them (cache {order})", REPORT
        return PASS, f"{len(kept)} of {len(rows)} rows moved, bit-equal (cache {order})", ""

    def release(self) -> tuple[str, str, str]:
        """Blocks that pruning gives back: in the step in which it happens, as many as the kept tokens leave free."""
        (name,) = (row["name"] for row in goldens(self.job.checkpoint) if "prune_method" in row["options"])
        scheduler, engine = self.core.scheduler, self.llm.llm_engine
        pool = scheduler.kv_cache_manager.block_pool
        idle = pool.get_num_free_blocks()
        ((prompt, params),) = self.requests([name])
        engine.add_request("release", prompt, params)
        engine.step()
        (request,) = scheduler.running
        held, needed = idle - pool.get_num_free_blocks(), -(-request.num_tokens_with_spec // scheduler.block_size)
        report: dict[str, Any] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                report = (output.kv_transfer_params or {}).get("dvlm", {})
        while scheduler.has_requests():  # the worker hears of the end with the next step
            engine.step()
        before = report.get("kv_blocks_before", 0)
        detail = (
            f"{before} blocks before the first step, {held} after it, {idle - pool.get_num_free_blocks()} at the end"
        )
        if held != needed or not held < before or idle != pool.get_num_free_blocks():
            return FAIL, f"{detail}; {needed} are needed", REPORT
        return PASS, detail, ""

    def sync(self) -> tuple[str, str, str]:
        """Places of this package that make the host wait for the GPU in a step."""
        import torch

        if self.runner.device.type != "cuda":
            return NOT_HERE, "no GPU to wait for", ""
        return check_sync(self.runner, self._generate_every_kind, torch.cuda.set_sync_debug_mode)

    def _generate_every_kind(self) -> None:
        """The recorded runs, every pruning method and a run with a temperature, all in one batch."""
        from vllm_dvlm.pruning.names import METHODS

        requests = self.requests()
        prompt, params = next(each for each in requests if "multi_modal_data" in each[0])
        for method in METHODS:
            own = params.clone()
            own.extra_args = dict(params.extra_args) | {"prune_method": method, "prune_keep_ratio": 0.5}
            requests.append((prompt, own))
        own = params.clone()
        own.temperature, own.seed = 0.7, 1
        prompts, all_params = zip(*[*requests, (prompt, own)], strict=True)
        self.llm.generate(list(prompts), list(all_params), use_tqdm=False)


def run(job: Job, append: Callable[[Row], None]) -> None:
    """Start the engine, then every check of the job; one that raises is a failure of its own."""
    begin = time.perf_counter()
    host = Host(job)
    started = time.perf_counter() - begin
    for check in job.checks:
        begin = time.perf_counter()
        try:
            status, detail, remedy = getattr(host, check)()
        except Exception as error:
            status, detail, remedy = FAIL, f"{type(error).__name__}: {error}", REPORT
        seconds = time.perf_counter() - begin + started
        started = 0.0
        append(Row(f"{job.label}{check}", status, " ".join(detail.split()), remedy, round(seconds, 1)))


def main(argument: str) -> None:
    """Run a job written as JSON."""
    job = Job(**json.loads(argument))

    def append(row: Row) -> None:
        with Path(job.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")

    run(job, append)


if __name__ == "__main__":
    main(sys.argv[1])
