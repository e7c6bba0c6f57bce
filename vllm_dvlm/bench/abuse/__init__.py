"""`vllm-dvlm bench abuse`: what careless, hostile and unlucky users do to a server, counted (figures R1 to R6)."""
