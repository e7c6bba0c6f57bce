"""LaViDa (arXiv 2505.16839), with LLaDA and with Dream as its language model.

The prompt is a prefix that is computed once, unless a request asks for one bidirectional sequence. Nothing is
forbidden and nothing stops decoding inside the canvas. Source: tests/golden/lavida/README.md.
"""

from dataclasses import replace

from vllm_dvlm.families.base import Family, TokenTexts

_PICTURES = (
    ("mm_vision_tower", "google/siglip-so400m-patch14-384"),
    ("mm_hidden_size", 1152),
    ("mm_patch_merge_type", "spatial_unpad"),
    ("image_aspect_ratio", "anyres"),
    ("image_grid_pinpoints", ((384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152))),
    ("tokenizer_model_max_length", 4096),
)

LAVIDA_LLADA = Family(
    name="LaViDa-LLaDA",
    architecture="LlavaLladaForMaskedDiffusion",
    model_type="llava_llada",
    model="vllm_dvlm.models.lavida:LlavaLladaForMaskedDiffusion",
    config="vllm_dvlm.checkpoint.lavida_configuration:LavidaLladaConfig",
    tokens=TokenTexts(mask="<|mdm_mask|>", end_of_turn="<|eot_id|>", bos="<|startoftext|>", eos="<|endoftext|>"),
    # The same conversation as LLaDA-V's.
    chat_template="llava_llada.jinja",
    # The official predict script's max_new_tokens and block_length.
    default_canvas_len=64,
    default_block_len=64,
    attentions=("prefix", "full"),
    schedules=("uniform", "linear", "shift", "cosine", "logit_normal"),
    has_suffix=False,
    has_step_ratio=True,
    stops_bound_canvas=False,
    scores_unknown_rows=True,
    published_name="LaViDa-LLaDA 8B",
    published=_PICTURES,
)

LAVIDA_DREAM = replace(
    LAVIDA_LLADA,
    name="LaViDa-Dream",
    architecture="LlavaDreamForMaskedDiffusion",
    model_type="llava_dream",
    model="vllm_dvlm.models.lavida:LlavaDreamForMaskedDiffusion",
    config="vllm_dvlm.checkpoint.lavida_configuration:LavidaDreamConfig",
    tokens=TokenTexts(mask="<|mask|>", end_of_turn="<|im_end|>", bos="<|beginoftext|>", eos="<|endoftext|>"),
    chat_template="lavida_dream.jinja",
    # The official evaluation wrapper's max_new_tokens; no script predicts with Dream.
    default_canvas_len=256,
    default_block_len=None,
    has_blocks=False,
    shifts_logits=True,
    # transformers 4.50 fills it in where the official call leaves it out.
    default_top_k=50,
    has_top_k_top_p=True,
    follows_time_grid=True,
    published_name="LaViDa-Dream 7B",
)
