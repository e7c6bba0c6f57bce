"""Environment of a process that times engine and baselines side by side; nothing is imported here."""

import os

# One process for engine and baselines, and no pinning: vLLM would bind the engine's threads to cores of its choice,
# which the baselines in the same process could not undo.
PROCESS_ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def prepare(num_threads: int) -> None:
    """Set the environment of this process and its children; before torch or vLLM is imported."""
    os.environ.update(PROCESS_ENV, OMP_NUM_THREADS=str(num_threads))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
