"""`bench quality` and `bench frontier` without an engine: questions, scores, settings, tables and figures."""

import base64
import csv
import dataclasses
import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vllm_dvlm.bench import child, frontier, quality, question_job, questions, scoring, settings_grid
from vllm_dvlm.bench.frontier import Part
from vllm_dvlm.bench.quality import Scored
from vllm_dvlm.bench.questions import Item
from vllm_dvlm.bench.result import Result
from vllm_dvlm.bench.settings_grid import Mode, Setting
from vllm_dvlm.checkpoint.anyres import num_visual_tokens
from vllm_dvlm.checkpoint.configuration import load_config, resolve_vision_config
from vllm_dvlm.cli import build_parser, main
from vllm_dvlm.families import LAVIDA_LLADA
from vllm_dvlm.placement import resolve
from vllm_dvlm.settings import ServerSettings

# -- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "accepted", "right"),
    [
        ("red", ["red"], True),
        ("  Red.\n", ["red"], True),
        ("row 4\n column  5", ["Row 4 column 5."], True),
        ("STRASSE", ["straße"], True),
        ("left", ["right", "Left"], True),
        ("red..", ["red"], False),
        ("dark red", ["red"], False),
        ("", ["red"], False),
        ("3.5", ["35"], False),
    ],
)
def test_normalised_answers(said, accepted, right):
    assert scoring.is_match(said, accepted) == right


