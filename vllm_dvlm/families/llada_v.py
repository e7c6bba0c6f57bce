"""LLaDA-V (arXiv 2505.16933): prompt and canvas are one bidirectional sequence.

Source: tests/golden/llada_v/README.md.
"""

from vllm_dvlm.families.base import Family, TokenTexts

LLADA_V = Family(
    name="LLaDA-V",
    architecture="LlavaLLaDAModelLM",
    model_type="llava_llada",
    model="vllm_dvlm.models.llada_v:LlavaLLaDAModelLM",
    config="vllm_dvlm.checkpoint.configuration:LlavaLLaDAConfig",
    tokens=TokenTexts(
        mask="<|mdm_mask|>",
        end_of_turn="<|eot_id|>",
        bos="<|startoftext|>",
        eos="<|endoftext|>",
        # Point 24; the mask token itself is not among them.
        forbidden=("<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>"),
    ),
    chat_template="llava_llada.jinja",
    # The official demo's gen_length, block_length and steps.
    default_canvas_len=128,
    default_block_len=128,
    default_steps=128,
    published_name="LLaDA-V 8B",
    published=(("mm_vision_tower", "google/siglip2-so400m-patch14-384"), ("mm_hidden_size", 1152)),
)
