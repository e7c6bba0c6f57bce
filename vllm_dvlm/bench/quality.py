"""`vllm-dvlm bench quality`: exact match per kind of question, for modes, pruning methods and keep ratios.

One engine answers the same questions under every setting, many at once. Answers are compared after
`scoring.normalise`: outer white space and one full stop at the end are dropped, inner white space is one space, case
does not count.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dvlm.bench import child, settings_grid
from vllm_dvlm.bench.common import Row, progress_bar, report
from vllm_dvlm.bench.question_job import Job, job_of
from vllm_dvlm.bench.question_job import add_arguments as add_common_arguments
from vllm_dvlm.bench.questions import Item, load_items, write_jsonl
from vllm_dvlm.bench.result import Result
from vllm_dvlm.bench.scoring import paired_ratio, wilson_interval
from vllm_dvlm.bench.settings_grid import BASE, Setting

if TYPE_CHECKING:
    from vllm_dvlm.bench.question_host import Answer

# Setting and numbers are in the printed table; these columns stand in the CSV alone, the name tells them.
PARTS_OF_NAME = ("mode", "method", "layer", "keep", "positions")
WORST_SHOWN = 10  # bad rows printed one by one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_common_arguments(parser)
    parser.add_argument("--write-jsonl", metavar="FOLDER", help="write the questions as pictures and JSONL, and end")


def kinds_of(items: Sequence[Item]) -> list[str]:
    """Kinds in alphabetical order; empty if all questions are of one."""
    kinds = sorted({item.kind for item in items})
    return kinds if len(kinds) > 1 else []


@dataclasses.dataclass(frozen=True)
class Scored:
    """Answers of one setting to all questions, beside those of the base to the same ones."""

    setting: Setting
    items: Sequence[Item]
    answers: Sequence["Answer"]
    base: Sequence["Answer"]

    def share(self, kind: str | None = None) -> float:
        """Exact match, of one kind of question or of all."""
        right = self._right(self.answers, kind)
        return sum(right) / len(right)

    def relative(self, kind: str | None = None) -> tuple[float | None, float | None, float | None]:
        """Exact match over that of the base, paired: (ratio, low, high)."""
        return paired_ratio(self._right(self.answers, kind), self._right(self.base, kind))

    @property
    def flops(self) -> float:
        """Counted FLOPs over those of the base."""
        return _total(self.answers, "flops") / _total(self.base, "flops")

    @property
    def name(self) -> str:
        return self.setting.name

    def row(self) -> Row:
        """Numbers for the table, except what depends on the machine."""
        right, base = self._right(self.answers, None), self._right(self.base, None)
        low, high = wilson_interval(sum(right), len(right))
        ratio, ratio_low, ratio_high = self.relative()
        setting = self.setting
        row: Row = {
            "setting": self.name,
            "mode": setting.mode.name,
            "method": setting.method,
            "layer": setting.layer,
            "keep": setting.keep,
            "positions": setting.positions,
            "exact": self.share(),
            "low": low,
            "high": high,
            "relative": ratio,
            "rel_low": ratio_low,
            "rel_high": ratio_high,
            "lost": sum(b and not a for a, b in zip(right, base, strict=True)),
            "won": sum(a and not b for a, b in zip(right, base, strict=True)),
        }
        row |= {f"exact_{kind}": self.share(kind) for kind in kinds_of(self.items)}
        return row | {
            "flops": self.flops,
            "steps": _total(self.answers, "denoise_steps") / len(self.answers),
            "visual": _total(self.answers, "visual_tokens_after") / len(self.answers),
        }

    def figures(self) -> Row:
        """Flat figures: Q_exact_match_unpruned, Q_redvtp_25_relative, Q_fastv_L2_25_flops_saved, and per kind."""
        kinds = kinds_of(self.items)
        figures: Row = {f"Q_exact_match_{self.name}": self.share()}
        figures |= {f"Q_exact_match_{self.name}_{kind}": self.share(kind) for kind in kinds}
        if self.name != BASE:
            figures |= {
                f"Q_{self.name}_relative": self.relative()[0],
                f"Q_{self.name}_flops_saved": 1 - self.flops,
            }
            figures |= {f"Q_{self.name}_relative_{kind}": self.relative(kind)[0] for kind in kinds}
        return figures

    def _right(self, answers: Sequence["Answer"], kind: str | None) -> list[bool]:
        return [a.right for a, item in zip(answers, self.items, strict=True) if kind in (None, item.kind)]


def _total(answers: Sequence["Answer"], name: str) -> int:
    return sum(answer.report[name] for answer in answers)


def load(job: Job) -> tuple[list[Item], Row]:
    """Questions, and what the description says of them; bad rows are told on stderr."""
    items, bad = load_items(job.data, job.num, job.seed)
    for row in bad[:WORST_SHOWN]:
        print(f"{job.data_name}, {row}: left out", file=sys.stderr)
    if len(bad) > WORST_SHOWN:
        print(f"{job.data_name}: {len(bad) - WORST_SHOWN} more rows left out", file=sys.stderr)
    description: Row = {"questions": len(items), "bad_rows": len(bad)}
    if bad:
        description["bad_row_lines"] = ", ".join(str(row.line) for row in bad)
    return items, description


def measure_quality(job: Job) -> Result:
    """In the child: every setting once with every question."""
    items, about = load(job)
    from vllm_dvlm.bench.question_host import QuestionHost

    host = QuestionHost(job, items)
    result = Result()
    # One question, so that the first setting does not pay for what is made on first use.
    host.ask(items[:1], job.settings[0], job.seed)
    said: dict[Setting, Sequence[Answer]] = {}
    with progress_bar("answers", len(job.settings) * len(items)) as bar:
        for setting in job.settings:
            asked = host.ask(items, setting, job.seed, on_answer=bar.update)
            said[setting] = asked.answers
            scored = Scored(setting, items, asked.answers, said[job.settings[0]])
            result.rows.append(scored.row() | {"req/s": len(items) / asked.wall_s})
            result.figures |= scored.figures()
    if job.answers:
        write_answers(Path(job.answers), items, said)
    result.description = host.describe() | about
    return result


def write_answers(path: Path, items: Sequence[Item], said: dict[Setting, Sequence["Answer"]]) -> None:
    """One line per setting and question; `index` counts the good rows from 0."""
    with path.open("w", encoding="utf-8") as file:
        for setting, answers in said.items():
            for index, (item, answer) in enumerate(zip(items, answers, strict=True)):
                row = {"setting": setting.name, "index": index, "kind": item.kind, "question": item.question}
                row |= {"accepted": item.answers, "answer": answer.text, "right": answer.right}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def headline(figures: Row) -> Row:
    """The few figures that are printed; the JSON file has them all."""
    wanted = (f"Q_exact_match_{BASE}", "_50_relative", "_25_relative", "_25_flops_saved")
    return {key: value for key, value in figures.items() if key.endswith(wanted)}


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. ValueError for arguments that cannot be met or a file without a good row."""
    if arguments.write_jsonl:
        items, _ = load_items(arguments.data, arguments.num, arguments.seed)
        print(write_jsonl(Path(arguments.write_jsonl), items))
        return 0
    job = job_of(arguments, settings_grid.quality_default)
    if arguments.list_settings:
        return 0
    result = child.run(__name__, "measure_quality", job)
    rows = result.rows

    def draw(axes: Sequence[Any]) -> None:
        _draw(axes, rows)

    panels = 2 + sum(name.startswith("exact_") for name in rows[0])
    report(
        arguments,
        rows,
        headline(result.figures),
        result.description | {"threshold": arguments.threshold},
        draw,
        csv_columns=PARTS_OF_NAME,
        json_only=result.figures,
        panels=panels,
    )
    return 0