@pytest.mark.parametrize(
    ("num_right", "num", "low", "high"),
    # Newcombe 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_of_the_literature(num_right, num, low, high):
    assert scoring.wilson_interval(num_right, num) == pytest.approx((low, high), abs=5e-5)
    mirrored = scoring.wilson_interval(num - num_right, num)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert 0 <= mirrored[0] < mirrored[1] <= 1


def test_paired_ratio():
    same = [True] * 30 + [False] * 10
    assert scoring.paired_ratio(same, same) == (1, 1, 1), "no difference, no uncertainty"
    # 20 both, 10 only the base, 5 only this one: 25 of 40 against 30 of 40.
    right = [True] * 20 + [False] * 10 + [True] * 5 + [False] * 5
    ratio, low, high = scoring.paired_ratio(right, same)
    assert ratio == pytest.approx(25 / 30)
    assert (low, high) == pytest.approx((0.63160, 1.09950), abs=1e-5)  # exp(log(5/6) -+ 1.95996 * sqrt(15/750))
    assert scoring.paired_ratio([False] * 40, same) == (0, None, None)
    assert scoring.paired_ratio(same, [False] * 40) == (None, None, None)


# -- questions -----------------------------------------------------------------------------------------------------


def png(color=(200, 30, 30), size=(12, 8)) -> bytes:
    return questions._png(np.full((size[1], size[0], 3), color, dtype=np.uint8))


def huge_png(side: int) -> bytes:
    """A few bytes that announce a square of this many pixels per side."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(head)) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png(size=(64, 64))[:-40])
    (tmp_path / "text.png").write_bytes(b"no picture")
    (tmp_path / "large.png").write_bytes(huge_png(9_000))
    (tmp_path / "huge.png").write_bytes(huge_png(200_000))
    return tmp_path


GOOD = {"image": "good.png", "question": "What colour?", "answer": "red"}
BAD = {
    b"oops": "not JSON",
    b'{"image": "good.png", "question": "\xff", "answer": "red"}': "not JSON",
    b"[" * 100_000: "not JSON",
    b'["good.png", "What?", "red"]': "an object is expected, not a list",
    b"3": "an object is expected, not a number",
    json.dumps(GOOD | {"answr": "x"}): "unknown field 'answr'",
    json.dumps({k: v for k, v in GOOD.items() if k != "question"}): "'question' is missing",
    json.dumps(GOOD | {"question": " "}): "'question' must be text",
    json.dumps(GOOD | {"question": 3}): "'question' must be text",
    json.dumps(GOOD | {"kind": ["colour"]}): "'kind' must be text",
    json.dumps({k: v for k, v in GOOD.items() if k != "answer"}): "'answer' must be text or a list",
    json.dumps(GOOD | {"answer": []}): "'answer' must be text or a list",
    json.dumps(GOOD | {"answer": ["red", 3]}): "'answer' must be text or a list",
    json.dumps({k: v for k, v in GOOD.items() if k != "image"}): "either 'image' or 'images'",
    json.dumps(GOOD | {"images": ["good.png"]}): "either 'image' or 'images'",
    json.dumps(GOOD | {"image": 3}): "'image' must be a path",
    json.dumps({**GOOD, "image": None, "images": []}): "'images' a list",
    json.dumps(GOOD | {"image": "none.png"}): "image none.png does not exist",
    json.dumps(GOOD | {"image": "."}): "cannot be read",
    json.dumps(GOOD | {"image": "text.png"}): "image text.png cannot be read",
    json.dumps(GOOD | {"image": "cut.png"}): "image cut.png cannot be read",
    json.dumps(GOOD | {"image": "huge.png"}): "is too large to decode",
    json.dumps(GOOD | {"image": "large.png"}): "image large.png of 9000x9000 pixels is too large",
    json.dumps(GOOD | {"image": "data:image/png,abc"}): "a data URL must be of the form",
    json.dumps(GOOD | {"image": "data:image/png;base64,a!"}): "data URL",
    json.dumps(GOOD | {"image": "data:image/png;base64,aGVsbG8="}): "image data URL cannot be read",
}


@pytest.mark.parametrize("limit", [None, 10**8])
def test_bad_rows_are_reported_by_line_and_the_rest_is_used(folder, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # an engine in this process takes Pillow's own away
    path = folder / "questions.jsonl"
    good = json.dumps(GOOD).encode()
    bad = [line if isinstance(line, bytes) else line.encode() for line in BAD]
    # An empty line after the first one: it is no row, but it counts as a line.
    path.write_bytes(b"\n".join([good, b"  ", *bad, good]))
    items, rows = questions.load_jsonl(path)
    assert [item.question for item in items] == ["What colour?"] * 2
    assert [row.line for row in rows] == list(range(3, 3 + len(bad)))
    for row, reason in zip(rows, BAD.values(), strict=True):
        assert reason in row.reason, str(row)
        assert str(row).startswith(f"line {row.line}: ")


def test_rows_of_every_form(folder):
    url = "data:image/png;base64," + base64.b64encode(png((0, 0, 9), (5, 7))).decode()
    rows = [GOOD, GOOD | {"answer": ["red", "crimson"], "kind": "colour"}, GOOD | {"image": url}]
    rows.append({"images": ["good.png", url], "question": "Same?", "answer": "no"})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items, bad = questions.load_jsonl(path)
    assert not bad
    assert [item.answers for item in items] == [("red",), ("red", "crimson"), ("red",), ("no",)]
    assert [item.kind for item in items] == [questions.NO_KIND, "colour", *[questions.NO_KIND] * 2]
    assert items[3].sizes == ((12, 8), (5, 7))
    assert [image.getpixel((0, 0)) for image in items[3].open_images()] == [(200, 30, 30), (0, 0, 9)]


def test_long_line_is_one_bad_row(folder, monkeypatch):
    monkeypatch.setattr(questions, "MAX_LINE_CHARS", 200)
    path = folder / "questions.jsonl"
    path.write_text(json.dumps(GOOD | {"question": "x" * 500}) + "\n" + json.dumps(GOOD) + "\n")
    items, (bad,) = questions.load_jsonl(path)
    assert len(items) == 1 and bad.line == 1 and "longer than" in bad.reason


def test_large_image_file_is_refused(folder, monkeypatch):
    monkeypatch.setattr(questions, "MAX_IMAGE_BYTES", 20)
    for source in (folder / "good.png", png()):
        with pytest.raises(ValueError, match="has more than"):
            questions.decode_image(source)


def test_file_without_a_good_row(folder, capsys):
    path = folder / "questions.jsonl"
    path.write_text("\noops\n")
    with pytest.raises(ValueError, match="no usable question; line 2: not JSON"):
        questions.load_items(str(path), 5, 0)
    with pytest.raises(ValueError, match="no file"):
        questions.load_items(str(folder / "none.jsonl"), 5, 0)
    assert main(["bench", "quality", "--data", str(path), "--write-jsonl", str(folder / "out")]) == 2
    assert "no usable question" in capsys.readouterr().err


def test_demo_questions_written_and_read_again(tmp_path, capsys):
    assert main(["bench", "quality", "--num", "12", "--seed", "3", "--write-jsonl", str(tmp_path)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "questions.jsonl"
    read, bad = questions.load_jsonl(path)
    made, _ = questions.load_items(None, 12, 3)
    assert not bad and len({item.kind for item in made}) > 1
    for a, b in zip(made, read, strict=True):
        assert (a.question, a.answers, a.kind, a.sizes) == (b.question, b.answers, b.kind, b.sizes)
        assert np.array_equal(*(np.asarray(item.open_images()[0]) for item in (a, b)))


def test_paths_of_other_files_stay(folder, monkeypatch):
    monkeypatch.chdir(folder)
    path = Path("questions.jsonl")
    path.write_text(json.dumps({"images": ["good.png", "good.png"], "question": "Same?", "answer": ["yes"]}) + "\n")
    items, _ = questions.load_jsonl(path)
    again, _ = questions.load_jsonl(questions.write_jsonl(Path("copy"), items))
    assert [source.resolve() for source in again[0].images] == [folder / "good.png"] * 2


# -- settings ------------------------------------------------------------------------------------------------------

GRID = settings_grid.grid((1, 2, 3), (2, 32), 1.0)


def test_every_setting_is_a_valid_request_with_a_name_of_its_own():
    assert GRID[0].name == settings_grid.BASE
    assert len({setting.name for setting in GRID}) == len(GRID) == 6 * (1 + 2 * 7 * 4)
    for setting in GRID:
        options = resolve(setting.options(), 8, ServerSettings(num_layers=4)).options
        assert options.prune_method == setting.method
        assert options.diffusion_refresh_interval == setting.mode.refresh
        assert options.diffusion_threshold == setting.mode.threshold
        if setting.method != "none":
            assert (options.prune_keep_ratio, options.prune_layer) == (setting.keep, setting.layer)
            assert options.prune_positions == setting.positions


def test_names():
    names = {setting.name for setting in GRID}
    assert {"redvtp_50", "fastv_L2_25", "random_10_keep", "refresh32_unpruned", "threshold_redvtp_75"} <= names
    assert "refresh2_threshold_diversity_25_keep" in names


@pytest.mark.parametrize("default", [settings_grid.quality_default, settings_grid.frontier_default])
@pytest.mark.parametrize("layers", [(1,), (1, 2, 3)])
def test_defaults_hold_what_the_figures_need(default, layers):
    names = {setting.name for setting in default(settings_grid.grid(layers, (2, 32), 1.0))}
    wanted = {"unpruned", "redvtp_50", "redvtp_25", "random_25", "refresh32_unpruned", f"fastv_L{layers[-1]}_25"}
    assert wanted <= names and len(names) < 70


@pytest.mark.parametrize("default", [settings_grid.quality_default, settings_grid.frontier_default])
def test_a_prefix_is_never_refreshed(default):
    everything = settings_grid.grid((1, 2), (2, 32), 1.0, attentions=LAVIDA_LLADA.attentions)
    for setting in everything:
        resolve(setting.options(), 8, ServerSettings(num_layers=4, architecture=LAVIDA_LLADA.architecture))
    assert len({setting.name for setting in everything}) == len(everything)
    names = {setting.name for setting in default(everything)}
    assert {"unpruned", "threshold_redvtp_25", "full_unpruned", "full_redvtp_50", "full_refresh32_unpruned"} <= names
    assert settings_grid.cached_mode(everything) == Mode() and len(names) < 70


def test_fastv_layers():
    assert [settings_grid.prune_layers(n) for n in (2, 3, 4, 32)] == [(1,), (1, 2), (1, 2, 3), (1, 16, 24)]


def test_chosen_settings():
    def names(patterns, *always):
        return [s.name for s in settings_grid.choose(GRID, GRID[:2], patterns, [Setting(Mode()), *always])]

    assert names(None) == ["unpruned", "redvtp_75"]
    assert names(["random_[15]*", "fastv_L3_10"]) == [
        "unpruned", "fastv_L3_10", "random_50", "random_10", "random_50_keep", "random_10_keep"
    ]  # fmt: skip
    assert names(["unpruned"], Setting(Mode(32))) == ["unpruned", "refresh32_unpruned"]
    assert len(names(["all"])) == len(GRID)
    with pytest.raises(ValueError, match="redvpt"):
        names(["redvpt_*"])


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    config = {"architectures": ["LlavaLLaDAModelLM"], "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("command", "options", "text"),
    [
        ("quality", ["--num", "0"], "--num"),
        ("quality", ["--batch", "0", "--steps", "0"], "--batch, --steps"),
        ("quality", ["--refresh", "0"], "--refresh"),
        ("quality", ["--keep-ratios", "1"], "--keep-ratios"),
        ("quality", ["--threshold", "0"], "--threshold"),
        ("quality", ["--fastv-layers", "4"], "--fastv-layers must be from 1 to 3"),
        ("quality", ["--settings", "redvpt"], "redvpt"),
        ("quality", ["--data", "none.jsonl"], "none.jsonl"),
        ("frontier", ["--repeats", "0"], "--repeats"),
        ("frontier", ["--serve", "0"], "--serve"),
    ],
)
def test_wrong_arguments(command, options, text, model, capsys):
    assert main(["bench", command, "--model", model, *options]) == 2
    assert text in capsys.readouterr().err


def test_model_is_the_demo_or_has_to_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(question_job, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(ValueError, match="--model"):
        question_job.model_of(None)
    (tmp_path / question_job.DEMO).mkdir(parents=True)
    (tmp_path / question_job.DEMO / "config.json").write_text("{}")
    assert Path(question_job.model_of(None)).resolve() == tmp_path / question_job.DEMO
    assert question_job.model_of("other") == "other"
    with pytest.raises(ValueError, match="No config"):
        question_job.family_and_layers(str(tmp_path / question_job.DEMO))


@pytest.mark.parametrize("name", ["demo_model", "demo_lavida"])
def test_shipped_models_can_be_asked(name):
    config = load_config(str(Path(__file__).parents[2] / "examples" / name))
    layout = config.image_layout(resolve_vision_config(config))
    assert config.num_hidden_layers == 4 and num_visual_tokens(168, 168, layout) == 145


def test_list_of_settings(model, capsys):
    assert main(["bench", "frontier", "--model", model, "--list-settings", "--settings", "redvtp_25"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(GRID)
    assert [line[2:] for line in lines if line[0] == "*"] == ["unpruned", "redvtp_25", "refresh32_unpruned"]


# -- tables and figures --------------------------------------------------------------------------------------------


def answers(right: str, flops: int, steps: int = 8, visual: int = 100):
    """One per character; "1" is a right one."""
    report = {"flops": flops, "denoise_steps": steps, "visual_tokens_after": visual}
    return [SimpleNamespace(text="", right=char == "1", report=report) for char in right]


ITEMS = [Item("?", ("x",), "colour" if index < 4 else "count", (), ()) for index in range(8)]
BASE_RIGHT = "11101110"
SAID = {
    Setting(Mode()): answers(BASE_RIGHT, 1000),
    Setting(Mode(), "redvtp", 0.5): answers("11101100", 600, visual=50),
    Setting(Mode(), "redvtp", 0.25): answers("11001001", 400, visual=25),
    Setting(Mode(), "fastv", 0.25, layer=2): answers("11101110", 350, visual=25),
    Setting(Mode(), "redvtp", 0.25, positions="keep"): answers("10000000", 400, visual=25),
    Setting(Mode(32)): answers("11101111", 200),
}


def measured_quality() -> Result:
    result = Result(description={"machine": "m"})
    for setting, said in SAID.items():
        scored = Scored(setting, ITEMS, said, SAID[Setting(Mode())])
        result.rows.append(scored.row() | {"req/s": 1.0})
        result.figures |= scored.figures()
    return result


def test_scored_row():
    rows = {row["setting"]: row for row in measured_quality().rows}
    row = rows["redvtp_25"]
    assert (row["exact"], row["lost"], row["won"]) == (4 / 8, 3, 1)
    assert (row["low"], row["high"]) == scoring.wilson_interval(4, 8)
    assert (row["exact_colour"], row["exact_count"]) == (2 / 4, 2 / 4)
    assert row["relative"] == pytest.approx(4 / 6) and row["rel_low"] < 4 / 6 < row["rel_high"]
    assert (row["flops"], row["steps"], row["visual"]) == (0.4, 8, 25)
    assert (rows["unpruned"]["relative"], rows["unpruned"]["flops"]) == (1, 1)


def test_kinds_only_where_there_are_several():
    one = [dataclasses.replace(item, kind="all") for item in ITEMS]
    base = SAID[Setting(Mode())]
    assert not [name for name in Scored(Setting(Mode()), one, base, base).row() if name.startswith("exact_")]


def report_of(command, module, result, monkeypatch, tmp_path, model, *options):
    """Run the command with these results in place of the engine's; JSON, CSV rows and PNG bytes."""
    monkeypatch.setattr(child, "run", lambda name, function, job: result)
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}
    arguments = ["bench", command, "--model", model, *options]
    assert main([*arguments, *(f"--{kind}={path}" for kind, path in files.items())]) == 0
    with files["csv"].open() as file:
        return json.loads(files["json"].read_text()), list(csv.DictReader(file)), files["png"]


