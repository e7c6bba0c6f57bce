"""Text of a request to exact prompt ids, and the checks that turn a bad prompt into HTTP 400.

vLLM picks a renderer by `tokenizer_mode`; `configure_model` sets it, so no flag is needed.
Source: tests/golden/llada_v/README.md, points 1 to 3, and tests/golden/lavida/README.md, "Prompt".
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from PIL import Image
from vllm import envs
from vllm.logger import init_logger
from vllm.renderers.hf import HfRenderer, resolve_chat_template, resolve_chat_template_content_format
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.tokenizers.registry import TokenizerRegistry

from vllm_dvlm.checkpoint import chat_template
from vllm_dvlm.checkpoint.configuration import resolve_image_token_id, resolve_token_ids
from vllm_dvlm.checkpoint.media import address_errors_are_refusals
from vllm_dvlm.checkpoint.processing import check_placeholders, check_places
from vllm_dvlm.checkpoint.token_strings import name_token
from vllm_dvlm.families.base import IMAGE_PLACEHOLDER
from vllm_dvlm.patches.vllm import p003_serving
from vllm_dvlm.sampling_parameters import spelling_of
from vllm_dvlm.serving import admission
from vllm_dvlm.serving.admission import PROMPT_LIMITS_KEY, SPELLING_KEY, PromptLimits
from vllm_dvlm.serving.errors import InvalidRequest, refusals_are_value_errors
from vllm_dvlm.settings import ServerSettings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.inputs import TextPrompt, TokensPrompt
    from vllm.renderers.params import ChatParams, TokenizeParams

logger = init_logger(__name__)

# vLLM's key of a renderer; one for all families, which the config tells apart.
TOKENIZER_MODE = "vllm_dvlm"
# Default of VLLM_MAX_IMAGE_PIXELS: a file of a few kB may announce more and cost seconds and GBs.
_MAX_IMAGE_PIXELS = 64 * 2**20


def register_renderer() -> None:
    """Make `tokenizer_mode="vllm_dvlm"` known to vLLM in this process. Twice is as good as once.

    The tokenizer is vLLM's ordinary one for Hugging Face checkpoints.
    """
    if TOKENIZER_MODE not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(TOKENIZER_MODE, __name__, MaskedDiffusionRenderer.__name__)
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


class MaskedDiffusionRenderer(HfRenderer):
    """vLLM's renderer for Hugging Face tokenizers, with the family's conversation and its cut at `<image>`."""

    def __init__(self, config: "VllmConfig", tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.placeholder = self.model_config.hf_config.family.image_placeholder
        p003_serving.install()
        if self.tokenizer is not None:
            self._prepare_tokenizer()
        # Pillow raises an error of its own at twice its limit, which vLLM answers with HTTP 500.
        # vLLM's check of the same header gives 400.
        if envs.VLLM_MAX_IMAGE_PIXELS > 0:
            Image.MAX_IMAGE_PIXELS = None
        # Not the renderer's own tokenizer: that one is in use on other threads while requests are checked.
        tokenizer = cached_tokenizer_from_config(self.model_config)
        hf_config = self.model_config.hf_config
        self.prompt_limits = PromptLimits(
            settings=ServerSettings.from_additional_config(config.additional_config),
            model_config=self.model_config,
            token_ids=resolve_token_ids(hf_config, tokenizer),
            image_token_id=resolve_image_token_id(hf_config, tokenizer),
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        )
        admission.remember(self.prompt_limits)

    def _prepare_tokenizer(self) -> None:
        """On the renderer's own copy, so not before there is one: copying a vLLM tokenizer rebuilds it."""
        tokenizer = self.tokenizer
        self.templates = {tools: default_template(tokenizer, self.model_config, tools) for tools in (False, True)}
        # For those who ask the tokenizer itself. Templates of other names stay: a request may name them.
        own, chosen = tokenizer.chat_template, self.templates[False].template
        tokenizer.chat_template = {**own, "default": chosen} if isinstance(own, dict) else chosen
        tokenizer.init_kwargs = {**tokenizer.init_kwargs, "chat_template": chosen}
        self.image_token_id = resolve_image_token_id(self.model_config.hf_config, tokenizer)
        name_token(tokenizer, self.image_token_id, self.placeholder)

    def warmup(self, chat_params: "ChatParams") -> None:
        """As vLLM's, which calls it once at start-up; says which chat template is used from now on."""
        if self.tokenizer is not None and self.api_process_rank <= 0:
            is_named = _named_template(chat_params) is not None
            origin = "the one named at start-up" if is_named else self.templates[False].origin
            logger.info("vllm_dvlm: chat template: %s", origin)
        super().warmup(chat_params)

    def render_cmpl(self, prompts: Any, tok_params: Any = None, **kwargs: Any) -> Any:
        with refusals_are_value_errors():
            return _spelled(super().render_cmpl(prompts, tok_params, **kwargs), tok_params)

    async def render_cmpl_async(self, prompts: Any, tok_params: Any = None, **kwargs: Any) -> Any:
        return _spelled(await super().render_cmpl_async(prompts, tok_params, **kwargs), tok_params)

    def render_chat(self, conversations: Any, chat_params: "ChatParams", tok_params: Any = None, **kwargs: Any) -> Any:
        with refusals_are_value_errors():
            messages, prompts = super().render_chat(conversations, chat_params, tok_params, **kwargs)
        return messages, _spelled(prompts, tok_params, chat_params)

    async def render_chat_async(
        self, conversations: Any, chat_params: "ChatParams", tok_params: Any = None, **kwargs: Any
    ) -> Any:
        messages, prompts = await super().render_chat_async(conversations, chat_params, tok_params, **kwargs)
        return messages, _spelled(prompts, tok_params, chat_params)

    def validate_token_ids(self, token_ids: Sequence[int], *, parameter: str | None = None) -> None:
        """InvalidRequest for ids outside the model's vocabulary, and for those of rows that stand for nothing."""
        with refusals_are_value_errors():
            super().validate_token_ids(token_ids, parameter=parameter)
        if token_ids and self.tokenizer is not None and (strange := set(token_ids) - self._ids_with_text):
            raise InvalidRequest(
                f"Token id {min(strange)} stands for no text, the tokenizer does not have it: remove it",
                parameter=parameter,
            )

    @cached_property
    def _ids_with_text(self) -> frozenset[int]:
        return frozenset([*self.get_tokenizer().get_vocab().values(), self.image_token_id])

    def _detokenize_prompt(self, prompt: "TokensPrompt") -> "TokensPrompt":
        self.validate_token_ids(prompt["prompt_token_ids"])
        return super()._detokenize_prompt(prompt)

    async def _detokenize_prompt_async(self, prompt: "TokensPrompt") -> "TokensPrompt":
        self.validate_token_ids(prompt["prompt_token_ids"])
        return await super()._detokenize_prompt_async(prompt)

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
        params = self._with_template(params)
        with address_errors_are_refusals():
            conversation, prompt = super().render_messages(messages, params)
        self._check_places(conversation, params)
        return conversation, prompt

    async def render_messages_async(self, messages: Any, params: "ChatParams") -> Any:
        params = self._with_template(params)
        with address_errors_are_refusals():
            conversation, prompt = await super().render_messages_async(messages, params)
        self._check_places(conversation, params)
        return conversation, prompt

    def _with_template(self, params: "ChatParams") -> "ChatParams":
        """Name the template that writes the conversation and how it takes contents; let it give text, for ids would
        bypass the cut at `<image>`.

        InvalidRequest for tools that the template would leave out.
        """
        tokenizer = self.get_tokenizer()
        tools = params.chat_template_kwargs.get("tools")
        template = _named_template(params)
        if template is None:
            template = self.templates[bool(tools)].template
        resolved = resolve_chat_template(tokenizer, template, tools, model_config=self.model_config)
        if tools and params.tool_choice != "none" and not chat_template.reads_variable(resolved, "tools"):
            raise InvalidRequest(
                "tools: the chat template of this server has no place for them, the model would not see them; remove "
                "them, or name a template that writes them with --chat-template",
                parameter="tools",
            )
        content_format = resolve_chat_template_content_format(
            template, tools, params.chat_template_content_format, tokenizer, model_config=self.model_config
        )
        kwargs = {name: value for name, value in params.chat_template_kwargs.items() if name != "chat_template"}
        return replace(
            params,
            chat_template=template,
            chat_template_content_format=content_format,
            chat_template_kwargs={**kwargs, "tokenize": False},
        )

    def _check_places(self, conversation: Any, params: "ChatParams") -> None:
        """Where contents stay parts, images must be placed by their own message.

        Where contents are text, vLLM adds the places that a message lacks, so that a place in another message is one
        too many and `check_placeholders` sees it.
        """
        if self.mm_processor is not None and params.chat_template_content_format == "openai":
            check_places(conversation, self.placeholder)

    def _tokenize_prompt(self, prompt: "TextPrompt", params: "TokenizeParams") -> "TokensPrompt":
        if self.placeholder not in prompt["prompt"]:
            return super()._tokenize_prompt(prompt, params)
        tokenizer = self.get_tokenizer()
        # Not cut to length piece by piece; vLLM checks and truncates the whole afterwards.
        token_ids = tokenize_pieces(
            prompt["prompt"],
            lambda text: tokenizer(text, add_special_tokens=params.add_special_tokens, truncation=False)["input_ids"],
            tokenizer.bos_token_id,
            self.image_token_id,
            self.placeholder,
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
        """A prompt without images never meets the processor, which checks all others; in text-only mode there is
        none."""
        if not prompt.get("multi_modal_data"):
            check_placeholders(prompt["prompt_token_ids"], self.image_token_id, num_images=0)
        elif self.mm_processor is None:
            raise InvalidRequest(
                "At most 0 images may be provided: this server runs in text-only mode. Send text alone, or start it "
                "without --language-model-only and without --limit-mm-per-prompt '{\"image\": 0}'.",
                parameter="image",
            )


def tokenize_pieces(
    text: str, encode: Any, bos_token_id: int | None, image_token_id: int, placeholder: str = IMAGE_PLACEHOLDER
) -> list[int]:
    """Ids of a text whose `<image>`s stand for images [3].

    The text is cut at `placeholder` and each piece is encoded alone. Where the first piece begins with
    BOS, the reference takes it that the tokenizer puts one before every piece and removes the first
    token of each later piece, whatever it is; training did so, too.

    Args:
        encode: text to list of ids.
        image_token_id: one stands between pieces.
    """
    first, *others = (encode(piece) for piece in text.split(placeholder))
    drop = int(bool(first) and first[0] == bos_token_id)
    token_ids = list(first)
    for piece in others:
        token_ids += [image_token_id, *piece[drop:]]
    return token_ids


def default_template(tokenizer: Any, model_config: "ModelConfig", with_tools: bool = False) -> chat_template.Choice:
    """The chat template for conversations for which the user names none.

    with_tools: a checkpoint may have another template for conversations with tools.
    """
    from_files: list[Any] = [
        resolve_chat_template(tokenizer, None, tools, model_config=model_config)
        for tools in ([[], None] if with_tools else [None])
    ]
    # The files of a processor may have several, which vLLM hands over together.
    from_files = [found.get("default") if isinstance(found, dict) else found for found in from_files]
    return chat_template.choose(from_files, model_config.hf_config.family)


def _spelled(prompts: Any, tok_params: Any, chat_params: "ChatParams | None" = None) -> Any:
    """The prompts with the names that their API has for parameters, for messages of ``admission``."""
    for prompt in prompts:
        prompt[SPELLING_KEY] = spelling_of(tok_params, chat_params)
    return prompts


def _named_template(params: "ChatParams") -> str | None:
    """The template that a user names: by flag, in a request, or as an argument for the template."""
    if params.chat_template is not None:
        return params.chat_template
    return params.chat_template_kwargs.get("chat_template")
