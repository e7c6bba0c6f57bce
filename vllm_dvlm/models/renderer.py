"""Text of a request to exact prompt ids, and the checks that turn a bad prompt into HTTP 400.

vLLM picks a renderer by `tokenizer_mode`; `configure_model` sets it, so no flag is needed.
Source: tests/golden/llada_v/README.md, points 1 to 3.
"""

import os
from dataclasses import replace
from importlib import resources
from typing import TYPE_CHECKING, Any

from PIL import Image
from vllm import envs
from vllm.renderers.hf import HfRenderer
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.tokenizers.registry import TokenizerRegistry

from vllm_dvlm.admission import PROMPT_LIMITS_KEY, PromptLimits
from vllm_dvlm.errors import refusals_are_value_errors
from vllm_dvlm.models.configuration import resolve_token_ids
from vllm_dvlm.models.media import address_errors_are_refusals
from vllm_dvlm.models.processing import check_placeholders
from vllm_dvlm.params import ServerSettings
from vllm_dvlm.patches.vllm import p003_stream_status

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.inputs import TextPrompt, TokensPrompt
    from vllm.renderers.params import ChatParams, TokenizeParams

TOKENIZER_MODE = "llava_llada"
IMAGE_PLACEHOLDER = "<image>"
# Default of VLLM_MAX_IMAGE_PIXELS: a file of a few kB may announce more and cost seconds and GBs.
_MAX_IMAGE_PIXELS = 64 * 2**20


def register_renderer() -> None:
    """Make `tokenizer_mode="llava_llada"` known to vLLM in this process. Twice is as good as once.

    The tokenizer is vLLM's ordinary one for Hugging Face checkpoints.
    """
    if TOKENIZER_MODE not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(TOKENIZER_MODE, __name__, LLaDAVRenderer.__name__)
    if TOKENIZER_MODE not in TokenizerRegistry.tokenizers:
        TokenizerRegistry.register(TOKENIZER_MODE, *TokenizerRegistry.tokenizers["hf"])


def configure_model(model_config: "ModelConfig") -> None:
    """Set what this renderer needs; for `verify_and_update_model_config`.

    - `tokenizer_mode`. ValueError if another one than "auto" or "hf" was asked for.
    - Images from HTTP keep their mode, so that `processing.to_rgb` converts all images alike.
    - The processor cache keeps processed images in the front end and sends them to the engine core
      each time. vLLM's default sends an image once and then its name only; it notes the image as
      sent before the request is validated, so after a refused request the next good one with that
      image would fail. `--mm-processor-cache-gb 0` turns the cache off as always.
    """
    if model_config.tokenizer_mode not in ("auto", "hf", TOKENIZER_MODE):
        raise ValueError(f"--tokenizer-mode {model_config.tokenizer_mode} is not supported: leave it out.")
    model_config.tokenizer_mode = TOKENIZER_MODE
    os.environ.setdefault("VLLM_MAX_IMAGE_PIXELS", str(_MAX_IMAGE_PIXELS))
    mm_config = model_config.multimodal_config
    if mm_config is not None:
        mm_config.media_io_kwargs.setdefault("image", {}).setdefault("image_mode", None)
        mm_config.mm_processor_cache_type = "processor_only"


