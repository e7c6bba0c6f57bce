"""Dream's tokenizer without its own code: that of Qwen2 under the name that tokenizer files of a checkpoint ask for.

The files (vocab.json, merges.txt, no tokenizer.json) name a class that comes as code beside them, which would need
--trust-remote-code. Normalisation (NFC), the pattern that splits text and byte-level BPE are Qwen2's to the letter; the
official tokenization_dream.py differs in nothing else that reaches ids.
"""

from transformers import AutoTokenizer
from transformers.models.qwen2 import Qwen2Tokenizer

from vllm_dvlm.checkpoint.lavida_configuration import LavidaDreamConfig


class DreamTokenizer(Qwen2Tokenizer):
    """Found by its name, the `tokenizer_class` of tokenizer_config.json."""


def register_tokenizer() -> None:
    """Make it known to transformers in this process. Twice is as good as once.

    With --trust-remote-code the checkpoint's own code still wins.
    """
    AutoTokenizer.register(LavidaDreamConfig, DreamTokenizer, exist_ok=True)
