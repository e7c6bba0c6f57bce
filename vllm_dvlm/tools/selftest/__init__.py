"""`vllm-dvlm selftest`: does it work on this host? Tiny checkpoints made here, recorded runs of the official code, and
checks of what an installation can get wrong: attention, KV pages, kernels, versions."""
