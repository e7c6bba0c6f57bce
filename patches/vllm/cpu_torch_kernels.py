"""The stand-ins that p001 installs: signature and effect of the functions that they replace.

Loops over requests, not over tokens: at 64 requests of 4,000 tokens a slice per request is faster
than one gather over all tokens. Tensors are the runner's own, written in place through numpy views.

Legend: B = requests in the batch, R = request slots, L = max_model_len, T = max batched tokens.
``idx_mapping`` [B] maps a batch row to its request slot; -1 is a row that owns nothing.
"""

import numpy as np
import torch

PAD_SLOT_ID = -1  # as vllm.v1.attention.backends.utils; a test compares


def prepare_prefill_inputs(
    input_ids: torch.Tensor,  # [T] int32, written
    next_prefill_tokens: torch.Tensor,  # [lookahead, R] int32, written
    idx_mapping: torch.Tensor,  # [B] int64
    query_start_loc: torch.Tensor,  # [>= B + 1] int32
    all_token_ids: torch.Tensor,  # [R, L] int32
    prefill_len: torch.Tensor,  # [R] int32
    num_computed_tokens: torch.Tensor,  # [R] int32
) -> None:
    """Copy the next query's tokens of requests that are still prefilling."""
    ids, following = input_ids.numpy(), next_prefill_tokens.numpy()
    rows = all_token_ids.numpy()
    flat = rows.reshape(-1)
    starts = query_start_loc.tolist()
    lens, computed = prefill_len.numpy(), num_computed_tokens.numpy()
    for row, req_idx in enumerate(idx_mapping.tolist()):
        begin, prefill = int(computed[req_idx]), int(lens[req_idx])
        if begin >= prefill:
            continue
        start, end = starts[row], starts[row + 1]
        # Flat, as the kernel's pointers: a query with a canvas may read past its own row's end.
        offset = req_idx * rows.shape[1] + begin
        tokens = flat[offset : offset + end - start]
        ids[start : start + len(tokens)] = tokens
        ahead = begin + end - start
        for i in range(following.shape[0]):
            following[i, req_idx] = rows[req_idx, ahead + i] if ahead + i < prefill else 0


def prepare_pos_seq_lens(
    idx_mapping: torch.Tensor,  # [B] int64
    query_start_loc: torch.Tensor,  # [>= B + 1] int32
    num_computed_tokens: torch.Tensor,  # [R] int32
    pos: torch.Tensor,  # [T] int64, written
    seq_lens: torch.Tensor,  # [max requests] int32, written, 0 behind row B
) -> None:
    """Positions count on from what is computed; sequence length is their end."""
    idx = idx_mapping.numpy()
    starts = query_start_loc.numpy()[: len(idx) + 1]
    begins = num_computed_tokens.numpy()[idx]
    lens = seq_lens.numpy()
    lens[: len(idx)] = begins + np.diff(starts)
    lens[len(idx) :] = 0
    positions = pos.numpy()
    bounds = starts.tolist()
    for row, begin in enumerate(begins.tolist()):
        start, end = bounds[row], bounds[row + 1]
        positions[start:end] = np.arange(begin, begin + end - start)


def combine_sampled_and_draft_tokens(
    input_ids: torch.Tensor,  # [T] int32, written
    idx_mapping: torch.Tensor,  # [B] int64
    last_sampled_tokens: torch.Tensor,  # [R, 1] int64
    query_start_loc: torch.Tensor,  # [>= B + 1] int32
    seq_lens: torch.Tensor,  # [>= B] int32
    prefill_len: torch.Tensor,  # [R] int32
    draft_tokens: torch.Tensor,  # [R, canvas] int64
    cu_num_logits: torch.Tensor,  # [B + 1] int32
    num_logits: int,
    num_new_sampled_tokens: int = 1,
) -> torch.Tensor:
    """Write the last sampled token and the drafts to the query's tail; return logits rows int64."""
    assert num_new_sampled_tokens in (0, 1), num_new_sampled_tokens
    logits_indices = np.empty(num_logits, dtype=np.int64)
    ids = input_ids.numpy()
    last, drafts = last_sampled_tokens.numpy().reshape(-1), draft_tokens.numpy()
    query_starts, logit_starts = query_start_loc.tolist(), cu_num_logits.tolist()
    lens, prefill = seq_lens.tolist(), prefill_len.numpy()
    for row, req_idx in enumerate(idx_mapping.tolist()):
        first, after = logit_starts[row], logit_starts[row + 1]
        count, query_end = after - first, query_starts[row + 1]
        logits_indices[first:after] = np.arange(query_end - count, query_end)
        if lens[row] <= prefill[req_idx]:
            continue  # prompt tokens only
        if num_new_sampled_tokens and lens[row] - count >= prefill[req_idx]:
            ids[query_end - count] = last[req_idx]
        num_drafts = count - num_new_sampled_tokens
        if num_drafts > 0:
            ids[query_end - num_drafts : query_end] = drafts[req_idx, :num_drafts]
    return torch.from_numpy(logits_indices)


