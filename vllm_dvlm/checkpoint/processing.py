"""Images of a prompt to tiles, and placeholder ids to visual tokens: vLLM's multimodal interface.

vLLM hands a processor token ids, never text (`renderer.py` made them). Visual spans are born here:
one placeholder id per image becomes one id per visual token, newline tokens included, so a span is
a whole `PlaceholderRange` (`is_embed` is None). Source: tests/golden/llada_v/README.md, 5 to 16,
and tests/golden/lavida/README.md, "Image".
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers import BatchFeature
from vllm import envs
from vllm.multimodal.image import normalize_image
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from vllm_dvlm.checkpoint.anyres import (
    ImageLayout,
    ImageLayoutConfig,
    heaviest_image,
    largest_image,
    layout_of,
    preprocess,
)
from vllm_dvlm.checkpoint.configuration import resolve_image_token_id, resolve_vision_config
from vllm_dvlm.serving.errors import InvalidRequest

if TYPE_CHECKING:
    from vllm.config.multimodal import MultiModalDummyOptions
    from vllm.inputs import MultiModalDataDict
    from vllm.multimodal.inputs import MultiModalKwargsItems
    from vllm.multimodal.parse import MultiModalDataItems
    from vllm.multimodal.processing import ProcessorInputs, PromptUpdate

# The one thing a request may say about its images, in `mm_processor_kwargs`.
_ASPECT_RATIO = "image_aspect_ratio"
# vLLM's name for options of the image part of a processor.
_IMAGE_SCOPE = "images_kwargs"


class RgbDataParser(MultiModalDataParser):
    """vLLM's parser for images, but transparency is dropped as by the official evaluation's
    `.convert("RGB")`; vLLM itself would blend transparent pixels with white.

    Encoded images (from HTTP) stay as they are here: their bytes are their identity in caches.
    """

    def _parse_image_data(self, data: Any) -> ImageProcessorItems | None:
        if data is None:
            return None
        if self.is_embeddings(data):
            raise InvalidRequest("Image embeddings are not supported: send the image.", parameter="image")
        if isinstance(data, (Image.Image, MediaWithBytes)) or getattr(data, "ndim", None) == 3:
            data = [data]
        return ImageProcessorItems([to_rgb(item) if isinstance(item, Image.Image) else item for item in data])


class TileProcessingInfo(BaseProcessingInfo):
    """What vLLM may ask about the images of a checkpoint; how they are cut is the config's `image_layout`."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {_IMAGE_SCOPE: {_ASPECT_RATIO}}

    def get_data_parser(self) -> MultiModalDataParser:
        return RgbDataParser()

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Tokens of the largest image that fits into a prompt; says so without processing one."""
        return {"image": min(self.max_image_tokens, seq_len)}

    @cached_property
    def layout(self) -> ImageLayoutConfig:
        """Layout by the checkpoint and the server's options."""
        return self.layout_for({})

    @cached_property
    def image_token_id(self) -> int:
        """The id that stands for an image, then for each of its visual tokens."""
        return resolve_image_token_id(self.get_hf_config(), self.get_tokenizer())

    @property
    def max_image_tiles(self) -> int | None:
        """Server option: refuse images of more tiles. None: no limit."""
        return getattr(self.get_hf_config(), "max_image_tiles", None)

    @cached_property
    def max_image_tokens(self) -> int:
        """Visual tokens of the largest image; the encoder's budgets are sized by it."""
        return layout_of(*self.largest_image(), self.layout).num_visual_tokens

    def largest_image(self) -> tuple[int, int]:
        """(width, height) of an image with the most visual tokens that this server takes."""
        return largest_image(self.layout, self.max_image_tiles)

    def layout_for(self, mm_kwargs: Mapping[str, object]) -> ImageLayoutConfig:
        """Layout by the checkpoint, the server's `--mm-processor-kwargs` and a request's.

        Raises InvalidRequest for an unknown option or value.
        """
        merged = self._merge_and_resolve_mm_processor_kwargs(mm_kwargs)
        options = merged.pop(_IMAGE_SCOPE, {})
        if not isinstance(options, Mapping):
            merged[_IMAGE_SCOPE], options = options, {}
        unknown = [*merged, *(name for name in options if name != _ASPECT_RATIO)]
        if unknown:
            raise InvalidRequest(
                f"mm_processor_kwargs {unknown} are not settings of this model; it knows {_ASPECT_RATIO!r}.",
                parameter="mm_processor_kwargs",
            )
        config = self.get_hf_config()
        layout = config.image_layout(resolve_vision_config(config))
        if _ASPECT_RATIO not in options:
            return layout
        try:
            return layout.with_aspect_ratio(options[_ASPECT_RATIO])
        except ValueError as error:
            raise InvalidRequest(str(error), parameter=_ASPECT_RATIO) from error

    def image_layout(self, width: int, height: int, layout: ImageLayoutConfig) -> ImageLayout:
        """Layout of one image; InvalidRequest if the model or this server cannot take it."""
        try:
            found = layout_of(width, height, layout)
        except ValueError as error:
            raise InvalidRequest(str(error), parameter="image") from error
        longest, pixels = max(width, height), envs.VLLM_MAX_IMAGE_PIXELS
        if layout.mode == "pad" and 0 < pixels < longest**2:
            raise InvalidRequest(
                f"An image of {width}x{height} pixels is padded to {longest}x{longest}, this server takes {pixels} "
                "pixels (VLLM_MAX_IMAGE_PIXELS): send one whose longer side is shorter.",
                parameter="image",
            )
        limit = self.max_image_tiles
        if limit is not None and found.num_tiles > limit:
            raise InvalidRequest(
                f"An image of {width}x{height} pixels needs {found.num_tiles} tiles, this server "
                f"takes {limit}: send a smaller image, or mm_processor_kwargs "
                f"{{'{_ASPECT_RATIO}': 'pad'}}, or raise max_image_tiles.",
                parameter="image",
            )
        # Only a request's own mode can get here: the server's bound is the largest of its mode.
        if layout != self.layout and found.num_visual_tokens > self.max_image_tokens:
            raise InvalidRequest(
                f"An image of {width}x{height} pixels has {found.num_visual_tokens} visual tokens "
                f"in this mode, this server is sized for {self.max_image_tokens}: start it with "
                f"the mode in --mm-processor-kwargs.",
                parameter=_ASPECT_RATIO,
            )
        return found


