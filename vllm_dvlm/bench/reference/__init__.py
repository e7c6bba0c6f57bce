"""Plain PyTorch LLaDA-V and two decoding loops: what the engine is compared with."""
