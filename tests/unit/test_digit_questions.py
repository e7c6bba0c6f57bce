"""Questions about digits: the answers are right, the same every time, unambiguous, and about held-out digits."""

import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest

from vllm_dvlm.synthetic import digit_questions as questions

GRID = 4
NUM = 400


@pytest.fixture(scope="module")
def asked():
    """Scenes and their questions, every kind."""
    rng = np.random.default_rng(3)
    scenes = questions.draw_scenes(rng, np.arange(NUM) % len(questions.KINDS), GRID, GRID)
    return scenes, questions.paint(rng, scenes, GRID, GRID, questions.held_out_glyphs())


def table(scenes, i: int) -> dict[tuple[int, int], tuple[int, str]]:
    """What stands in each cell of picture `i`, counted from 1: (digit, colour)."""
    colours = list(questions.COLOURS)
    cells = zip(scenes.rows[i], scenes.columns[i], scenes.digits[i], scenes.colours[i], strict=True)
    return {(row + 1, column + 1): (digit, colours[colour]) for row, column, digit, colour in cells}


def possible_answers(question: str, cells: dict) -> list[str]:
    """Every answer that the words of a question allow, from what stands in the picture."""
    number = re.search(r"\d", question)
    digit = int(number[0]) if number else None
    places = [place for place, (found, _) in cells.items() if found == digit]
    if question.startswith("what colour"):
        return [cells[place][1] for place in places]
    if question.startswith("which digit"):
        return [str(found) for found, colour in cells.values() if f"is {colour}?" in question]
    if question.startswith("where"):
        names = ["first", "second", "third", "fourth"]
        return [f"{names[row - 1]} row {names[column - 1]} column" for row, column in places]
    if question.startswith("how many"):
        return [str(len(places))]
    step = -1 if " left " in question else 1
    beside = [cells.get((row, column + step)) for row, column in places]
    return [str(cell[0]) if cell else "nothing" for cell in beside]


def test_answers_follow_from_the_picture_and_nothing_else_would_do(asked):
    scenes, _ = asked
    for i in range(NUM):
        assert possible_answers(scenes.question(i), table(scenes, i)) == [scenes.answer(i)], scenes.question(i)


def test_pictures_show_what_the_scenes_say(asked):
    scenes, pictures = asked
    for i in range(50):
        cells = table(scenes, i)
        assert len(cells) == questions.NUM_DIGITS, "two digits in one cell"
        for row in range(GRID):
            for column in range(GRID):
                picture = pictures[i, row, column].astype(int)
                shown = cells.get((row + 1, column + 1))
                if shown is None:
                    assert picture.max() < 60
                    continue
                brightest = picture[picture.sum(-1) >= np.sort(picture.sum(-1).ravel())[-6]].mean(0)
                wanted = np.array(list(questions.COLOURS.values()))
                assert list(questions.COLOURS)[np.abs(wanted - brightest).sum(1).argmin()] == shown[1]


def test_relevant_digits_are_those_an_answer_needs(asked):
    scenes, _ = asked
    needed = scenes.relevant().sum(1)
    for i, kind in enumerate(questions.KINDS):
        of_kind = scenes.kinds == i
        if kind == "count":
            assert (needed[of_kind] == scenes.counts[of_kind]).all()
        else:
            assert (needed[of_kind] == (2 if kind == "beside" else 1)).all()


def test_joined_cells_keep_their_places(asked):
    pictures = asked[1]
    joined, patch = questions.join_cells(pictures), questions.PATCH
    assert joined.shape == (NUM, GRID * patch, GRID * patch, 3)
    assert (joined[5, patch : 2 * patch, 3 * patch :] == pictures[5, 1, 3]).all()


def test_held_out_questions_are_the_same_every_time_and_kinds_take_turns():
    first, again, other = questions.held_out(70), questions.held_out(70), questions.held_out(70, seed=1)
    assert [(q.question, q.answer, q.image.tobytes()) for q in first] == [
        (q.question, q.answer, q.image.tobytes()) for q in again
    ]
    assert [q.image.tobytes() for q in first] != [q.image.tobytes() for q in other]
    assert [q.kind for q in first] == list(questions.KINDS) * 14
    side = questions.GRID * questions.PATCH
    assert all(q.image.shape == (side, side, 3) and q.image.dtype == np.uint8 for q in first)


def test_held_out_digits_are_not_among_the_training_digits():
    training, held_out = questions.training_digits()[0], questions.held_out_digits()[0]
    assert (len(training), len(held_out)) == (1500, 297)
    digests = [{hashlib.sha256(digit.tobytes()).digest() for digit in part} for part in (training, held_out)]
    assert not digests[0] & digests[1]
    # What `held_out` paints with holds the held-out digits and no others: one copy per place.
    glyphs = questions.held_out_glyphs()
    assert len(glyphs.shapes) == 297 * questions.NUM_PLACES
    assert (glyphs.labels[:: questions.NUM_PLACES] == questions.held_out_digits()[1]).all()


def test_a_grid_that_is_too_small_or_too_large_is_refused():
    with pytest.raises(ValueError, match="2x2"):
        questions.draw_scenes(np.random.default_rng(0), np.zeros(3, dtype=int), 2, 2)
    with pytest.raises(ValueError, match="names up to 12"):
        questions.held_out(3, grid=13)


def test_importing_is_light():
    code = "import sys, vllm_dvlm.synthetic.digit_questions; print({'numpy', 'sklearn', 'torch'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "set()"