def expand_idx_mapping(
    idx_mapping: torch.Tensor,  # [B] int64
    total_num_logits: int,
    cu_num_logits: torch.Tensor,  # [B + 1] int32
    max_expand_len: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per logits row: request slot (dtype of idx_mapping) and place in its request (int32)."""
    starts = cu_num_logits.numpy()
    counts = np.diff(starts)
    slots = np.repeat(idx_mapping.numpy(), counts)
    places = np.arange(total_num_logits, dtype=np.int32) - np.repeat(starts[:-1], counts)
    return torch.from_numpy(slots), torch.from_numpy(places)


def post_update(
    idx_mapping: torch.Tensor,  # [B] int64
    num_computed_tokens: torch.Tensor,  # [R] int32, written
    last_sampled_tokens: torch.Tensor,  # [R, 1] int64, written
    output_bin_counts: torch.Tensor | None,  # [R, vocabulary] int32, written
    sampled_tokens: torch.Tensor,  # [B, at most canvas + 1] int64
    num_sampled: torch.Tensor,  # [B] int32
    num_rejected: torch.Tensor,  # [B] int32
    query_start_loc: torch.Tensor | None,  # [>= B + 1] int32
    all_token_ids: torch.Tensor,  # [R, L] int32, written
    total_len: torch.Tensor,  # [R] int32, written
) -> None:
    """Append what was sampled to each request and advance its computed length."""
    computed, totals = num_computed_tokens.numpy(), total_len.numpy()
    last, rows = last_sampled_tokens.numpy().reshape(-1), all_token_ids.numpy()
    sampled, counts, rejected = sampled_tokens.numpy(), num_sampled.tolist(), num_rejected.tolist()
    starts = None if query_start_loc is None else query_start_loc.tolist()
    bins = None if output_bin_counts is None else output_bin_counts.numpy()
    for row, req_idx in enumerate(idx_mapping.tolist()):
        if req_idx < 0:
            continue
        if counts[row] > 0:
            tokens = sampled[row, : counts[row]]
            total = int(totals[req_idx])
            rows[req_idx, total : total + counts[row]] = tokens
            last[req_idx] = tokens[-1]
            totals[req_idx] = total + counts[row]
            if bins is not None:
                np.add.at(bins[req_idx], tokens, 1)
        query_len = 0 if starts is None else starts[row + 1] - starts[row]
        computed[req_idx] += query_len - rejected[row]


def gather_block_tables(
    self,  # BlockTables
    idx_mapping: torch.Tensor,  # [B] int64
    num_reqs_padded: int,
    out: tuple[torch.Tensor, ...] | None = None,
    out_ptrs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Each request's KV block ids in batch order.

    Per KV cache group [num_reqs_padded, blocks] int32. Only a row's used columns are written;
    rows behind B are zero.
    """
    out = tuple(self.input_block_tables) if out is None else out
    req_idxs = idx_mapping.tolist()
    for group, target in enumerate(out):
        source, rows = self.block_tables[group].gpu.numpy(), target.numpy()
        counts = self.num_blocks.gpu[group].numpy()
        for row, req_idx in enumerate(req_idxs):
            used = counts[req_idx]
            rows[row, :used] = source[req_idx, :used]
        rows[len(req_idxs) : num_reqs_padded] = 0
    return tuple(target[:num_reqs_padded] for target in out)


def compute_slot_mappings(
    self,  # BlockTables
    idx_mapping: torch.Tensor,  # [B] int64
    query_start_loc: torch.Tensor,  # [>= B + 1] int32
    positions: torch.Tensor,  # [>= tokens] int64
    num_tokens_padded: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """KV slot of each token, per KV cache group [groups, num_tokens_padded] int64.

    PAD_SLOT_ID behind the last token, for rows with index -1, and in groups without slot mapping.
    Raises NotImplementedError under context parallelism.
    """
    if self.cp_size != 1:
        raise NotImplementedError("context parallelism is not supported on a CPU host")
    mappings = self.slot_mappings if out is None else out
    slots_of, pos = mappings.numpy(), positions.numpy()
    starts, req_idxs = query_start_loc.tolist(), idx_mapping.tolist()
    for group, kv_block_size in enumerate(self.block_sizes):
        slots = slots_of[group]
        slots[starts[len(req_idxs)] :] = PAD_SLOT_ID
        table = self.block_tables[group].gpu.numpy()
        enabled = self._slot_mapping_enabled[group]
        for row, req_idx in enumerate(req_idxs):
            start, end = starts[row], starts[row + 1]
            if req_idx < 0 or not enabled:
                slots[start:end] = PAD_SLOT_ID
                continue
            blocks, offsets = np.divmod(pos[start:end], kv_block_size)
            slots[start:end] = table[req_idx, blocks].astype(np.int64) * kv_block_size + offsets
    return mappings[:, :num_tokens_padded]


def apply_write(self) -> None:  # self: StagedWriteTensor
    """Apply and clear the staged writes, each to ``[row, start : start + length]``, in order."""
    if not self._staged_write_indices:
        return
    flat = self.gpu.numpy().reshape(-1)
    stride = self.gpu.stride(0)
    contents = np.asarray(self._staged_write_contents, dtype=flat.dtype)
    begin = 0
    for row, start, end in zip(
        self._staged_write_indices,
        self._staged_write_starts,
        self._staged_write_cu_lens,
        strict=True,
    ):
        offset = row * stride + start
        flat[offset : offset + end - begin] = contents[begin:end]
        begin = end
    self.clear_staged_writes()


def apply_fused_writes(
    self,  # FusedStagedWriter
    tensors,  # Sequence[StagedWriteTensor], one per KV cache group
    output_ptrs: torch.Tensor,
    output_strides: torch.Tensor,
) -> None:
    """Apply and clear the staged writes of several tensors; pointers and strides are not needed."""
    for tensor in tensors:
        apply_write(tensor)