def test_quality_report(monkeypatch, tmp_path, model, capsys):
    figures, rows, picture = report_of("quality", quality, measured_quality(), monkeypatch, tmp_path, model)
    assert figures["Q_exact_match_unpruned"] == 6 / 8
    assert figures["Q_redvtp_50_relative"] == pytest.approx(5 / 6)
    assert figures["Q_redvtp_25_relative"] == pytest.approx(4 / 6)
    assert figures["Q_redvtp_25_relative_colour"] == pytest.approx(2 / 3)
    assert figures["Q_redvtp_25_keep_relative"] == pytest.approx(1 / 6)
    assert figures["Q_fastv_L2_25_relative"] == 1
    assert figures["Q_fastv_L2_25_flops_saved"] == pytest.approx(0.65)
    assert figures["Q_exact_match_refresh32_unpruned"] == 7 / 8
    assert figures["Q_exact_match_unpruned_count"] == 3 / 4 and figures["machine"] == "m"
    assert [row["setting"] for row in rows] == [setting.name for setting in SAID]
    assert (rows[3]["method"], rows[3]["layer"], rows[4]["positions"]) == ("fastv", "2", "keep")
    with Image.open(picture) as image:
        assert image.height > image.width / 2, "two lines of panels: one per kind below the two for all questions"
    out = capsys.readouterr().out
    assert "Q_fastv_L2_25_flops_saved: 0.65" in out
    assert "positions" not in out and "Q_redvtp_25_relative_colour" not in out


