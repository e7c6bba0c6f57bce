"""LLaDA text backbone with bidirectional attention, in vLLM's parallel layers.

The architecture is Llama's (RMSNorm, rotary embedding in halves, gated SiLU MLP, optional grouped KV heads) without a
causal mask; with ``qkv_bias`` it is Dream's. Source: tests/golden/llada_v/README.md, 'The checkpoint' and point 16, and
tests/golden/lavida/README.md, 'Checkpoint' and 'Model'.

N = tokens of the batch, H = query heads of this rank, D = head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    extract_layer_index,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform

from vllm_dvlm.models import whole_attention
from vllm_dvlm.models.forward_plan import ForwardPlan
from vllm_dvlm.settings import ServerSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


# Rows that a CPU projects at a time: what they widen to stays in the cache, and below the 32 MiB from which glibc hands
# memory back to the system and takes fresh pages each time. 8 prompts of 1,297 rows together would else be slower than
# one after another.
ROWS_AT_A_TIME = 1024


def in_parts(rows: torch.Tensor) -> bool:
    """True if there are more rows ([N, ...]) than should be projected at a time."""
    return rows.is_cpu and len(rows) > ROWS_AT_A_TIME


def padded_head_size(head_size: int) -> int:
    """Smallest head size the platform's attention kernels take that holds ``head_size`` channels.

    Zero channels change neither scores nor outputs, so small heads run in the next larger kernel. The CPU kernels
    exist for fixed sizes only; GPU kernels take multiples of 8.
    """
    if not current_platform.is_cpu():
        return -(-head_size // 8) * 8
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = sorted(CPUAttentionBackend.get_supported_head_sizes())
    for size in sizes:
        if size >= head_size:
            return size
    raise ValueError(f"head size {head_size} is larger than the CPU attention kernels take ({sizes[-1]})")


class BidirectionalAttention(Attention):
    """vLLM's attention layer whose KV cache declares that rows attend to later rows, too."""

    # Set by the layer that owns this: True or False where late layers have a KV cache group of their own.
    is_late: bool | None = None

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """The layer's spec, marked non-causal: the engine core then refuses chunked prefill and prefix caching."""
        spec = super().get_kv_cache_spec(vllm_config)
        if self.is_late is None:
            return dataclasses.replace(spec, non_causal=True)
        from vllm_dvlm.kv.groups import layer_spec

        return layer_spec(spec, self.is_late)


class LLaDAAttention(nn.Module):
    """Self-attention of one layer; masks and lengths come from the step's attention metadata."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.layer_index = extract_layer_index(prefix)
        self.plan = ForwardPlan()
        config = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        tp_size = get_tensor_model_parallel_world_size()
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        self.padded_dim = padded_head_size(self.head_dim)
        self.num_heads = num_heads // tp_size
        self.num_kv_heads = max(1, num_kv_heads // tp_size)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            num_heads,
            num_kv_heads,
            bias=config.attention_bias or config.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * self.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            is_neox_style=True,
        )
        self.attn = BidirectionalAttention(
            self.num_heads,
            self.padded_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        settings = ServerSettings.from_additional_config(vllm_config.additional_config)
        # Steps whose keys are all among their own tokens need not go through the KV cache.
        dtype = vllm_config.model_config.dtype
        self.attend_whole = whole_attention.choose(settings.attention_whole, current_platform.device_type, dtype)
        late = settings.late_group_start()
        self.attn.is_late = None if late is None else self.layer_index >= late

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """positions: [N] int64 rotary positions; hidden_states: [N, hidden]. Returns [N, hidden], or ``rows`` of it."""
        q, k, v = self._project(positions, hidden_states)
        spans, observer, lse = self.plan.whole_spans, self.plan.observer, None
        if spans is not None and self.attend_whole is not None:
            if self.plan.keeps_kv:
                keys, values = (self._pad(x).view(-1, self.num_kv_heads, self.padded_dim) for x in (k, v))
                torch.ops.vllm.unified_kv_cache_update(keys, values, self.attn.layer_name)
            heads = (x.view(len(x), -1, self.head_dim) for x in (q, k, v))
            wants_lse = observer is not None and whole_attention.sums_are_worth_it(self.attend_whole)
            out, lse = self.attend_whole(*heads, spans, self.attn.impl.scale, rows, wants_lse)
            rows = None
        elif self.padded_dim == self.head_dim:
            out = self.attn(q, k, v)
        else:
            out = self.attn(self._pad(q), self._pad(k), self._pad(v))
            out = out.view(-1, self.num_heads, self.padded_dim)[..., : self.head_dim].reshape(q.shape)
        if observer is not None:
            observer.observe(self.layer_index, self, q, k, lse)
        out, _ = self.o_proj(out if rows is None else out[rows])
        return out

    def _project(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys behind the rotary embedding, and values; [N, heads * head size] each."""
        widths = [self.num_heads * self.head_dim, *[self.num_kv_heads * self.head_dim] * 2]
        if not in_parts(hidden_states):
            qkv, _ = self.qkv_proj(hidden_states)
            q, k, v = qkv.split(widths, dim=-1)
            return *self.rotary_emb(positions, q, k), v
        whole = tuple(hidden_states.new_empty(len(hidden_states), width) for width in widths)
        for first in range(0, len(hidden_states), ROWS_AT_A_TIME):
            rows = slice(first, first + ROWS_AT_A_TIME)
            qkv, _ = self.qkv_proj(hidden_states[rows])
            q, k, v = qkv.split(widths, dim=-1)
            for into, part in zip(whole, (*self.rotary_emb(positions[rows], q, k), v), strict=True):
                into[rows] = part
        return whole

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        if self.padded_dim == self.head_dim:
            return x
        return F.pad(x.view(x.shape[0], -1, self.head_dim), (0, self.padded_dim - self.head_dim)).flatten(1)


