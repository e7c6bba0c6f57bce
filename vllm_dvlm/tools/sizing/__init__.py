"""`vllm-dvlm size`: what a checkpoint needs and what pruning gives back, by arithmetic; no weights are needed."""
