"""Input embeddings of a step: merged prompt embeddings, then the canvas as it is now.

R = requests of the batch, N = its tokens, D = hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dvlm.worker.states import NUM_FIELDS
from vllm_dvlm.worker.transfer import to_device

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_dvlm.worker.shared import WorkerState
    from vllm_dvlm.worker.states import RequestSlot


class StepEmbeddings:
    """Writes the embeddings of each step into one buffer.

    buffer: [most tokens of a step, D]. vLLM's own where it has one; in text-only mode (no images allowed) vLLM has
        none and would feed the model its own token ids, which know nothing of the canvas.
    """

    def __init__(self, state: WorkerState) -> None:
        self.state = state
        if state.supports_mm_inputs:
            self.buffer = state.encoder_runner.inputs_embeds
        else:
            shape = (state.max_num_tokens, state.inputs_embeds_size)
            self.buffer = torch.zeros(shape, dtype=state.dtype, device=state.device)

    def write(self, input_batch: InputBatch) -> torch.Tensor:
        """Embeddings of the step's tokens. [N after padding, D], a view of the buffer."""
        rows: list[np.ndarray] = []
        columns: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        for b, req_idx in enumerate(input_batch.idx_mapping_np.tolist()):
            slot = self.state.slots.get(req_idx)
            if slot is None or slot.is_lost:
                continue
            first, end = input_batch.query_start_loc_np[b : b + 2].tolist()
            start = int(input_batch.num_computed_tokens_np[b])
            prompt_len = slot.plan.prompt_len
            if start < prompt_len:
                if slot.prompt_embeds is None:
                    slot.prompt_embeds = self._embed_prompt(slot)
                self.buffer[first : first + prompt_len - start] = slot.prompt_embeds[start:]
            tail = np.arange(max(start - prompt_len, 0), start + end - first - prompt_len)
            rows.append(np.full(len(tail), req_idx))
            columns.append(tail)
            targets.append(np.arange(end - len(tail), end))
        if rows:
            index = np.stack([np.concatenate(x) for x in (rows, columns, targets)])
            row, column, target = to_device(index, self.state.device)
            ids = self.state.canvases.rows[row, column + NUM_FIELDS]
            self.buffer[target] = self.state.model.embed_input_ids(ids)
        return self.buffer[: input_batch.num_tokens_after_padding]

    def _embed_prompt(self, slot: RequestSlot) -> torch.Tensor:
        """Merged prompt embeddings (golden README point 16), of the survivors once it is pruned. [prompt, D]."""
        ids = to_device(np.array(slot.prompt_token_ids, dtype=np.int64), self.state.device)
        embeds = self.state.model.embed_input_ids(ids)
        if slot.visual_spans:
            cache = self.state.encoder_cache
            for feature in cache.mm_features[slot.req_id]:
                start = feature.mm_position.offset
                visual = cache.encoder_outputs[feature.identifier]
                embeds[start : start + feature.mm_position.length] = visual.to(embeds.dtype)
        return embeds if slot.kept_rows is None else embeds[slot.kept_rows]