def parts(*seconds: float, alone: float = 0.1) -> list[Part]:
    return [Part(s, s / 2, alone, alone / 2, 4) for s in seconds]


def test_ratios_are_taken_within_a_part():
    """A slow part of the run slows every setting; the ratio does not see it."""
    row = frontier.speed_row(parts(0.1, 0.5, 0.1), parts(0.2, 1.0, 0.3, alone=0.3), parts(0.1, 0.25, 0.1))
    assert row["x_exact"] == 2 and (row["x_min"], row["x_max"]) == pytest.approx((2, 3))
    assert row["x_cache"] == 1 and row["answers/s"] == pytest.approx(10)
    assert row["alone_x_exact"] == pytest.approx(3) and row["alone_ms"] == pytest.approx(100)
    assert frontier.speed_row(parts(0.1), parts(0.1), [])["x_cache"] is None


def test_front():
    rows = [
        {"answers/s": speed, "exact": exact} for speed, exact in ((1, 0.9), (2, 0.8), (3, 0.8), (4, 0.1), (4, 0.05))
    ]
    frontier.mark_front(rows)
    assert [row["front"] for row in rows] == ["*", "", "*", "*", ""]


def test_cache_baseline_is_the_longest_interval():
    assert frontier.cache_baseline(GRID) == Setting(Mode(32))
    assert frontier.cache_baseline([Setting(Mode()), Setting(Mode(32), "redvtp", 0.5)]) is None