class TileDummyInputsBuilder(BaseDummyInputsBuilder[TileProcessingInfo]):
    """The image that takes most memory to encode, for start-up profiling."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""  # ids, not text: see `TileMultiModalProcessor.get_dummy_inputs`

    def get_dummy_mm_data(
        self,
        seq_len: int,
        mm_counts: Mapping[str, int],
        mm_options: "MultiModalDummyOptions",
    ) -> "MultiModalDataDict":
        width, height = heaviest_image(self.info.layout, self.info.max_image_tiles)
        images = self._get_dummy_images(
            width=width,
            height=height,
            num_images=mm_counts.get("image", 0),
            overrides=mm_options.get("image"),
        )
        return {"image": images}


class TileMultiModalProcessor(BaseMultiModalProcessor[TileProcessingInfo]):
    """Turns images into fields of the model and placeholder ids into spans.

    Fields, one item per image: `pixel_values` [T, 3, H, W] in the model's dtype, `num_tiles` int,
    `image_sizes` [2] = width, height of the original, `grid_limits` int
    (`ImageLayoutConfig.grid_limit`). The last three stay on the host.
    """

    def apply(self, inputs: "ProcessorInputs", timing_ctx: Any) -> Any:
        """Check what the request asks for, before any cache notes its images; then as vLLM does."""
        check_placeholders(
            inputs.prompt,
            self.info.image_token_id,
            inputs.mm_data_items.get_all_counts().get("image", 0),
        )
        self._check_length(inputs)
        return super().apply(inputs, timing_ctx)

    def _check_length(self, inputs: "ProcessorInputs") -> None:
        """InvalidRequest for images that do not fit into a prompt, by their headers alone: none is cut into tiles yet.

        The checks at the front door count again, with the canvas.
        """
        num = inputs.mm_data_items.get_all_counts().get("image", 0)
        if not num:
            return
        layout = self.info.layout_for(inputs.hf_processor_mm_kwargs)
        images = inputs.mm_data_items.get_items("image", ImageProcessorItems)
        total = len(inputs.prompt) - num
        for index in range(num):
            if not isinstance(images.get(index), (Image.Image, MediaWithBytes)):
                continue  # pixels of a program's own, not yet known to be an image
            size = images.get_image_size(index)
            total += self.info.image_layout(size.width, size.height, layout).num_visual_tokens
        room = self.info.ctx.model_config.max_model_len
        if total > room:
            raise InvalidRequest(
                f"The prompt has {total} tokens with those of its {num} image(s), this server takes {room} "
                "(--max-model-len): send fewer or smaller images.",
                parameter="image",
            )

    def get_dummy_inputs(
        self,
        seq_len: int,
        mm_counts: Mapping[str, int],
        mm_options: "MultiModalDummyOptions",
    ) -> "ProcessorInputs":
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        # The tokenizer need not know the placeholder, so text could not say it.
        inputs.prompt = [self.info.image_token_id] * mm_counts.get("image", 0)
        return inputs

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        layout = self.info.layout_for(hf_kwargs)
        images = [to_rgb(image) for image in hf_data["images"]]
        for image in images:
            self.info.image_layout(*image.size, layout)
        tiles = [preprocess(image, layout) for image in images]
        dtype = self.info.ctx.model_config.dtype
        return BatchFeature(
            {
                "pixel_values": torch.cat(tiles).to(dtype),
                "num_tiles": torch.tensor([len(t) for t in tiles]),
                "image_sizes": torch.tensor([image.size for image in images]),
                "grid_limits": torch.full((len(images),), layout.grid_limit),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        # There is nothing to describe when every image of the prompt was cached.
        num_tiles = hf_inputs.get("num_tiles", torch.empty(0, dtype=torch.long))
        on_host = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", num_tiles),
            "num_tiles": on_host,
            "image_sizes": on_host,
            "grid_limits": on_host,
        }

    def _get_prompt_updates(
        self,
        mm_items: "MultiModalDataItems",
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: "MultiModalKwargsItems",
    ) -> Sequence["PromptUpdate"]:
        layout = self.info.layout_for(hf_processor_mm_kwargs)
        token_id = self.info.image_token_id

        def visual_tokens(item_idx: int) -> list[int]:
            size = mm_items.get_items("image", ImageProcessorItems).get_image_size(item_idx)
            found = self.info.image_layout(size.width, size.height, layout)
            return [token_id] * found.num_visual_tokens

        return [PromptReplacement("image", [token_id], visual_tokens)]


def check_placeholders(token_ids: Sequence[int], image_token_id: int, num_images: int) -> None:
    """InvalidRequest unless a prompt, not yet expanded, has one placeholder per image.

    vLLM would take surplus placeholders for text, and would expand an expanded prompt again.
    """
    found = sum(i == image_token_id for i in token_ids)
    if found != num_images:
        raise InvalidRequest(
            f"The prompt has {found} image placeholder(s) but {num_images} image(s): write <image> "
            f"in the text (or id {image_token_id} in a token prompt) exactly once per image.",
            parameter="prompt",
        )


def check_places(conversation: Sequence[Mapping[str, Any]], placeholder: str) -> None:
    """InvalidRequest if a message writes `placeholder`, but not once for each of its own images.

    The prompt as a whole may then still have as many placeholders as images, and an image would stand in another
    message than the one that sent it. A message that writes none leaves the places to the template.

    conversation: messages whose contents are parts, or text (which has no images).
    """
    for number, message in enumerate(conversation, 1):
        content = message.get("content") or []
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        # Joined, as templates join them: a placeholder may begin in one part and end in the next.
        written = "".join(part["text"] for part in parts if part["type"] == "text").count(placeholder)
        num_images = sum(part["type"] == "image" for part in parts)
        if written and written != num_images:
            raise InvalidRequest(
                f"Message {number} ({message['role']}) has {written} image placeholder(s) but {num_images} image(s): "
                f"write {placeholder} once per image of the same message, or not at all; it cannot stand for an image "
                "of another message, and not for itself",
                parameter="messages",
            )


def to_rgb(image: Any) -> Image.Image:
    """Any image vLLM may carry as RGB: a Pillow image in any mode, turned upright if its EXIF data
    says so, or uint8 pixels with 1, 3 or 4 channels, [H, W, C] or [C, H, W].

    Raises InvalidRequest for anything else.
    """
    if not isinstance(image, Image.Image):
        return _from_pixels(image).convert("RGB")
    try:
        image.load()
        # vLLM's function copies upright images, too.
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = normalize_image(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequest(
            f"An image of mode {image.mode!r} cannot be read as RGB: {error}", parameter="image"
        ) from error


def _from_pixels(pixels: Any) -> Image.Image:
    array = np.asarray(pixels)
    # Channels last wins where both ends fit, as in vLLM's own reading of the size.
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    usable = array.ndim == 3 and array.shape[-1] in (1, 3, 4) and array.size > 0
    if not usable or array.dtype != np.uint8:
        raise InvalidRequest(
            f"Pixels of shape {array.shape} and type {array.dtype} are no image: send uint8 values "
            "of 1, 3 or 4 channels, or a Pillow image.",
            parameter="image",
        )
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else np.ascontiguousarray(array))