class LLaDAVRenderer(HfRenderer):
    """vLLM's renderer for Hugging Face tokenizers, with LLaDA-V's cut at `<image>`."""

    def __init__(self, config: "VllmConfig", tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        p003_stream_status.install()
        # On the renderer's own copy, so not before: copying a vLLM tokenizer rebuilds it.
        if self.tokenizer is not None and self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = default_chat_template()
        # Pillow raises an error of its own at twice its limit, which vLLM answers with HTTP 500.
        # vLLM's check of the same header gives 400.
        if envs.VLLM_MAX_IMAGE_PIXELS > 0:
            Image.MAX_IMAGE_PIXELS = None
        # Not the renderer's own tokenizer: that one is in use on other threads while requests are checked.
        tokenizer = cached_tokenizer_from_config(self.model_config)
        self.prompt_limits = PromptLimits(
            settings=ServerSettings.from_additional_config(config.additional_config),
            max_model_len=self.model_config.max_model_len,
            mask_token_id=resolve_token_ids(self.model_config.hf_config, tokenizer).mask_token_id,
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        )

    def render_cmpl(self, *args: Any, **kwargs: Any) -> Any:
        with refusals_are_value_errors():
            return super().render_cmpl(*args, **kwargs)

    def render_chat(self, *args: Any, **kwargs: Any) -> Any:
        with refusals_are_value_errors():
            return super().render_chat(*args, **kwargs)

    def validate_token_ids(self, *args: Any, **kwargs: Any) -> None:
        with refusals_are_value_errors():
            super().validate_token_ids(*args, **kwargs)

    def process_for_engine(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_limits(super().process_for_engine(*args, **kwargs))

    async def process_for_engine_async(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_limits(await super().process_for_engine_async(*args, **kwargs))

    def _with_limits(self, engine_input: Any) -> Any:
        """Attach what ``admission`` checks the prompt against; vLLM builds the engine's request field by field and
        leaves the key behind."""
        engine_input[PROMPT_LIMITS_KEY] = self.prompt_limits
        return engine_input

    def render_messages(self, messages: Any, params: "ChatParams") -> Any:
        with address_errors_are_refusals():
            return super().render_messages(messages, _as_text(params))

    async def render_messages_async(self, messages: Any, params: "ChatParams") -> Any:
        with address_errors_are_refusals():
            return await super().render_messages_async(messages, _as_text(params))

    def _tokenize_prompt(self, prompt: "TextPrompt", params: "TokenizeParams") -> "TokensPrompt":
        if self.mm_processor is None or IMAGE_PLACEHOLDER not in prompt["prompt"]:
            return super()._tokenize_prompt(prompt, params)
        tokenizer = self.get_tokenizer()
        # Not cut to length piece by piece; vLLM checks and truncates the whole afterwards.
        token_ids = tokenize_pieces(
            prompt["prompt"],
            lambda text: tokenizer(text, add_special_tokens=params.add_special_tokens, truncation=False)["input_ids"],
            tokenizer.bos_token_id,
            self.mm_processor.info.image_token_id,
        )
        return self._build_tokens_prompt(token_ids, prompt)

    def _process_tokens(self, prompt: "TokensPrompt", *, skip_mm_cache: bool = False) -> Any:
        self._check_without_image(prompt)
        return super()._process_tokens(prompt, skip_mm_cache=skip_mm_cache)

    async def _process_tokens_async(self, prompt: "TokensPrompt", *, skip_mm_cache: bool = False) -> Any:
        self._check_without_image(prompt)
        return await super()._process_tokens_async(prompt, skip_mm_cache=skip_mm_cache)

    def _process_mm_uuids(self, mm_data: Any, mm_data_items: Any, mm_uuid_items: Any, mm_req_id: str) -> Any:
        # With the processor cache off vLLM names images after the request. By their content, the
        # encoder's cache still recognises an image it has seen.
        self._validate_mm_uuids(mm_data, mm_data_items, mm_uuid_items)
        return mm_uuid_items

    def _check_without_image(self, prompt: "TokensPrompt") -> None:
        """A prompt without images never meets the processor, which checks all others."""
        if self.mm_processor is not None and not prompt.get("multi_modal_data"):
            image_token_id = self.mm_processor.info.image_token_id
            check_placeholders(prompt["prompt_token_ids"], image_token_id, num_images=0)


def tokenize_pieces(text: str, encode: Any, bos_token_id: int | None, image_token_id: int) -> list[int]:
    """Ids of a text whose `<image>`s stand for images [3].

    The text is cut at `<image>` and each piece is encoded alone. Where the first piece begins with
    BOS, the reference takes it that the tokenizer puts one before every piece and removes the first
    token of each later piece, whatever it is; training did so, too.

    Args:
        encode: text to list of ids.
        image_token_id: one stands between pieces.
    """
    first, *others = (encode(piece) for piece in text.split(IMAGE_PLACEHOLDER))
    drop = int(bool(first) and first[0] == bos_token_id)
    token_ids = list(first)
    for piece in others:
        token_ids += [image_token_id, *piece[drop:]]
    return token_ids


def default_chat_template() -> str:
    """The official conversation as a Jinja template, for checkpoints without one [1], [2]."""
    folder = resources.files("vllm_dvlm") / "chat_templates"
    return (folder / "llava_llada.jinja").read_text(encoding="utf-8")


def _as_text(params: "ChatParams") -> "ChatParams":
    """Let the template give text: ids would bypass the cut at `<image>`."""
    kwargs = {**params.chat_template_kwargs, "tokenize": False}
    return replace(params, chat_template_kwargs=kwargs)
