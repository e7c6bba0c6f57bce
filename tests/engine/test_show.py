"""`vllm-dvlm show`: a traced request as a picture and as a moving one."""

import numpy as np
import pytest
from PIL import Image

from tests.golden import cases
from vllm_dvlm.cli import main

CASE = "f1_redvtp_keep25"


@pytest.fixture(scope="module")
def trace(engine):
    """A trace file of a pruned request, and its picture."""
    case = cases.load(CASE)
    engine.run_case(case)
    return engine.trace_dir / f"{CASE}.json", cases.IMAGE_FOLDER / case.image_records[0]["file"]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_moving(trace, tmp_path, suffix):
    """A frame per step behind one of the empty canvas; written cells get coloured, dropped patches veiled."""
    file, picture = trace
    out = tmp_path / f"shown{suffix}"
    assert main(["show", str(file), "--image", str(picture), "--out", str(out)]) == 0
    with Image.open(out) as shown:
        assert shown.n_frames == len(cases.load(CASE).steps) + 1
        frames = []
        for number in range(shown.n_frames):
            shown.seek(number)
            frames.append(np.asarray(shown.convert("RGB")).astype(int))
    green = [int(((f[..., 1] > f[..., 0] + 15) & (f[..., 1] > f[..., 2] + 15)).sum()) for f in frames]
    coloured = [int((f.max(-1) - f.min(-1) > 40).sum()) for f in frames]
    assert coloured[-1] > coloured[1] > coloured[0] or green[-1] > green[0]
    left = np.s_[40:100, 12:312]  # the picture
    assert (frames[0][left] != frames[1][left]).mean() > 0.3
    assert np.abs(frames[1][left] - frames[-1][left]).mean() < 6  # both formats lose a little


def test_still(trace, tmp_path):
    file, picture = trace
    out = tmp_path / "shown.png"
    assert main(["show", str(file), "--image", str(picture), "--out", str(out)]) == 0
    with Image.open(out) as shown:
        assert shown.width > 1000


def test_pictures_that_do_not_match(trace, tmp_path, capsys):
    file, picture = trace
    words = ["show", str(file), "--image", str(picture), "--image", str(picture), "--out", str(tmp_path / "x.gif")]
    assert main(words) == 2 and "name each once" in capsys.readouterr().err
