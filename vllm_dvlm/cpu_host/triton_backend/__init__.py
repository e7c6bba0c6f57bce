"""Triton backend "cpu", for its name only: vLLM's CPU build enables Triton when that name exists.

Model Runner V2 demands Triton to be importable. The few kernels that our models reach on a CPU host
are replaced by torch (``patches/vllm/p001_cpu_torch_kernels.py``), so this backend compiles
nothing and its driver never reports itself active; a host with a real driver does not notice.
"""

from vllm_dvlm.cpu_host import metadata

# vLLM imports Triton on its way to the command line's request for the version of `vllm`, and Triton
# imports this package: the earliest moment at which an installed package gets to run at all.
metadata.install()