class LLaDAMLP(nn.Module):
    """Gated SiLU MLP."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act {config.hidden_act!r} is not supported; LLaDA checkpoints use 'silu'")
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, hidden] -> [N, hidden]."""
        if not in_parts(x):
            return self._rows(x)
        out = torch.empty_like(x)
        for first in range(0, len(x), ROWS_AT_A_TIME):
            rows = slice(first, first + ROWS_AT_A_TIME)
            out[rows] = self._rows(x[rows])
        return out

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.gate_up_proj(x)
        x, _ = self.down_proj(self.act_fn(x))
        return x


class LLaDADecoderLayer(nn.Module):
    """Attention and MLP with pre-norms; the residual travels beside the hidden states."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = LLaDAAttention(vllm_config, f"{prefix}.self_attn")
        self.mlp = LLaDAMLP(vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, hidden] and residual of the same shape, None before the first layer; both cut to ``rows`` if given."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states, rows)
        if rows is not None:
            residual = residual[rows]
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class LLaDAModel(nn.Module):
    """Token embedding, layers and final norm."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "embed_tokens"),
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: LLaDADecoderLayer(vllm_config, prefix),
            prefix=maybe_prefix(prefix, "layers"),
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.set_forward_plan(ForwardPlan())

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[N] -> [N, hidden]."""
        return self.embed_tokens(input_ids)

    def forward(self, positions: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """positions: [N] int64; inputs_embeds: [N, hidden]. Returns [N, hidden] after the final norm."""
        hidden_states, residual = inputs_embeds, None
        observer, final_rows = self.plan.observer, self.plan.final_rows
        for index, layer in enumerate(islice(self.layers, self.start_layer, self.end_layer)):
            rows = final_rows if index == self.end_layer - 1 else None
            hidden_states, residual = layer(positions, hidden_states, residual, rows)
            if observer is not None:
                positions, hidden_states, residual = observer.after_layer(index, positions, hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        if final_rows is not None:
            every = hidden_states.new_zeros(inputs_embeds.shape)
            every[final_rows] = hidden_states
            return every
        return hidden_states if observer is None else observer.finish_forward(hidden_states)

    def set_forward_plan(self, plan: ForwardPlan) -> None:
        """Take what the layers must know of each step from ``plan``, which its owner keeps up to date."""
        self.plan = plan
        for layer in self.layers:
            layer.self_attn.plan = plan

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors named as in the checkpoint, without the leading ``model.``."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
