"""Denoising arithmetic: tensors in, tensors out, no vLLM.

``confidence`` turns logits into a token and a confidence per position, ``schedule`` says how many positions a step
unmasks, ``remask`` which ones, ``step`` carries canvases through one denoising step.

Adding a remasking strategy: write a confidence function in ``confidence.py``, add its row to ``CONFIDENCE`` there and
its name to ``vllm_dvlm.params.REMASKING``; ``tests/unit/test_confidence.py`` runs every row through the same tests.
"""
