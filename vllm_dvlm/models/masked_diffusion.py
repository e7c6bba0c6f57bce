"""What the model classes of all families share: vision stack, text backbone and output layer.

A family's own class (llada_v.py, lavida.py) says whose it is and what its checkpoints call the parts of the text stack.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_dvlm.checkpoint.configuration import resolve_image_token_id, resolve_token_ids
from vllm_dvlm.checkpoint.processing import TileDummyInputsBuilder, TileMultiModalProcessor, TileProcessingInfo
from vllm_dvlm.families import Family
from vllm_dvlm.models.llada import LLaDAModel
from vllm_dvlm.models.vision import VisionStack

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.model_states.interface import ModelState


# Joined parameters of vLLM's layers -> what they have in a checkpoint.
_JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def _parts(name: str) -> list[str]:
    """Names that a checkpoint has for the weight or bias of a joined layer; empty for all others."""
    layer, _, kind = name.rpartition(".")
    before, _, joined = layer.rpartition(".")
    if kind not in ("weight", "bias") or joined not in _JOINED:
        return []
    return [f"{before}.{part}.{kind}" for part in _JOINED[joined]]


@MULTIMODAL_REGISTRY.register_processor(
    TileMultiModalProcessor, info=TileProcessingInfo, dummy_inputs=TileDummyInputsBuilder
)
class MaskedDiffusionVLM(nn.Module, SupportsMultiModal):
    """A model as vLLM loads it; not usable without a subclass.

    ``family``: whose model it is. ``text_names``: names of the checkpoint's text stack to ``model.*`` and ``lm_head``,
    the names of Llama; empty where the checkpoint has these.

    ``token_ids`` holds the ids with a role in decoding. ``compute_logits`` is the identity: the sampler asks
    ``vocab_logits`` for the rows it needs, in chunks.
    """

    family: ClassVar[Family]
    text_names: ClassVar[WeightsMapper] = WeightsMapper()
    # vLLM's flag: --mm-encoder-tp-mode data.
    supports_encoder_tp_data = True

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Text that stands for an image in a prompt."""
        if modality.startswith("image"):
            return cls.family.image_placeholder
        raise ValueError(f"{cls.family.name} takes images only, not {modality}")

    @staticmethod
    def get_model_state_cls() -> type[ModelState]:
        """vLLM's hook for a model's own worker state."""
        from vllm_dvlm.worker.model_state import DiffusionModelState

        return DiffusionModelState

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        self.config = config
        self.token_ids = resolve_token_ids(config, tokenizer)
        self.configure_mm_token_handling(config.vocab_size, [resolve_image_token_id(config, tokenizer)])
        with self._mark_tower_model(vllm_config, "image"):
            self.vision = VisionStack(vllm_config, maybe_prefix(prefix, "vision"))
        with self._mark_language_model(vllm_config):
            self.model = LLaDAModel(vllm_config, maybe_prefix(prefix, "model"))
            if config.tie_word_embeddings:
                self.lm_head = self.model.embed_tokens
            else:
                self.lm_head = ParallelLMHead(
                    config.vocab_size,
                    config.hidden_size,
                    quant_config=vllm_config.quant_config,
                    prefix=maybe_prefix(prefix, "lm_head"),
                )
        self.logits_processor = LogitsProcessor(config.vocab_size)
        # Every rank samples, so every rank needs all columns.
        self.logits_processor.use_all_gather = True
        self.is_loaded = False

    def embed_multimodal(self, **kwargs: object) -> list[torch.Tensor]:
        """Visual tokens of the images in ``kwargs``; one [visual tokens, hidden] per image."""
        return self.vision.embed_multimodal(**kwargs)

    def embed_input_ids(self, input_ids: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Token embeddings, [N] -> [N, hidden]; visual tokens are merged by the model state."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """positions: [N] int64; inputs_embeds: [N, hidden]. Returns hidden states [N, hidden]."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.model(positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The hidden states as they are; see the class docstring."""
        return hidden_states

    def vocab_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocabulary], in the model's dtype; a collective under tensor parallelism."""
        return self.logits_processor(self.lm_head, hidden_states)

    @property
    def own_words(self) -> range:
        """Token ids whose logits this rank computes; the whole vocabulary without tensor parallelism."""
        shard = self.lm_head.shard_indices
        return range(shard.org_vocab_start_index, shard.org_vocab_end_index)

    def own_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, words of this rank and its padding], in the model's dtype; no collective.

        Column 0 is that of ``own_words[0]``; what padding columns hold is undefined.
        """
        return self.logits_processor(self.lm_head, hidden_states, skip_gather=True)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors in the original layout, single-file or sharded.

        ValueError for a missing part of a joined parameter; vLLM itself looks for parameters that got no part at all.
        """
        weights = (self.text_names | VisionStack.weights_mapper("vision.")).apply(weights)
        if self.config.tie_word_embeddings:
            weights = (item for item in weights if not item[0].startswith("lm_head."))
        seen: set[str] = set()
        loaded = AutoWeightsLoader(self).load_weights(self._padded(weights, seen))
        # Later loads are updates, which may come in pieces.
        missing = [part for name, _ in self.named_parameters() for part in _parts(name) if part not in seen]
        if missing and not self.is_loaded:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} tensors, among them {', '.join(missing[:3])} (names as vllm-dvlm "
                "has them): is it complete, and does config.json tell the truth about biases?"
            )
        self.is_loaded = True
        return loaded

    def _padded(
        self, weights: Iterable[tuple[str, torch.Tensor]], seen: set[str]
    ) -> Iterable[tuple[str, torch.Tensor]]:
        """The weights, with zero rows behind an embedding that ends with the tokenizer's last id; names go to `seen`.

        The official LaViDa loader cuts it there, and saves it so; no token has such a row.
        """
        rows = self.config.vocab_size
        for name, tensor in weights:
            seen.add(name)
            if name == "model.embed_tokens.weight" and len(tensor) < rows:
                tensor = nn.functional.pad(tensor, (0, 0, 0, rows - len(tensor)))
            yield name, tensor