def test_frontier_report(monkeypatch, tmp_path, model, capsys):
    result = Result(description={"machine": "m"})
    seconds = dict(zip(SAID, (0.4, 0.3, 0.2, 0.2, 0.2, 0.1), strict=True))
    columns = ("setting", *quality.PARTS_OF_NAME, "exact", "low", "high", "relative", "flops")
    for row, setting in zip(measured_quality().rows, SAID, strict=True):
        speed = frontier.speed_row(parts(seconds[setting]), parts(0.4), parts(0.1))
        result.rows.append({name: row[name] for name in columns} | speed)
    frontier.mark_front(result.rows)
    figures, rows, picture = report_of("frontier", frontier, result, monkeypatch, tmp_path, model)
    assert figures["F_redvtp_25_x_exact"] == 2 and figures["F_redvtp_25_x_cache"] == 0.5
    assert figures["F_redvtp_25_exact_match"] == 0.5 and figures["F_redvtp_25_answers_per_s"] == 5
    assert [row["setting"] for row in rows if row["front"]] == ["refresh32_unpruned"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "F_redvtp_25_x_cache: 0.5" in capsys.readouterr().out


def test_every_command_is_there():
    for command in ("quality", "frontier"):
        assert build_parser().parse_args(["bench", command]).num == 1000
