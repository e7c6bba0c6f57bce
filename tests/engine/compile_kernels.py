"""Compile the scoring kernels to machine code of GPUs that need not be there; started by a test as a process.

    python -m tests.engine.compile_kernels CAPABILITY...

Prints a JSON list of {"kernel", "capability", "head", "dtype", "shared"}: bytes of shared memory that a program takes.
In a process of its own, without vLLM: on a CPU host vLLM's Triton is the interpreter.
"""

import importlib.util
import itertools
import json
import os
import sys
import types
from pathlib import Path

PROBE = Path(__file__).parents[2] / "vllm_dvlm" / "models" / "probe.py"
# Head widths of the releases, and another; 64 columns and 32 rows are the kernels' own.
HEADS = (64, 128)
SIZES = {"BLOCK_R": 32, "BLOCK_T": 64, "BLOCK_N": 64}
TYPES = {"lse": "*fp32", "out": "*fp32", "columns": "*i64", "scale": "fp32"}


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    import triton.language
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # The two names that the file takes from vLLM, which on a GPU host hands on Triton's.
    given = types.ModuleType("vllm.triton_utils")
    given.triton, given.tl = triton, triton.language
    sys.modules |= {"vllm": types.ModuleType("vllm"), "vllm.triton_utils": given}
    spec = importlib.util.spec_from_file_location("probe", PROBE)
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)

    found = []
    for capability, head in itertools.product(map(int, sys.argv[1:]), HEADS):
        sizes = SIZES | {"HEAD": head, "HEAD_PADDED": head}
        for dtype in ("fp32", "bf16"):
            types_of = TYPES | {"query": f"*{dtype}", "key": f"*{dtype}"}
            for kernel in (probe._denominator_kernel, probe._columns_kernel):
                arguments = kernel.arg_names
                constants = {(i,): sizes[name] for i, name in enumerate(arguments) if name in sizes}
                signature = {n: "constexpr" if n in sizes else types_of.get(n, "i32") for n in arguments}
                target = GPUTarget("cuda", capability, 32)
                compiled = triton.compile(ASTSource(kernel, signature, constants), target=target)
                assert compiled.asm["cubin"]
                row = {"kernel": kernel.__name__, "capability": capability, "head": head, "dtype": dtype}
                found.append(row | {"shared": compiled.metadata.shared})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
