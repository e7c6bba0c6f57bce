"""Settings of `vllm-dvlm bench engine`. Light to import."""

import dataclasses
from pathlib import Path

from vllm_dvlm.bench import child
from vllm_dvlm.synthetic.checkpoint_files import Sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(child.Job):
    """Settings of a measurement of one model."""

    workdir: str
    repeats: int
    num_requests: int  # of the memory figure
    official_steps: int  # steps of the official loop that are timed
    canvas_length: int
    mid_sizes: Sizes
    sizes_8b: Sizes  # small, in the proportions of the 8B model
    logit_std: float
    threshold: float
    goldens: str | None
    quick: bool


def default_goldens() -> Path | None:
    """The repository's recordings if the current directory is the repository, else None."""
    folder = Path("tests/golden/llada_v")
    return folder.resolve() if folder.is_dir() else None


def check_goldens(folder: Path) -> None:
    """ValueError if the folder is not one of recordings with their builder."""
    for path in (folder, folder.parent / "cases.py"):
        if not path.exists():
            raise ValueError(f"--goldens {folder}: {path} is missing; name tests/golden/llada_v of a source tree.")
