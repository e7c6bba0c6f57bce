"""What the parts of a worker may ask of the whole: its request slots and what is fixed at start-up.

``model_state.DiffusionModelState`` is the one class that has all of it; the parts know only this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import ModelConfig
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache

    from vllm_dvlm.checkpoint.configuration import TokenIds
    from vllm_dvlm.families import Family
    from vllm_dvlm.models.forward_plan import ForwardPlan
    from vllm_dvlm.settings import ServerSettings
    from vllm_dvlm.worker.states import CanvasStates, RequestSlot
    from vllm_dvlm.worker.step_batch import StepBatch


class WorkerState(Protocol):
    """State of one worker, as its parts see it.

    slots: by request index. step: the current step, from ``prepare_inputs`` to the sampler. group_of: layer name to KV
    cache group. pruner: ``pruning.StepPruner``.
    """

    device: torch.device
    dtype: torch.dtype
    model: nn.Module
    model_config: ModelConfig
    family: Family
    settings: ServerSettings
    token_ids: TokenIds
    max_num_reqs: int
    max_num_tokens: int
    inputs_embeds_size: int
    supports_mm_inputs: bool
    num_layers: int
    num_heads: int
    canvases: CanvasStates
    slots: dict[int, RequestSlot]
    step: StepBatch | None
    forward_plan: ForwardPlan
    block_tables: BlockTables | None
    group_of: dict[str, int]
    encoder_cache: EncoderCache | None
    encoder_runner: Any
    pruner: Any

    def num_kv_blocks(self, req_idx: int) -> int:
        """KV blocks that the request holds, over all KV cache groups."""
        ...
