"""Worker side: request state, vLLM's ModelState hooks, the sampler, traces."""
