"""Plain PyTorch LLaDA-V and LaViDa with two decoding loops each: what the engine is compared with."""
