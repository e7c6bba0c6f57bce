"""Rows of attention, which are not requests: a request may be several rows, each with keys of its own.

A family whose prompt attends to itself only is two rows in its first step; behind a layer that shortens requests
the same requests are shorter rows. What a step computes and attends to is decided here, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_dvlm.worker.transfer import to_device

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.utils import AttentionGroup


@dataclass(frozen=True)
class AttentionRows:
    """Rows of one forward pass, in the order of their tokens; on the host.

    request: [rows] int64, index into the batch.
    query_start: [rows + 1] int32, first token of each row.
    kv_len: [rows] int32, keys that a row attends to, from its request's first one on.
    """

    request: np.ndarray
    query_start: np.ndarray
    kv_len: np.ndarray

    @classmethod
    def one_per_request(cls, query_start: np.ndarray, kv_len: np.ndarray) -> AttentionRows:
        """Every request is one row. query_start: [requests + 1], kv_len: [requests], both int32."""
        return cls(np.arange(len(kv_len)), query_start, kv_len)

    @property
    def query_len(self) -> np.ndarray:
        """[rows] int32."""
        return np.diff(self.query_start)

    @property
    def is_one_per_request(self) -> bool:
        """True if rows and requests of the batch are the same."""
        return bool((self.request == np.arange(len(self.request))).all())

    @cached_property
    def first_rows(self) -> np.ndarray:
        """[requests] int64, first row of each request; rows of a request follow each other."""
        return np.flatnonzero(np.diff(self.request, prepend=-1))

    def with_prompts_apart(self, prompt_len: np.ndarray) -> AttentionRows:
        """Rows of whole sequences cut in two: a prompt that attends to itself, and what is behind it and sees all.

        prompt_len: [rows] int32, tokens of the prompt; 0 for rows that stay as they are.
        """
        request, start, kv_len = [], [0], []
        columns = (self.request, self.query_start[1:], self.kv_len, prompt_len)
        for index, end, keys, prompt in zip(*(column.tolist() for column in columns), strict=True):
            if prompt:
                request.append(index)
                start.append(start[-1] + prompt)
                kv_len.append(prompt)
            request.append(index)
            start.append(end)
            kv_len.append(keys)
        return AttentionRows(np.array(request), np.array(start, dtype=np.int32), np.array(kv_len, dtype=np.int32))

    def whole_spans(self) -> list[tuple[int, int, int]] | None:
        """Token ranges of the rows, (first query, end, first key), if all keys are among the step's tokens; else None.

        The keys of a row then end where its queries end.
        """
        starts = self.query_start.tolist()
        is_first = np.diff(self.request, prepend=-1) != 0
        own_first = np.maximum.accumulate(np.where(is_first, np.arange(len(is_first)), 0))
        begin = self.query_start[own_first]
        first_key = self.query_start[1:] - self.kv_len
        if (first_key < begin).any():
            return None
        return list(zip(starts[:-1], starts[1:], first_key.tolist(), strict=True))

    def shortened(self, removed: np.ndarray) -> tuple[AttentionRows, np.ndarray]:
        """The same requests with tokens taken away from their first rows; the rows of a request are a whole sequence.

        Args:
            removed: [requests] int32, tokens that each request loses; 0 for requests that keep all.

        Returns:
            (the rows that are left, [tokens left] int64 tokens whose KV slots they use). A shortened row writes to the
            first slots of its own, so its KV lies where compaction would move it.
        """
        lost = removed[self.request]
        lengths = self.query_len.copy()
        lengths[self.first_rows] -= removed[self.request[self.first_rows]]
        start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        # What is behind a shortened prompt follows it without a gap.
        first = self.query_start[self.first_rows]
        num = np.add.reduceat(lengths, self.first_rows)
        tokens = np.concatenate([q + np.arange(n) for q, n in zip(first, num, strict=True)])
        return AttentionRows(self.request, start, (self.kv_len - lost).astype(np.int32)), tokens


@dataclass
class Segment:
    """Layers behind one that shortens requests: their rows, attention metadata and slots.

    metadata: layer name to attention metadata.
    slots: layer name to slot mapping of the remaining tokens.
    """

    rows: AttentionRows
    metadata: dict[str, Any]
    slots: dict[str, torch.Tensor]


@dataclass(frozen=True)
class MetadataBuilder:
    """vLLM's attention metadata for rows of one batch; the fields are what ``ModelState.prepare_attn`` is given."""

    input_batch: InputBatch
    block_tables: tuple[torch.Tensor, ...]
    attn_groups: list[list[AttentionGroup]]
    kv_cache_config: KVCacheConfig
    device: torch.device
    max_model_len: int
    for_capture: bool = False
    ubatch_idx: int = 0

    @cached_property
    def scheduled(self) -> AttentionRows:
        """The batch as it is scheduled: every request one row."""
        num_reqs = self.input_batch.num_reqs
        query_start = self.input_batch.query_start_loc_np[: num_reqs + 1]
        return AttentionRows.one_per_request(query_start, self.input_batch.seq_lens_cpu_upper_bound[:num_reqs].numpy())

    def build(self, rows: AttentionRows, slot_mappings: torch.Tensor) -> dict[str, Any]:
        """Metadata by layer name, without a causal mask.

        rows: rows of the batch's requests. slot_mappings: [groups, tokens] KV slots of the rows' tokens.
        """
        from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

        batch, num_rows = self.input_batch, len(rows.request)
        block_tables, is_prefilling = self.block_tables, batch.is_prefilling_np
        if not rows.is_one_per_request:
            index = self._to_device(rows.request)
            block_tables = tuple(table[index] for table in block_tables)
            is_prefilling = is_prefilling[rows.request]
        if rows is self.scheduled:  # on the device already
            query_start, kv_len = batch.query_start_loc[: num_rows + 1], batch.seq_lens
        else:
            query_start, kv_len = self._to_device(rows.query_start), self._to_device(rows.kv_len)
        lengths = torch.from_numpy(rows.kv_len)
        return build_attn_metadata(
            attn_groups=self.attn_groups,
            num_reqs=num_rows,
            num_tokens=int(rows.query_start[-1]),
            query_start_loc_gpu=query_start,
            query_start_loc_cpu=torch.from_numpy(rows.query_start),
            max_query_len=int(rows.query_len.max()),
            seq_lens=kv_len,
            max_seq_len=self.max_model_len if self.for_capture else int(rows.kv_len.max()),
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=lengths,
            positions=batch.positions,
            is_prefilling=torch.from_numpy(is_prefilling),
            for_cudagraph_capture=self.for_capture,
            causal=False,
            ubatch_idx=self.ubatch_idx,
        )

    def segment(
        self,
        rows: AttentionRows,
        removed: np.ndarray,
        slot_mappings: torch.Tensor,
        group_of: dict[str, int],
        layers: set[str],
    ) -> Segment:
        """What the layers named ``layers`` run with once the requests of ``rows`` have lost tokens.

        removed: [requests] int32 tokens lost. group_of: layer name to its row of ``slot_mappings``.
        """
        rows, tokens = rows.shortened(removed)
        slots = slot_mappings[:, self._to_device(tokens)]
        metadata = {name: entry for name, entry in self.build(rows, slots).items() if name in layers}
        return Segment(rows, metadata, {name: slots[group_of[name]] for name in metadata})

    def _to_device(self, numbers: np.ndarray) -> torch.Tensor:
        return to_device(numbers, self.device)
