"""Run vLLM's Triton kernels under the interpreter against our stand-ins, on random inputs.

Run by test_cpu_torch_kernels.py in a process of its own with TRITON_INTERPRET=1, which Triton reads
when a kernel is defined. Prints one line per case: "<name> ok" or "<name> <what differs>".
"""

import copy
import sys
import traceback

import numpy as np
import torch
import vllm.v1.worker.cpu.shm  # noqa: F401  (vLLM's own CPU substitutions, as in a CPU worker)
from vllm.v1.worker.gpu import block_table, buffer_utils, input_batch

from vllm_dvlm.patches.vllm import cpu_torch_kernels as ours

NUM_SLOTS, MAX_LEN, CANVAS, LOOKAHEAD = 9, 96, 16, 2


def random_batch(rng):
    """Tensors of a random step: prefilling, decoding and refreshing requests mixed."""
    num_reqs = int(rng.integers(1, NUM_SLOTS))
    idx = rng.permutation(NUM_SLOTS)[:num_reqs]
    query_lens = rng.integers(CANVAS + 1, 40, num_reqs)
    computed = np.zeros(NUM_SLOTS, np.int32)
    computed[idx] = [rng.integers(0, MAX_LEN - q) for q in query_lens]
    prefill = rng.integers(1, MAX_LEN, NUM_SLOTS)
    starts = np.full(NUM_SLOTS + 1, query_lens.sum())
    starts[0] = 0
    starts[1 : num_reqs + 1] = query_lens.cumsum()
    num_logits = rng.integers(1, CANVAS + 1, num_reqs)
    int32 = lambda x: torch.tensor(np.asarray(x), dtype=torch.int32)  # noqa: E731
    return {
        "idx_mapping": torch.tensor(idx, dtype=torch.int64),
        "query_start_loc": int32(starts),
        "num_computed_tokens": int32(computed),
        "prefill_len": int32(prefill),
        "all_token_ids": int32(rng.integers(0, 999, (NUM_SLOTS, MAX_LEN))),
        "input_ids": torch.full((512,), -7, dtype=torch.int32),
        "positions": torch.full((512,), -7, dtype=torch.int64),
        "seq_lens": torch.full((NUM_SLOTS,), -7, dtype=torch.int32),
        "next_prefill_tokens": torch.full((LOOKAHEAD, NUM_SLOTS), -7, dtype=torch.int32),
        "last_sampled": torch.tensor(rng.integers(0, 999, (NUM_SLOTS, 1))),
        "drafts": torch.tensor(rng.integers(0, 999, (NUM_SLOTS, CANVAS))),
        "cu_num_logits": int32(np.concatenate([[0], num_logits.cumsum()])),
        "total_len": int32(rng.integers(0, MAX_LEN - CANVAS, NUM_SLOTS)),
    }


def both(names, batch, theirs, mine):
    """Call both on deep copies; [(name, theirs, ours)] for the tensors written and returned."""
    outs = []
    for function in (theirs, mine):
        b = copy.deepcopy(batch)
        result = function(b)
        result = () if result is None else result if isinstance(result, tuple) else (result,)
        outs.append([b[n] for n in names] + list(result))
    labels = list(names) + [f"return[{i}]" for i in range(len(outs[0]) - len(names))]
    return list(zip(labels, *outs, strict=True))


def case_prepare_prefill_inputs(rng):
    def call(module):
        return lambda b: module.prepare_prefill_inputs(
            b["input_ids"],
            b["next_prefill_tokens"],
            b["idx_mapping"],
            b["query_start_loc"],
            b["all_token_ids"],
            b["prefill_len"],
            b["num_computed_tokens"],
        )

    names = ("input_ids", "next_prefill_tokens")
    return both(names, random_batch(rng), call(input_batch), call(ours))


def case_prepare_pos_seq_lens(rng):
    def call(module):
        return lambda b: module.prepare_pos_seq_lens(
            b["idx_mapping"],
            b["query_start_loc"],
            b["num_computed_tokens"],
            b["positions"],
            b["seq_lens"],
        )

    return both(("positions", "seq_lens"), random_batch(rng), call(input_batch), call(ours))


def case_combine_sampled_and_draft_tokens(rng):
    num_new = int(rng.integers(0, 2))

    def call(module):
        def run(b):
            ours.prepare_pos_seq_lens(
                b["idx_mapping"],
                b["query_start_loc"],
                b["num_computed_tokens"],
                b["positions"],
                b["seq_lens"],
            )
            return module.combine_sampled_and_draft_tokens(
                b["input_ids"],
                b["idx_mapping"],
                b["last_sampled"],
                b["query_start_loc"],
                b["seq_lens"],
                b["prefill_len"],
                b["drafts"],
                b["cu_num_logits"],
                int(b["cu_num_logits"][-1]),
                num_new,
            )

        return run

    return both(("input_ids",), random_batch(rng), call(input_batch), call(ours))


def case_expand_idx_mapping(rng):
    def call(module):
        return lambda b: module.expand_idx_mapping(
            b["idx_mapping"], int(b["cu_num_logits"][-1]), b["cu_num_logits"], CANVAS
        )

    return both((), random_batch(rng), call(input_batch), call(ours))


