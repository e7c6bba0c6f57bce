"""`vllm-dvlm bench scoring`: what scoring visual tokens costs beside the attention of the same layer, and where the
denominators of its softmax come from: a second pass over all keys, or the attention that ran.

R = canvas positions, T = tokens, H = heads, D = head size, N = visual tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_dvlm.bench.common import Row, add_output_arguments, describe_run, fixed_threads, progress, report

# Tokens, visual tokens, heads, KV heads, head size: the 8B's proportions and the long shape of `bench pruning`.
ON_CPU = ((518, 426, 8, 8, 64), (1297, 1205, 8, 8, 64))
# LLaDA-V 8B with a large picture, LaViDa-Dream 7B.
ON_GPU = ((3800, 3645, 32, 32, 128), (1172, 1008, 28, 4, 128))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_output_arguments(parser)
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--canvas", type=int, default=32, help="rows that score (default 32)")
    parser.add_argument("--repeats", type=int, default=9, help="runs of each, in turns; the median counts (default 9)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--seed", type=int, default=0)


@dataclass(frozen=True)
class Inputs:
    """A layer's queries, keys and values, and what is scored."""

    q: Any
    k: Any
    v: Any
    columns: Any
    canvas: int

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        return [(0, len(self.q), 0)]


Attention = Callable[[Inputs, bool], tuple[Any, Any]]


def _flash(inputs: Inputs, with_lse: bool) -> tuple[Any, Any]:
    """vLLM's FlashAttention; log-sum-exp as [T, H]."""
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    num = len(inputs.q)
    starts = torch.tensor([0, num], dtype=torch.int32, device=inputs.q.device)
    found = flash_attn_varlen_func(
        inputs.q,
        inputs.k,
        inputs.v,
        max_seqlen_q=num,
        cu_seqlens_q=starts,
        max_seqlen_k=num,
        cu_seqlens_k=starts,
        softmax_scale=inputs.scale,
        causal=False,
        return_softmax_lse=with_lse,
    )
    return (found[0].flatten(1), found[1].T) if with_lse else (found.flatten(1), None)


def attentions(device: str) -> dict[str, Attention]:
    """Attention with and without its log-sum-exp, by name."""
    from vllm_dvlm.models import whole_attention

    def torchs(x: Inputs, with_lse: bool) -> tuple[Any, Any]:
        return whole_attention.with_torch(x.q, x.k, x.v, x.spans, x.scale, with_lse=with_lse)

    def xformers(x: Inputs, with_lse: bool) -> tuple[Any, Any]:
        return whole_attention.with_xformers(x.q, x.k, x.v, x.spans, x.scale, with_lse=with_lse)

    return {"torch": torchs} if device == "cpu" else {"flash": _flash, "xformers": xformers}


def make(shape: tuple[int, ...], canvas: int, device: str, seed: int) -> Inputs:
    """Random inputs: float32 on a CPU, bfloat16 on a GPU."""
    import torch

    tokens, visual, heads, kv_heads, size = shape
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, n, size, generator=generator).to(device, dtype) for n in (heads, kv_heads, kv_heads))
    return Inputs(q, k, v, torch.arange(8, 8 + visual, device=device), canvas)


def measure_shape(shape: tuple[int, ...], attention: Attention, arguments: argparse.Namespace, device: str) -> Row:
    """Milliseconds of one layer: attention without and with its log-sum-exp, scoring by a second pass and without."""
    import torch

    from vllm_dvlm.models.probe import attention_to_columns, attention_to_columns_reference

    x = make(shape, arguments.canvas, device, arguments.seed)
    rows = x.q[-x.canvas :]

    def score(lse: Any) -> Any:
        out = torch.zeros(x.canvas, len(x.columns), device=device)
        attention_to_columns(rows, x.k, x.scale, x.columns, out, lse)
        return out

    lse = attention(x, True)[1][-x.canvas :]
    expected = attention_to_columns_reference(rows.cpu(), x.k.cpu(), x.scale, x.columns.cpu())
    error = float(((score(lse).cpu() - expected).abs() / expected).max())
    work: dict[str, Callable[[], Any]] = {
        "attention ms": lambda: attention(x, False),
        "attention + lse ms": lambda: attention(x, True),
        "second pass ms": lambda: score(None),
        "with lse ms": lambda: score(lse),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(arguments.repeats + 1):
        for name, run in work.items():
            times[name].append(_milliseconds(run, device))
    row: Row = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first run is warm-up
    before = row["second pass ms"] / row["attention ms"]
    after = (row["with lse ms"] + row["attention + lse ms"] - row["attention ms"]) / row["attention ms"]
    return row | {"scoring/attention before": before, "scoring/attention with lse": after, "error": error}


def _milliseconds(run: Callable[[], Any], device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begin)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. ValueError for arguments that cannot be met."""
    import torch

    if arguments.repeats < 1 or arguments.canvas < 1:
        raise ValueError("--repeats and --canvas must be at least 1")
    has_gpu = torch.cuda.is_available()
    device = arguments.device or ("cuda" if has_gpu else "cpu")
    if device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: torch sees no GPU here")
    shapes = ON_CPU if device == "cpu" else ON_GPU
    if least := [shape for shape in shapes if shape[0] <= arguments.canvas + 8]:
        raise ValueError(f"--canvas {arguments.canvas} leaves no prompt in a sequence of {least[0][0]}")
    rows: list[Row] = []
    figures: Row = {}
    with torch.inference_mode(), fixed_threads(arguments.threads):
        for shape in progress(shapes, "scoring"):
            named = dict(zip(("tokens", "visual", "heads", "kv heads", "head size"), shape, strict=True))
            for name, attention in attentions(device).items():
                try:
                    found = measure_shape(shape, attention, arguments, device)
                except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
                    rows.append(named | {"attention": name, "note": f"not here: {str(error).splitlines()[0][:60]}"})
                    continue
                rows.append(named | {"attention": name, "note": ""} | found)
                figures[f"scoring_{shape[0]}_{name}_share_before"] = found["scoring/attention before"]
                figures[f"scoring_{shape[0]}_{name}_share_with_lse"] = found["scoring/attention with lse"]
        dtype = "float32" if device == "cpu" else "bfloat16"
        description = describe_run(dtype, arguments.seed, canvas=arguments.canvas)
    if not figures:
        raise RuntimeError("no attention ran: " + "; ".join(row["note"] for row in rows))

    def draw(axes: Any) -> None:
        done = [row for row in rows if not row["note"]]
        names = [f"{row['attention']}, {row['tokens']} tokens" for row in done]
        for offset, column in ((-0.2, "scoring/attention before"), (0.2, "scoring/attention with lse")):
            axes.bar([i + offset for i in range(len(done))], [row[column] for row in done], 0.4, label=column)
        axes.set_xticks(range(len(done)), names)
        axes.set(ylabel="time, times the layer's attention")
        axes.legend()

    report(arguments, rows, figures, description, draw)
    return 0
