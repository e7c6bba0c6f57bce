"""A KV cache group of its own for the layers behind ``prune_layer``.

LLaDA-FastV prunes inside the first step: layers behind ``prune_layer`` never see the dropped tokens, so blocks for
them need not even be allocated. That takes two groups of layers with block tables of their own. vLLM pads all groups
to the same number of layers, so the split is used only where both halves are nearly equal (``late_group_start``);
elsewhere there is one group, and the tail is released after the step.

Importing this module registers the two kinds of layers with vLLM; pickled specs import it in every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


@dataclass(frozen=True, kw_only=True)
class EarlyLayersSpec(FullAttentionSpec):
    """Layers that see the whole prompt in the first step."""

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Join layers of the same kind only; vLLM would otherwise join any two kinds of full attention."""
        assert all(type(spec) is cls for spec in specs), "early and late layers have block tables of their own"
        return super().merge(specs)


@dataclass(frozen=True, kw_only=True)
class LateLayersSpec(FullAttentionSpec):
    """Layers that never see the tokens that are pruned at the server's ``prune_layer``.

    No subclass of the early kind: vLLM groups a kind with its subclasses.
    """

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """As for early layers."""
        assert all(type(spec) is cls for spec in specs), "early and late layers have block tables of their own"
        return super().merge(specs)


class LateLayersManager(FullAttentionManager):
    """Allocates for the pruned length from admission on.

    removed: request id to tokens that its late layers never see, as long as the scheduler counts the request at full
        length. The scheduler sets and clears it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.removed: dict[str, int] = {}

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> int:
        """vLLM's count, for the pruned length."""
        num_tokens -= self.removed.get(request_id, 0)
        return super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        """vLLM's allocation, for the pruned length."""
        return super().allocate_new_blocks(request_id, num_tokens - self.removed.get(request_id, 0), *args, **kwargs)


def layer_spec(spec: FullAttentionSpec, is_late: bool) -> EarlyLayersSpec | LateLayersSpec:
    """``spec`` as an early or late layer, non-causal."""
    kind = LateLayersSpec if is_late else EarlyLayersSpec
    values = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init}
    return kind(**{**values, "non_causal": True})


def set_removed(kv_cache_manager: KVCacheManager, request_id: str, num_tokens: int) -> None:
    """Say how many tokens of a request the late layers never see; 0 forgets it."""
    for manager in kv_cache_manager.coordinator.single_type_managers:
        if isinstance(manager, LateLayersManager):
            if num_tokens:
                manager.removed[request_id] = num_tokens
            else:
                manager.removed.pop(request_id, None)


# vLLM registers its own kinds on first use, and only into an empty table.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(EarlyLayersSpec, FullAttentionManager, EarlyLayersSpec)
KVCacheSpecRegistry.register(LateLayersSpec, LateLayersManager, LateLayersSpec)