def case_post_update(rng):
    batch = random_batch(rng)
    num_reqs = len(batch["idx_mapping"])
    batch["idx_mapping"][rng.random(num_reqs) < 0.2] = -1
    batch["sampled"] = torch.tensor(rng.integers(0, 50, (num_reqs, CANVAS)))
    # No step samples more than the canvas; a step without a token is legal.
    batch["num_sampled"] = torch.tensor(rng.integers(0, CANVAS + 1, num_reqs), dtype=torch.int32)
    batch["num_rejected"] = torch.tensor(rng.integers(0, 60, num_reqs), dtype=torch.int32)
    batch["bins"] = torch.zeros(NUM_SLOTS, 50, dtype=torch.int32) if rng.random() < 0.5 else None
    if rng.random() < 0.3:
        batch["query_start_loc"] = None

    def call(module):
        return lambda b: module.post_update(
            b["idx_mapping"],
            b["num_computed_tokens"],
            b["last_sampled"],
            b["bins"],
            b["sampled"],
            b["num_sampled"],
            b["num_rejected"],
            b["query_start_loc"],
            b["all_token_ids"],
            b["total_len"],
        )

    names = ["num_computed_tokens", "last_sampled", "all_token_ids", "total_len"]
    names += ["bins"] if batch["bins"] is not None else []
    return both(names, batch, call(input_batch), call(ours))


def random_tables(rng, num_groups, enabled=None):
    tables = block_table.BlockTables(
        block_sizes=[4, 16, 8][:num_groups],
        max_num_reqs=NUM_SLOTS,
        max_num_batched_tokens=512,
        max_num_blocks_per_group=[40, 12, 20][:num_groups],
        device=torch.device("cpu"),
        slot_mapping_enabled=enabled,
    )
    for group in range(num_groups):
        table = tables.block_tables[group].gpu
        table.copy_(torch.tensor(rng.integers(0, 999, table.shape)))
        tables.num_blocks.np[group] = rng.integers(0, table.shape[1] + 1, NUM_SLOTS)
        tables.input_block_tables[group].fill_(-7)
    tables.num_blocks.copy_to_uva()
    return tables


def case_gather_block_tables(rng):
    idx = random_batch(rng)["idx_mapping"]
    padded = int(rng.integers(len(idx), NUM_SLOTS + 1))
    tables = random_tables(rng, int(rng.integers(1, 4)))
    theirs = [t.clone() for t in tables.gather_block_tables(idx, padded)]
    for table in tables.input_block_tables:
        table.fill_(-7)
    mine = ours.gather_block_tables(tables, idx, padded)
    return [(f"group {g}", a, b) for g, (a, b) in enumerate(zip(theirs, mine, strict=True))]


def case_compute_slot_mappings(rng):
    batch = random_batch(rng)
    idx, starts = batch["idx_mapping"], batch["query_start_loc"]
    ours.prepare_pos_seq_lens(idx, starts, batch["num_computed_tokens"], batch["positions"], batch["seq_lens"])
    idx[rng.random(len(idx)) < 0.2] = -1
    num_groups = int(rng.integers(1, 4))
    enabled = None if rng.random() < 0.5 else [bool(rng.random() < 0.7) for _ in range(num_groups)]
    tables = random_tables(rng, num_groups, enabled)
    results = []
    for function in (block_table.BlockTables.compute_slot_mappings, ours.compute_slot_mappings):
        tables.slot_mappings.fill_(-7)
        returned = function(tables, idx, starts, batch["positions"], 500)
        results.append((returned.clone(), tables.slot_mappings.clone()))
    return list(zip(("return[0]", "buffer"), *results, strict=True))


def staged(rng, size, dtype):
    tensor = buffer_utils.StagedWriteTensor(size, dtype=dtype, device=torch.device("cpu"))
    for _ in range(int(rng.integers(0, 6))):
        if isinstance(size, int):
            tensor.stage_write_elem(int(rng.integers(0, size)), int(rng.integers(0, 99)))
        else:
            start, count = int(rng.integers(0, size[1])), int(rng.integers(0, size[1]))
            values = rng.integers(0, 99, min(count, size[1] - start)).tolist()
            tensor.stage_write(int(rng.integers(0, size[0])), start, values)
    return tensor


def case_apply_write(rng):
    dtype = [torch.int32, torch.int64, torch.float32][int(rng.integers(0, 3))]
    size = NUM_SLOTS if rng.random() < 0.4 else (NUM_SLOTS, 30)
    theirs = staged(rng, size, dtype)
    mine = copy.deepcopy(theirs)
    buffer_utils.StagedWriteTensor.apply_write(theirs)
    ours.apply_write(mine)
    left = torch.tensor([len(t._staged_write_cu_lens) for t in (theirs, mine)])
    return [("data", theirs.gpu, mine.gpu), ("left over", left[:1], left[1:])]


def case_apply_fused_writes(rng):
    theirs = [staged(rng, (NUM_SLOTS, width), torch.int32) for width in (40, 12, 20)]
    mine = copy.deepcopy(theirs)
    writer = buffer_utils.FusedStagedWriter(torch.device("cpu"), 64)
    pointers = torch.tensor([t.gpu.data_ptr() for t in theirs], dtype=torch.uint64)
    strides = torch.tensor([t.gpu.stride(0) for t in theirs])
    buffer_utils.FusedStagedWriter.apply(writer, theirs, pointers, strides)
    ours.apply_fused_writes(writer, mine, None, None)
    return [(f"group {g}", a.gpu, b.gpu) for g, (a, b) in enumerate(zip(theirs, mine, strict=True))]


def main(num_rounds: int) -> None:
    for name, case in sorted(globals().items()):
        if not name.startswith("case_"):
            continue
        problem = "ok"
        for seed in range(num_rounds):
            try:
                results = case(np.random.default_rng(seed))
            except Exception:
                problem = f"seed {seed} raised {traceback.format_exc()!r}"
                break
            differing = [n for n, a, b in results if a.dtype != b.dtype or not torch.equal(a, b)]
            if differing:
                problem = f"seed {seed} differs in {differing}"
                break
        print(name.removeprefix("case_"), problem, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
