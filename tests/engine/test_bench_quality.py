"""`vllm-dvlm bench quality|frontier` through the real engine, on a random checkpoint.

A random model answers no question, so `quality` only hears what it says; that becomes the accepted answer of three
questions in four. Every number of quality that `frontier`, another process with other batches, then prints is known
beforehand: answers and tables are reproducible for a seed.
"""

import csv
import json
from pathlib import Path

import pytest

from vllm_dvlm.bench.scoring import normalise, wilson_interval
from vllm_dvlm.cli import main
from vllm_dvlm.synthetic.checkpoint_files import Sizes
from vllm_dvlm.synthetic.random_checkpoint import write_random_checkpoint

NUM = 8
SETTINGS = ["unpruned", "redvtp_50", "random_25", "fastv_L1_25", "refresh32_unpruned", "refresh32_threshold_redvtp_25"]
OPTIONS = ["--threads", "1", "--batch", "4", "--seed", "5", "--settings", *SETTINGS]
BAD_LINES = {2: "oops", 5: '{"image": "images/none.png", "question": "?", "answer": "x"}'}


def run(command: str, folder: Path, name: str, *options: str) -> dict[str, Path]:
    """Run a bench; its output files by kind."""
    kinds = ("json", "csv", "png", "answers")
    files = {kind: folder / f"{name}.{kind}" for kind in kinds}
    given = [f"--{kind}={path}" for kind, path in files.items()]
    assert main(["bench", command, "--model", str(folder / "model"), *OPTIONS, *given, *options]) == 0
    return files


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["setting"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def environment():
    """The commands set variables for their children; put back afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        for name in ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def runs(environment, tmp_path_factory):
    """A run of `quality` and one of `frontier`: their files, what the first one said, and the folder."""
    folder = tmp_path_factory.mktemp("quality")
    # Few patches per tile: the prompt has some 230 tokens, the system text among them.
    write_random_checkpoint(folder / "model", Sizes(patch=40, vocab_rows=4096), seed=0)
    quality = run("quality", folder, "quality", "--num", str(NUM))
    said: dict[str, list[str]] = {}
    for line in quality["answers"].read_text().splitlines():
        row = json.loads(line)
        said.setdefault(row["setting"], []).append(row["answer"])
    assert main(["bench", "quality", "--num", str(NUM), "--seed", "5", "--write-jsonl", str(folder)]) == 0
    lines = []
    for index, line in enumerate((folder / "questions.jsonl").read_text().splitlines()):
        answer = f"  {said['unpruned'][index].upper()}. " if index % 4 else "something else"
        lines.append(json.dumps(json.loads(line) | {"answer": answer}))
    for number, text in BAD_LINES.items():
        lines.insert(number - 1, text)
    (folder / "known.jsonl").write_text("\n".join(lines))
    options = ("--data", str(folder / "known.jsonl"), "--repeats", "1", "--alone", "1", "--pool-prompts", "2")
    return {"quality": quality, "frontier": run("frontier", folder, "frontier", *options), "said": said}


def num_right(said: dict[str, list[str]], setting: str) -> int:
    pairs = zip(said[setting], said["unpruned"], strict=True)
    return sum(index % 4 > 0 and normalise(a) == normalise(b) for index, (a, b) in enumerate(pairs))


def test_second_run_says_the_same_and_scores_as_known(runs):
    first = [json.loads(line) for line in runs["quality"]["answers"].read_text().splitlines()]
    second = [json.loads(line) for line in runs["frontier"]["answers"].read_text().splitlines()]
    assert [(row["setting"], row["index"], row["answer"]) for row in first] == [
        (row["setting"], row["index"], row["answer"]) for row in second
    ]
    before, rows = rows_of(runs["quality"]["csv"]), rows_of(runs["frontier"]["csv"])
    assert set(rows) == set(before) == set(SETTINGS)
    for name, row in rows.items():
        right = num_right(runs["said"], name)
        assert float(row["exact"]) == right / NUM
        assert (float(row["low"]), float(row["high"])) == wilson_interval(right, NUM)
        assert float(row["relative"]) == right / (NUM * 3 / 4)
        # What the accepted answers do not decide is the same in both.
        for column in ("flops", "mode", "method", "layer", "keep", "positions"):
            assert row[column] == before[name][column], column
    assert float(rows["unpruned"]["exact"]) == 3 / 4


def test_settings_reach_the_engine(runs):
    """Different settings say different things at different cost."""
    said, rows = runs["said"], rows_of(runs["quality"]["csv"])
    assert len({tuple(answers) for answers in said.values()}) == len(SETTINGS)
    flops = {name: float(row["flops"]) for name, row in rows.items()}
    assert flops["unpruned"] == 1 > flops["redvtp_50"] > flops["random_25"] > flops["fastv_L1_25"]
    visual = {name: float(row["visual"]) for name, row in rows.items()}
    num = int(visual["unpruned"])
    assert (visual["redvtp_50"], visual["random_25"]) == (num // 2, num // 4)
    assert float(rows["refresh32_threshold_redvtp_25"]["steps"]) < float(rows["unpruned"]["steps"]) == 8


def test_figures_of_quality(runs):
    figures = json.loads(runs["quality"]["json"].read_text())
    assert figures["Q_exact_match_unpruned"] == figures["Q_exact_match_unpruned_colour"] == 0
    assert figures["Q_redvtp_50_relative"] is None, "nothing to compare with"
    assert figures["Q_fastv_L1_25_flops_saved"] > 0.6
    assert (figures["questions"], figures["bad_rows"]) == (NUM, 0)
    assert {"machine", "threads", "dtype", "seed", "commit", "date", "data"} <= set(figures)
    assert runs["quality"]["png"].read_bytes().startswith(b"\x89PNG")


def test_figures_of_frontier_and_bad_rows(runs):
    figures, rows = json.loads(runs["frontier"]["json"].read_text()), rows_of(runs["frontier"]["csv"])
    assert (figures["questions"], figures["bad_rows"], figures["bad_row_lines"]) == (NUM, 2, "2, 5")
    assert figures["F_redvtp_50_exact_match"] == num_right(runs["said"], "redvtp_50") / NUM
    for row in rows.values():
        assert float(row["answers/s"]) > 0 and float(row["alone_ms"]) > 0
        assert float(row["x_min"]) <= float(row["x_exact"]) <= float(row["x_max"])
    assert float(rows["unpruned"]["x_exact"]) == float(rows["refresh32_unpruned"]["x_cache"]) == 1
    in_flight = {name: int(row["in_flight"]) for name, row in rows.items()}
    assert in_flight["unpruned"] == 2, "the pool holds two unpruned requests"
    assert in_flight["random_25"] > 2, "what pruning frees lets others in"
    assert any(row["front"] for row in rows.values())
    assert runs["frontier"]["png"].read_bytes().startswith(b"\x89PNG")


def test_file_without_a_good_row_ends_with_a_message(environment, tmp_path, capfd):
    path, model = tmp_path / "bad.jsonl", tmp_path / "model"
    path.write_text("oops\n")
    model.mkdir()
    config = {"architectures": ["LlavaLLaDAModelLM"], "num_hidden_layers": 4}
    (model / "config.json").write_text(json.dumps(config))
    assert main(["bench", "quality", "--model", str(model), "--data", str(path), *OPTIONS]) == 2
    assert "no usable question; line 1: not JSON" in capfd.readouterr().err
