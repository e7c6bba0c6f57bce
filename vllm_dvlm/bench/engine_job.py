"""Settings and results of `vllm-dvlm bench engine`: plain data that travels between its processes."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_dvlm.bench.checkpoint_files import Sizes
from vllm_dvlm.bench.common import Row


@dataclasses.dataclass(frozen=True)
class Job:
    """Settings of a measurement; plain data, it travels to a child process."""

    workdir: str
    seed: int
    repeats: int
    num_requests: int  # of the memory figure
    official_steps: int  # steps of the official loop that are timed
    canvas_length: int
    mid_sizes: Sizes
    logit_std: float
    threshold: float
    goldens: str | None
    quick: bool


@dataclasses.dataclass
class Result:
    """Lines of the tables and the flat figures."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    growth: list[Row] = dataclasses.field(default_factory=list)
    figures: Row = dataclasses.field(default_factory=dict)
    description: Row = dataclasses.field(default_factory=dict)

    def ratio(
        self, key: str, setting: str, ours: Sequence[float], theirs: Sequence[float], against: str, target: Any
    ) -> None:
        """Add a line and a figure: median over repeats of theirs / ours, both in seconds and in interleaved order."""
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        self.figures[key] = statistics.median(ratios)
        self.rows.append(
            {
                "figure": key.split("_")[0],
                "setting": setting,
                "engine_ms": 1000 * statistics.median(ours),
                "against": against,
                "other_ms": 1000 * statistics.median(theirs),
                "value": self.figures[key],
                "low": min(ratios),
                "high": max(ratios),
                "target": "" if target is None else f">= {target}",
                "met": "" if target is None else "yes" if self.figures[key] >= target else "NO",
            }
        )

    def value(self, key: str, setting: str, value: Any, target: str = "", met: bool | None = None, **more: Any) -> None:
        """Add a line and a figure that is no ratio."""
        self.figures[key] = value
        line = {"figure": key.split("_")[0], "setting": setting, "value": value, "target": target}
        self.rows.append(line | {"met": "" if met is None else "yes" if met else "NO"} | more)


def default_goldens() -> Path | None:
    """The repository's recordings if the current directory is the repository, else None."""
    folder = Path("tests/golden/llada_v")
    return folder.resolve() if folder.is_dir() else None


def check_goldens(folder: Path) -> None:
    """ValueError if the folder is not one of recordings with their builder."""
    for path in (folder, folder.parent / "cases.py", folder.parent.parent / "tiny_checkpoint.py"):
        if not path.exists():
            raise ValueError(f"--goldens {folder}: {path} is missing; name tests/golden/llada_v of a source tree.")
