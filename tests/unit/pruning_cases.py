"""The table of pruning methods that every test of methods runs through, and step views to run them on.

A new method gets a row in ``CASES``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_dvlm.pruning import Pruner, StepView, create


@dataclass(frozen=True)
class MethodCase:
    """One method with one setting of its knobs."""

    method: str
    knobs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.method, *map(str, self.knobs.values())])

    def pruner(self) -> Pruner:
        return replace(create(self.method, self.knobs.get("rows")), **self.knobs)


CASES = (
    MethodCase("redvtp"),
    MethodCase("redvtp", {"rows": "committed"}),
    MethodCase("redvtp", {"rows": "response_prompt"}),
    MethodCase("redvtp", {"rows": "all"}),
    MethodCase("fastv"),
    MethodCase("fastv", {"rows": "last"}),
    MethodCase("fastv", {"rows": "response_prompt"}),
    MethodCase("fastv", {"rows": "all"}),
    MethodCase("random"),
    MethodCase("uniform"),
    MethodCase("diversity"),
    MethodCase("diversity", {"num_pivots": 3}),
)


def make_view(
    num_visual: int, canvas_len: int = 6, num_text: int = 9, seed: int = 0, request_seed: int = 11, width: int = 8
) -> StepView:
    """A view with every part: softmax attention of a made-up step, three canvas positions committed."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = canvas_len + num_text + num_visual
    scores = 3 * torch.randn(num_rows, num_rows, generator=generator)
    to_visual = scores.softmax(-1)[:, num_rows - num_visual :]  # rows: canvas, text, visual
    canvas, text, visual = to_visual.split([canvas_len, num_text, num_visual])
    is_committed = torch.zeros(canvas_len, dtype=torch.bool)
    is_committed[torch.randperm(canvas_len, generator=generator)[:3]] = True
    return StepView(
        attention=canvas.contiguous(),
        prompt_attention=text.sum(0),
        visual_attention=visual.sum(0),
        num_prompt_rows=num_text,
        is_masked=~is_committed,
        is_committed=is_committed,
        visual_embeds=torch.randn(num_visual, width, generator=generator),
        visual_places=raster_places(num_visual),
        seed=request_seed,
    )


def raster_places(num: int, row_length: int = 8) -> torch.Tensor:
    """Places of a map row by row, the last row perhaps shorter. [num, 2] int64."""
    index = torch.arange(num)
    return torch.stack([index // row_length, index % row_length], dim=1)


def as_read(view: StepView, pruner: Pruner) -> StepView:
    """The view as the engine gives it: what the method does not read is None."""
    if pruner.reads == "prompt":
        return view
    return replace(
        view,
        attention=None if pruner.reads == "none" else view.attention,
        prompt_attention=None,
        visual_attention=None,
    )


def same_visual_tokens(view: StepView) -> StepView:
    """The view with every visual token a copy of the first."""
    first = [x[..., :1].expand_as(x).contiguous() for x in (view.attention, view.prompt_attention)]
    return replace(
        view,
        attention=first[0],
        prompt_attention=first[1],
        visual_attention=view.visual_attention[:1].expand_as(view.visual_attention).contiguous(),
        visual_embeds=view.visual_embeds[:1].expand_as(view.visual_embeds).contiguous(),
        visual_places=view.visual_places[:1].expand_as(view.visual_places).contiguous(),
    )
