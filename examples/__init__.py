"""Programs to start from, and two small models that answer questions; in the package as `vllm_dvlm.examples`."""
