"""Measurements behind `vllm-dvlm bench`: baselines, random checkpoints, reports."""
