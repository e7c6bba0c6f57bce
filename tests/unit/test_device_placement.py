"""What runs on the device in a step, on torch's device "meta": not the host, like a GPU.

Its tensors have a shape but no values. An operation that mixes devices fails on them, and so does one that needs a
value on the host, for which a GPU would have to be waited for. What is computed, other tests say.
"""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_dvlm.denoise.confidence import CONFIDENCE, choose_tokens, forbid, greedy_low_confidence, join_parts
from vllm_dvlm.denoise.noise import row_keys
from vllm_dvlm.denoise.step import Canvases, candidates, take_step
from vllm_dvlm.kv.compaction import KeyRotation, compact_rows
from vllm_dvlm.pruning import StepView, create, names
from vllm_dvlm.pruning.select import kept_prompt_rows, select

# Requests, canvas positions, visual tokens, prompt tokens, channels.
R, C, N, P, D = 3, 12, 40, 50, 16
META = torch.device("meta")


def canvases():
    numbers = {f.name: torch.zeros(R, dtype=torch.int64, device=META) for f in dataclasses.fields(Canvases)}
    return Canvases(**numbers | {"tokens": torch.zeros(R, C, dtype=torch.int64, device=META)})


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + torch.zeros(R),
        lambda x: torch.where(x > 0, torch.zeros(R), x),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
    ],
)
def test_the_check_itself(wrong):
    with pytest.raises((RuntimeError, NotImplementedError)):
        wrong(torch.zeros(R, device=META))


def test_step():
    state = canvases()
    confidence = torch.zeros(R, C, dtype=torch.float64, device=META)
    stop_ids = torch.zeros(R, 2, dtype=torch.int64, device=META)
    threshold = torch.zeros(R, dtype=torch.float64, device=META)
    out = take_step(state, state.tokens, confidence, threshold, stop_ids, mask_token_id=7)
    tensors = [*vars(out.canvases).values(), *(v for v in vars(out).values() if isinstance(v, torch.Tensor))]
    tensors += candidates(out.canvases, mask_token_id=7)
    assert len(tensors) >= 18 and {t.device.type for t in tensors} == {"meta"}


def test_confidence():
    logits = forbid(torch.zeros(C, 100, device=META), torch.zeros(2, dtype=torch.int64, device=META))
    tokens = logits.argmax(dim=-1)
    for measure in CONFIDENCE.values():
        assert measure(logits, tokens).is_meta
    assert all(t.is_meta for t in greedy_low_confidence(logits))
    assert choose_tokens(logits, 1.0, row_keys(0, 0, tokens)).is_meta
    parts = torch.zeros(3, 2, C, dtype=torch.float64, device=META)
    assert all(t.is_meta for t in join_parts(*parts))


class Launches(TorchDispatchMode):
    """Counts operations, each of which is a launch or more on a GPU."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num += torch._C.Tag.inplace_view not in function.tags and "view" not in str(function)
        return function(*args, **kwargs or {})


def test_launches_do_not_grow_with_rows():
    """512 rows with a temperature were 5,121 operations when each row drew its own noise."""

    def launches(num_rows):
        logits = torch.zeros(num_rows, 100, device=META)
        positions = torch.zeros(num_rows, dtype=torch.int64, device=META)
        with Launches() as counted:
            choose_tokens(logits, 1.0, row_keys(0, 0, positions))
        return counted.num

    assert launches(512) == launches(2) < 50


@pytest.mark.parametrize("method", names.METHODS)
def test_pruning(method):
    rows = [rows for rows in names.ROWS if allows(method, rows)] or [None]
    flags = torch.zeros(C, dtype=torch.bool, device=META)
    view = StepView(
        attention=torch.zeros(C, N, device=META),
        prompt_attention=torch.zeros(N, device=META),
        visual_attention=torch.zeros(N, device=META),
        num_prompt_rows=P - N,
        is_masked=flags,
        is_committed=~flags,
        visual_embeds=torch.zeros(N, D, device=META),
        visual_places=torch.zeros(N, 2, dtype=torch.int64),
        seed=1,
    )
    visual, text = torch.arange(N, device=META), torch.arange(N, P, device=META)
    for choice in rows:
        kept = select(create(method, choice).importance(view), keep_count=9)
        survivors = kept_prompt_rows(P, visual, kept, text)
        assert survivors.is_meta and survivors.shape == (P - N + 9,)


def allows(method, rows):
    try:
        create(method, rows)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("rotate", [False, True])
def test_compaction(rotate):
    kept = torch.zeros(20, dtype=torch.int64, device=META)
    table = torch.zeros(64, D, device=META)
    rotation = KeyRotation.between(table[kept], table[: len(kept)]) if rotate else None
    cache = torch.zeros(8, 2, 16, 2 * D, dtype=torch.bfloat16, device=META)
    compact_rows(cache, None, torch.zeros(8, dtype=torch.int32, device=META), kept, rotation)
    assert cache.is_meta
