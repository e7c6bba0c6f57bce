"""What a measurement hands back: lines of a table and flat figures. Light to import."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from vllm_dvlm.bench.common import Row

Time = tuple[float, float]  # seconds: wall, and processor time of all threads


@dataclasses.dataclass
class Result:
    """Lines of the tables and the flat figures."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    growth: list[Row] = dataclasses.field(default_factory=list)
    figures: Row = dataclasses.field(default_factory=dict)
    description: Row = dataclasses.field(default_factory=dict)
    peak_rss_bytes: int = 0  # of the process that measured

    def ratio(
        self,
        key: str,
        setting: str,
        ours: Sequence[Time],
        theirs: Sequence[Time],
        against: str,
        target: Any,
        **more: Any,
    ) -> None:
        """Add a line and a figure: median over interleaved repeats of theirs / ours, in wall time.

        more: further columns.

        `<key>_cpu_time` is the same ratio in processor time. The two agree on an idle machine; where others compute
        too, the latter says what the former would be (with one thread; several wait for each other busily).
        """
        ratios = [b[0] / a[0] for a, b in zip(ours, theirs, strict=True)]
        self.figures[key] = statistics.median(ratios)
        cpu_ratio = statistics.median(b[1] / a[1] for a, b in zip(ours, theirs, strict=True))
        self.figures[key + "_cpu_time"] = cpu_ratio
        self.rows.append(
            {
                "figure": key.split("_")[0],
                "setting": setting,
                "engine_ms": 1000 * statistics.median(wall for wall, _ in ours),
                "against": against,
                "other_ms": 1000 * statistics.median(wall for wall, _ in theirs),
                "value": self.figures[key],
                "low": min(ratios),
                "high": max(ratios),
                "cpu_time": cpu_ratio,
                "target": "" if target is None else f">= {target}",
                "met": "" if target is None else "yes" if self.figures[key] >= target else "NO",
                **more,
            }
        )

    def value(self, key: str, setting: str, value: Any, target: str = "", met: bool | None = None, **more: Any) -> None:
        """Add a line and a figure that is no ratio."""
        self.figures[key] = value
        line = {"figure": key.split("_")[0], "setting": setting, "value": value, "target": target}
        self.rows.append(line | {"met": "" if met is None else "yes" if met else "NO"} | more)
