"""Moving kept KV rows to the front, in pages laid out by vLLM's own CPU kernels.

What compaction must leave is written by vLLM's operator itself, so neither the probed layout nor the gather is
trusted.
"""

from types import SimpleNamespace

import pytest
import torch

from vllm_dvlm.kv.compaction import KeyRotation, compact_rows, read_rows_reference
from vllm_dvlm.kv.layout import probe_cpu_layout
from vllm_dvlm.kv.release import release_tail

# Layouts that vLLM's CPU kernels may know; which of them work here is asked of the operator.
ISAS = ("amx", "vec", "vec16", "neon", "rvv", "vsx", "vxe")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_BLOCKS, NUM_HEADS, BASE, MAX_POSITION = 24, 3, 500000.0, 512


def write(cache, keys, values, slots, isa):
    """vLLM's own write of rows [K, H, D] to KV slots."""
    from vllm import _custom_ops as ops

    pages = cache.view(*cache.shape[:2], 2 * cache.shape[2], -1)
    key_cache, value_cache = pages.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys, values, key_cache, value_cache, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )


def available_isas(dtype, block_size, head_size):
    """Layouts that work here, the one that vLLM chooses by itself among them."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    found = []
    for isa in ISAS:
        if isa in ("amx", "vec") and block_size % 32:
            continue  # these kernels take whole tiles
        cache = torch.zeros(1, 1, block_size, 2 * head_size, dtype=dtype)
        row = torch.ones(1, 1, head_size, dtype=dtype)
        try:
            write(cache, row, row, torch.zeros(1, dtype=torch.int64), isa)
        except RuntimeError:
            continue
        found.append(isa)
    assert _get_attn_isa(dtype, block_size, head_size) in found
    return found


def random_request(seed, dtype, block_size, head_size):
    """A filled cache, a request's blocks in it, its rows and those that survive."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    num_rows = int(torch.randint(3 * block_size, 6 * block_size + 1, (1,), generator=generator))
    block_ids = torch.randperm(NUM_BLOCKS, generator=generator)[: -(-num_rows // block_size)].int()
    keys, values = normal(num_rows, NUM_HEADS, head_size), normal(num_rows, NUM_HEADS, head_size)
    share = torch.rand(1, generator=generator)
    kept = (torch.rand(num_rows, generator=generator) < share).nonzero()[:, 0]
    if not len(kept):
        kept = torch.tensor([num_rows - 1])
    rest = normal(NUM_BLOCKS * block_size, NUM_HEADS, head_size)
    return SimpleNamespace(**locals())


def slots_of(request, rows):
    return request.block_ids[rows // request.block_size].long() * request.block_size + rows % request.block_size


def filled_cache(request, isa):
    """Other requests' rows everywhere, this request's rows in its own blocks."""
    shape = (NUM_BLOCKS, NUM_HEADS, request.block_size, 2 * request.head_size)
    cache = torch.zeros(shape, dtype=request.dtype)
    write(cache, request.rest, request.rest.flip(0), torch.arange(len(request.rest)), isa)
    write(cache, request.keys, request.values, slots_of(request, torch.arange(request.num_rows)), isa)
    return cache


def rotary(width, dtype):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        return get_rope(
            width,
            MAX_POSITION,
            is_neox_style=True,
            rope_parameters={"rope_type": "default", "rope_theta": BASE},
            dtype=dtype,
        )


def rotated(rope, keys, positions):
    """Keys [K, H, D] after vLLM's rotary embedding at positions; channels behind its width stay."""
    width = rope.rotary_dim
    part = keys[..., :width].flatten(1).clone()
    _, turned = rope.forward_native(positions, part.clone(), part)
    return torch.cat([turned.view(*keys.shape[:2], width), keys[..., width:]], dim=-1)


combinations = pytest.mark.parametrize(
    "dtype, block_size, head_size",
    [(d, b, h) for d in DTYPES for b in (16, 32, 64) for h in (32, 64, 80, 128)],
)


@combinations
def test_moved_rows_are_bit_equal(dtype, block_size, head_size):
    """The cache as if vLLM had written the survivors to the first rows; everything else untouched."""
    dtype = DTYPES[dtype]
    for isa in available_isas(dtype, block_size, head_size):
        layout = probe_cpu_layout(block_size, head_size, isa, dtype)
        for seed in range(3):
            request = random_request(seed, dtype, block_size, head_size)
            kept = request.kept
            cache, expected = filled_cache(request, isa), filled_cache(request, isa)
            write(expected, request.keys[kept], request.values[kept], slots_of(request, torch.arange(len(kept))), isa)
            compact_rows(cache, layout, request.block_ids, kept, None)
            assert torch.equal(cache, expected), (isa, seed)
            keys, values = read_rows_reference(cache, layout, request.block_ids, len(kept))
            assert torch.equal(keys, request.keys[kept]) and torch.equal(values, request.values[kept])


@combinations
def test_rotated_keys_are_those_of_the_new_position(dtype, block_size, head_size):
    """As if the model had computed them at their new places; values bit-equal, nothing else changed.

    In bfloat16 the keys were rounded when they were written, and are again: two roundings against one.
    """
    dtype = DTYPES[dtype]
    width = head_size - 16  # heads are padded to the kernels' sizes
    rope = rotary(width, torch.float32)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    for isa in available_isas(dtype, block_size, head_size):
        layout = probe_cpu_layout(block_size, head_size, isa, dtype)
        request = random_request(7, dtype, block_size, head_size)
        kept, new = request.kept, torch.arange(len(request.kept))
        plain = request.keys.float()
        request.keys = rotated(rope, plain, torch.arange(request.num_rows)).to(dtype)
        expected_keys = rotated(rope, plain[kept], new).to(dtype)
        cache, before = filled_cache(request, isa), filled_cache(request, isa)
        table = rope.cos_sin_cache
        compact_rows(cache, layout, request.block_ids, kept, KeyRotation.between(table[kept], table[: len(kept)]))
        keys, values = read_rows_reference(cache, layout, request.block_ids, len(kept))
        assert torch.equal(values, request.values[kept])
        assert torch.equal(keys[..., width:], expected_keys[..., width:])
        size = expected_keys.float().norm(dim=-1, keepdim=True).clamp(min=1)
        assert ((keys.float() - expected_keys.float()).abs() / size).max() <= tolerance
        assert not torch.allclose(keys.float(), request.keys[kept].float(), atol=0.1)  # they did turn
        write(cache, request.keys[new], request.values[new], slots_of(request, new), isa)
        assert torch.equal(cache, before), "rows beyond the survivors were changed"


def test_rotation_at_far_positions():
    """The table is rounded to float32, so angles are off by 2e-4 at 4,000; the result follows the table."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(64, 16384, is_neox_style=True, rope_parameters={"rope_type": "default", "rope_theta": BASE})
    keys = torch.randn(200, 2, 64, generator=torch.Generator().manual_seed(0))
    old = torch.arange(200) * 80 + 37
    new = torch.arange(200) * 11
    table = rope.cos_sin_cache.float()
    found = KeyRotation.between(table[old], table[new]).apply(rotated(rope, keys, old))
    assert (found - rotated(rope, keys, new)).abs().max() <= 1e-5
    assert torch.allclose(KeyRotation.between(table[old], table[old]).apply(keys), keys, atol=1e-6)


def test_keeping_everything_changes_nothing():
    request = random_request(3, torch.float32, 32, 32)
    layout = probe_cpu_layout(32, 32, "vec", torch.float32)
    cache, before = filled_cache(request, "vec"), filled_cache(request, "vec")
    compact_rows(cache, layout, request.block_ids, torch.arange(request.num_rows), None)
    assert torch.equal(cache, before)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_of_the_gpu_backends(dtype, order, turns):
    """Written here by indexing: key, then value, in the last dimension. NHD is vLLM's default memory order on GPUs."""
    request = random_request(1, dtype, 16, 40)
    kept, num_kept = request.kept, len(request.kept)
    table = torch.randn(request.num_rows, 32, generator=torch.Generator().manual_seed(0))
    rotation = KeyRotation.between(table[kept], table[:num_kept]) if turns else None

    def fill(rows, keys, values, cache):
        slots = slots_of(request, rows)
        cache[slots // 16, slots % 16] = torch.cat([keys, values], dim=-1)

    cache = torch.cat([request.rest, request.rest.flip(0)], dim=-1).view(NUM_BLOCKS, 16, NUM_HEADS, 80)
    fill(torch.arange(request.num_rows), request.keys, request.values, cache)
    expected = cache.clone()
    expected_keys = rotation.apply(request.keys[kept]) if turns else request.keys[kept]
    fill(torch.arange(num_kept), expected_keys, request.values[kept], expected)
    pages = cache.transpose(1, 2)  # [blocks, heads, block, 2 * head size]
    if order == "HND":
        pages = pages.contiguous()
    compact_rows(pages, None, request.block_ids, kept, rotation)
    assert torch.equal(pages, expected.transpose(1, 2))
    keys, values = read_rows_reference(pages, None, request.block_ids, num_kept)
    assert torch.equal(keys, expected_keys) and torch.equal(values, request.values[kept])


def test_packed_pages_must_lie_together():
    """Rows written to a copy of the cache would be lost without a word."""
    request = random_request(1, torch.float32, 32, 32)
    pages = torch.zeros(NUM_BLOCKS, 32, NUM_HEADS, 64).transpose(1, 2)
    with pytest.raises(RuntimeError, match="view"):
        compact_rows(pages, probe_cpu_layout(32, 32, "vec", torch.float32), request.block_ids, request.kept, None)


def test_layout_that_is_no_permutation(monkeypatch):
    from vllm import _custom_ops as ops

    def forgetful(key, value, key_cache, value_cache, *args, **kwargs):
        key_cache.copy_(key.view(key_cache.shape))

    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", forgetful)
    with pytest.raises(RuntimeError, match="not a permutation of rows"):
        probe_cpu_layout.__wrapped__(32, 32, "vec", torch.float32)


# -- giving blocks back ----------------------------------------------------------------------------------------


def make_manager(num_blocks=40, block_size=16):
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=32, dtype=torch.float32, non_causal=True)
    config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    return KVCacheManager(
        config, max_model_len=640, scheduler_block_size=block_size, hash_block_size=block_size, enable_caching=False
    )


def allocate(manager, request_id, num_tokens):
    from vllm import SamplingParams
    from vllm.v1.request import Request

    request = Request(request_id, list(range(num_tokens)), SamplingParams(max_tokens=1), None)
    assert manager.allocate_slots(request, num_tokens) is not None
    return request


@pytest.mark.parametrize("num_left", [1, 15, 16, 17, 160, 161, 320])
def test_release_gives_the_tail_back_once(num_left):
    manager = make_manager()
    pool = manager.block_pool
    idle = pool.get_num_free_blocks()
    request, other = allocate(manager, "a", 320), allocate(manager, "b", 40)
    (owner,) = manager.coordinator.single_type_managers
    blocks, others = list(owner.req_to_blocks["a"]), list(owner.req_to_blocks["b"])
    needed = -(-num_left // 16)
    assert release_tail(manager, "a", num_left) == 20 - needed
    assert owner.req_to_blocks["a"] == blocks[:needed] and owner.req_to_blocks["b"] == others
    assert pool.get_num_free_blocks() == idle - needed - 3
    assert release_tail(manager, "a", num_left) == 0
    manager.free(request)
    manager.free(other)
    assert pool.get_num_free_blocks() == idle
