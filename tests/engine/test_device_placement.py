"""Sampler and pruning of a step on torch's device "meta": no mixed devices, no value needed on the host.

The classes are the real ones; around them stand only the sizes that they read. tests/unit/test_device_placement.py
shows that the device notices both mistakes.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_dvlm.families import LLADA_V

META = torch.device("meta")
PROMPT, CANVAS, NUM_VISUAL, VOCABULARY, HIDDEN, MASK_ID = 20, 8, 12, 50, 4, 9
NUM_LAYERS, NUM_HEADS, HEAD_SIZE, BLOCK_SIZE = 2, 2, 16, 4
PLAIN = [{}, {"diffusion_refresh_interval": 4}, {"diffusion_threshold": 1.0}, {"diffusion_block_length": 4}]
# fastv chooses between two layers of the forward pass, which needs vLLM's context.
METHODS = ["redvtp", "random", "uniform", "diversity"]
POSITIONS = ["renumber", "keep"]
PRUNED = [
    {"prune_method": method, "prune_positions": positions, "diffusion_refresh_interval": 4}
    for method in METHODS
    for positions in POSITIONS
]


def make_slot(number, options):
    from vllm import SamplingParams

    from vllm_dvlm.placement import resolve
    from vllm_dvlm.settings import ServerSettings
    from vllm_dvlm.steps import VisualSpan
    from vllm_dvlm.worker.states import RequestSlot

    params = resolve(options, CANVAS, ServerSettings(), None)
    plan = params.plan(PROMPT)
    spans = [VisualSpan(4, 4 + NUM_VISUAL)]
    slot = RequestSlot(f"r{number}", params, SamplingParams(temperature=0), plan, [], spans, (3, 4 + number), number)
    slot.pruned_plan = params.pruned_plan(plan, NUM_VISUAL)
    slot.images = [None]
    slot.prompt_embeds = torch.zeros(PROMPT, HIDDEN, device=META)
    return slot


def make_canvases(num_requests):
    """The integers on the device; their mirror on the host is apart, as it is on a GPU."""
    from vllm_dvlm.worker.states import CanvasStates

    states = CanvasStates(num_requests, CANVAS, META)
    states._staging = states._staging.to(META)
    return states


def make_layer(index):
    cache = torch.zeros(64, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, device=META)
    rotary = SimpleNamespace(cos_sin_cache=torch.zeros(64, HEAD_SIZE, device=META))
    attn = SimpleNamespace(kv_cache=cache, layer_name=str(index))
    return SimpleNamespace(self_attn=SimpleNamespace(attn=attn, rotary_emb=rotary, head_dim=HEAD_SIZE))


def make_state(slots):
    """What sampler and pruner read of the model state, with a model of which there are only shapes."""
    from vllm_dvlm.worker.step_batch import StepBatch

    num = len(slots)
    length = PROMPT + CANVAS
    table = torch.zeros(num, length // BLOCK_SIZE + 1, dtype=torch.int32, device=META)
    layers = [make_layer(i) for i in range(NUM_LAYERS)]
    return SimpleNamespace(
        step=StepBatch(
            slots,
            list(range(num)),
            torch.arange(num, device=META),
            CANVAS,
            np.repeat(np.arange(num), CANVAS),
            np.tile(np.arange(CANVAS), num),
            np.full(num, length),
            np.full(num, length),
            np.where(np.arange(num) % 2, -1, 3),
        ),
        family=LLADA_V,
        device=META,
        slots=dict(enumerate(slots)),
        canvases=make_canvases(num),
        token_ids=SimpleNamespace(mask_token_id=MASK_ID, forbidden_token_ids=(1, 2), num_tokens=VOCABULARY - 5),
        settings=SimpleNamespace(logits_chunk_bytes=3 * 4 * VOCABULARY),
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCABULARY, get_hidden_size=lambda: HIDDEN),
        model=SimpleNamespace(
            vocab_logits=lambda hidden: hidden.new_zeros(len(hidden), VOCABULARY),
            model=SimpleNamespace(layers=layers),
        ),
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        group_of={str(i): 0 for i in range(NUM_LAYERS)},
        block_tables=SimpleNamespace(
            block_sizes=[BLOCK_SIZE],
            num_blocks=SimpleNamespace(np=np.full((1, num), length // BLOCK_SIZE)),
            block_tables=[SimpleNamespace(gpu=table)],
        ),
        num_kv_blocks=lambda req_idx: length // BLOCK_SIZE,
    )


def input_batch(slots):
    num = len(slots)
    return SimpleNamespace(
        num_reqs=num,
        req_ids=[slot.req_id for slot in slots],
        idx_mapping_np=np.arange(num),
        query_start_loc_np=np.arange(num + 1) * (PROMPT + CANVAS),
        seq_lens=torch.zeros(num, dtype=torch.int32, device=META),
    )


@pytest.mark.parametrize("all_options", [PLAIN, PRUNED, [*PLAIN, *PRUNED]], ids=["plain", "pruned", "mixed"])
def test_step(all_options, monkeypatch):
    from vllm_dvlm.worker import pruning, sampler
    from vllm_dvlm.worker.sampler import DiffusionSampler

    # There are no process groups here.
    for module in (pruning, sampler):
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)
    slots = [make_slot(i, options) for i, options in enumerate(all_options)]
    state, batch = make_state(slots), input_batch(slots)
    state.pruner = pruner = pruning.StepPruner(state)
    sampler_of_step = DiffusionSampler(state, SimpleNamespace(**dict.fromkeys(VLLM_STATES)))
    pruner.begin(batch)
    assert len(pruner.jobs) == sum(slot.pruned_plan is not None for slot in slots)
    num_tokens = len(slots) * (PROMPT + CANVAS)
    for layer in range(NUM_LAYERS):
        rows = torch.zeros(num_tokens, NUM_HEADS * HEAD_SIZE, device=META)
        pruner.observe(layer, state.model.model.layers[layer].self_attn, rows, rows)
    out = sampler_of_step(torch.zeros(len(slots) * CANVAS, HIDDEN, device=META), batch)
    for tensor in (out.sampled_token_ids, out.num_sampled, out.num_rejected):
        assert tensor.is_meta and len(tensor) == len(slots)
    assert [slot.num_steps for slot in slots] == [1] * len(slots) and not pruner.jobs
    for slot in slots:
        pruned = slot.params.options.prune_method != "none"
        assert slot.pruned_plan is None and (slot.kept_rows is not None) == pruned
        assert slot.prompt_embeds.is_meta and len(slot.prompt_embeds) == slot.plan.prompt_len
        assert slot.plan.prompt_len == PROMPT - pruned * NUM_VISUAL // 2


# Fields of vLLM's sampler that the runner reads through ours.
VLLM_STATES = ("sampling_states", "logprob_token_ids_state", "req_states")