def _draw(axes: Sequence[Any], rows: Sequence[Row]) -> None:
    """First panel: exact mode with 95 % intervals. Second: the other modes. Then one panel per kind, exact mode."""

    def lines(mode_is_exact: bool, column: str, panel: Any) -> None:
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            if row["method"] != "none" and (row["mode"] == "exact") == mode_is_exact:
                pruner = row["method"] if row["layer"] is None else f"{row['method']} L{row['layer']}"
                groups.setdefault((row["mode"], pruner, row["positions"]), []).append(row)
        pruners = list(dict.fromkeys(pruner for _, pruner, _ in groups))
        modes = list(dict.fromkeys(row["mode"] for row in rows if (row["mode"] == "exact") == mode_is_exact))
        for (mode, pruner, positions), points in groups.items():
            keep = [row["keep"] for row in points]
            label = " ".join([mode] * (mode != "exact") + [pruner] + ["kept positions"] * (positions == "keep"))
            number = (
                pruners.index(pruner) if mode_is_exact else modes.index(mode) * len(pruners) + pruners.index(pruner)
            )
            style = {"color": f"C{number % 10}", "linestyle": "--" if positions == "keep" else "-", "label": label}
            if column == "exact":
                below = [row["exact"] - row["low"] for row in points]
                above = [row["high"] - row["exact"] for row in points]
                panel.errorbar(keep, [row["exact"] for row in points], [below, above], marker="o", capsize=2, **style)
            else:
                panel.plot(keep, [row[column] for row in points], marker="o", **style)
        for row in rows:
            if row["method"] == "none" and (row["mode"] == "exact" or not mode_is_exact):
                known = row["mode"] in modes and not mode_is_exact
                color = f"C{modes.index(row['mode']) * max(1, len(pruners)) % 10}" if known else "k"
                panel.axhline(row[column], color=color, linestyle=":", label=f"unpruned, {row['mode']}")
        panel.set(xlabel="share of visual tokens kept", xlim=(1.03, 0), ylim=(0, 1.03))

    titles = ["all questions, exact mode", "all questions, other modes"]
    columns = ["exact", "exact", *[name for name in rows[0] if name.startswith("exact_")]]
    titles += [f"{name.removeprefix('exact_')}, exact mode" for name in columns[2:]]
    for number, (panel, column, title) in enumerate(zip(axes, columns, titles, strict=True)):
        lines(number != 1, column, panel)
        panel.set(ylabel="exact match", title=title)
        if number < 2:
            panel.legend(fontsize=6, ncols=2)
