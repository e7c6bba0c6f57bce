"""Changes to vLLM."""
