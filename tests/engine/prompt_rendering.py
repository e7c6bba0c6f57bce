"""vLLM's front end without an engine, for tests of prompts: a stand-in model class carries the processor."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.renderers import ChatParams
from vllm.renderers.registry import renderer_from_config

from vllm_dvlm.checkpoint import processing, renderer
from vllm_dvlm.checkpoint.configuration import checkpoint_config
from vllm_dvlm.synthetic import checkpoint_files as files
from vllm_dvlm.synthetic import tiny_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "llada_v"
REFERENCE_PLACEHOLDER = -200
ARCHITECTURE = "DvlmProcessingStandIn"


@MULTIMODAL_REGISTRY.register_processor(
    processing.TileMultiModalProcessor,
    info=processing.TileProcessingInfo,
    dummy_inputs=processing.TileDummyInputsBuilder,
)
class StandIn(torch.nn.Module, SupportsMultiModal):
    """Just enough for vLLM to take it for a multimodal text generator."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()

    @classmethod
    def get_placeholder_str(cls, modality, i):
        return renderer.IMAGE_PLACEHOLDER

    def embed_input_ids(self, input_ids): ...

    def embed_multimodal(self, **kwargs): ...

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None): ...

    def compute_logits(self, hidden_states): ...


def engine_config(folder, **kwargs):
    overrides = {"architectures": [ARCHITECTURE], **kwargs.pop("hf_overrides", {})}
    args = EngineArgs(model=str(folder), dtype="float32", hf_overrides=overrides, **kwargs)
    config = args.create_engine_config()
    renderer.configure_model(config.model_config)
    return config


def register():
    """Make the stand-in known to vLLM. Twice is as good as once."""
    AutoConfig.register("llava_llada", checkpoint_config("llava_llada"), exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, StandIn)
    renderer.register_renderer()


def front_end_of(folder, change=lambda folder, settings: None, **tokenizer_settings):
    """A front end whose tokenizer files say something else; `change` may write further files."""
    files.write_configs(folder, tiny_checkpoint.SIZES)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | tokenizer_settings
    settings = {name: value for name, value in settings.items() if value is not None}
    files.write_json(folder / "tokenizer_config.json", settings)
    change(folder, settings)
    return renderer_from_config(engine_config(folder))


def load(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def images_of(case):
    return [Image.open(GOLDEN / "images" / image["file"]) for image in case["images"]]


def mm_options(case):
    ratio = case.get("settings", {}).get("image_aspect_ratio")
    return {"mm_processor_kwargs": {"image_aspect_ratio": ratio}} if ratio else {}


def render(front_end, prompt):
    return front_end.render_cmpl([prompt])[0]


def expanded(case, image_token_id):
    images = iter(case["images"])
    for token in case["prompt_ids"]:
        if token == REFERENCE_PLACEHOLDER:
            yield from [image_token_id] * next(images)["visual_tokens"]
        else:
            yield token


def same_as(case, result):
    image_token_id = 126349
    assert result["prompt_token_ids"] == list(expanded(case, image_token_id))
    assert len(result["prompt_token_ids"]) == case["prompt_len"]
    spans = [[p.offset, p.offset + p.length] for p in result["mm_placeholders"]["image"]]
    assert spans == [image["span"] for image in case["images"]]
    assert all(p.is_embed is None for p in result["mm_placeholders"]["image"])
    for item, image in zip(result["mm_kwargs"]["image"], case["images"], strict=True):
        fields = item.get_data()
        assert fields["image_sizes"].tolist() == image["size_wh"]
        assert fields["num_tiles"].item() == image["tiles"] == len(fields["pixel_values"])
        total = fields["pixel_values"].double().sum().item()
        assert total == pytest.approx(image["pixel_stats"]["sum"], rel=1e-9)


def chat(front_end, content, **kwargs):
    return front_end.render_chat([[{"role": "user", "content": content}]], ChatParams(**kwargs))[1][0]
