"""Pruning methods, selection and the arithmetic that both sides of the engine share. No engine is started."""

import math
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.pruning_cases import CASES, MethodCase, as_read, make_view, raster_places, same_visual_tokens
from vllm_dvlm import pruning
from vllm_dvlm.placement import resolve
from vllm_dvlm.pruning import names
from vllm_dvlm.pruning.select import kept_prompt_rows, select
from vllm_dvlm.settings import ServerSettings
from vllm_dvlm.steps import VisualSpan, num_kept, pruned_prompt_len

every_method = pytest.mark.parametrize("case", CASES, ids=str)
reading_attention = pytest.mark.parametrize("case", [c for c in CASES if c.pruner().reads != "none"], ids=str)
NUM_VISUAL = (1, 2, 7, 64, 131)


# -- every method ----------------------------------------------------------------------------------------------


def test_table_names_every_method():
    assert {case.method for case in CASES} == set(names.METHODS)
    with_rows = {(c.method, c.knobs["rows"]) for c in CASES if "rows" in c.knobs}
    assert {rows for _, rows in with_rows} | {"masked"} == set(names.ROWS)


@every_method
@pytest.mark.parametrize("num_visual", NUM_VISUAL)
def test_importance_is_one_finite_float_per_visual_token(case, num_visual):
    importance = case.pruner().importance(make_view(num_visual))
    assert importance.shape == (num_visual,)
    assert importance.dtype == torch.float32
    assert importance.isfinite().all()


@every_method
def test_what_it_does_not_read_is_not_needed(case):
    view, pruner = make_view(40), case.pruner()
    assert torch.equal(pruner.importance(as_read(view, pruner)), pruner.importance(view))


@every_method
def test_same_view_same_importance(case):
    """Neither earlier requests nor another instance change it, and the view is left alone."""
    view, pruner = make_view(57), case.pruner()
    before = {name: x.clone() for name, x in vars(view).items() if isinstance(x, torch.Tensor)}
    first = pruner.importance(view)
    pruner.importance(make_view(33, seed=5, request_seed=12))
    assert torch.equal(pruner.importance(view), first)
    assert torch.equal(case.pruner().importance(make_view(57)), first)
    for name, x in before.items():
        assert torch.equal(getattr(view, name), x), name
    with pytest.raises(FrozenInstanceError):
        pruner.rows = "changed"


@every_method
@pytest.mark.parametrize("keep_ratio", [0.01, 0.1, 0.25, 0.5, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("num_visual", NUM_VISUAL)
def test_kept_are_ascending_and_as_many_as_asked(case, num_visual, keep_ratio):
    count = num_kept(num_visual, keep_ratio)
    kept = select(case.pruner().importance(make_view(num_visual)), count).tolist()
    assert len(kept) == count
    assert kept == sorted(set(kept))
    assert kept[0] >= 0 and kept[-1] < num_visual


@every_method
def test_a_larger_keep_ratio_keeps_the_same_and_more(case):
    importance = case.pruner().importance(make_view(90))
    kept = [set(select(importance, k).tolist()) for k in range(1, 91)]
    assert all(small < large for small, large in zip(kept, kept[1:], strict=False))


@reading_attention
def test_equal_visual_tokens_keep_the_first(case):
    importance = case.pruner().importance(same_visual_tokens(make_view(50)))
    assert select(importance, 13).tolist() == list(range(13))


@reading_attention
def test_images_are_ranked_together(case):
    """The second image's tokens, all looked at ten times as much, take every place."""
    view = make_view(60)
    factor = torch.cat([torch.ones(40), torch.full((20,), 1e6)])  # 40 tokens of one image, 20 of the next
    looked_at = replace(
        view,
        attention=view.attention * factor,
        prompt_attention=view.prompt_attention * factor,
        visual_attention=view.visual_attention * factor,
    )
    kept = select(case.pruner().importance(looked_at), 25).tolist()
    assert kept[5:] == list(range(40, 60))


def test_rows_are_the_ones_named():
    """Each choice of rows is the mean over exactly those rows of the attention matrix."""
    view = make_view(30, canvas_len=6, num_text=9)
    masked, committed = view.attention[view.is_masked], view.attention[view.is_committed]
    with_text = view.attention.sum(0) + view.prompt_attention
    expected = {
        "masked": masked.mean(0),
        "committed": committed.mean(0),
        "last": view.attention[5],
        "response_prompt": with_text / 15,
        "all": (with_text + view.visual_attention) / 45,
    }
    assert set(expected) == set(names.ROWS)
    for case in CASES:
        if case.method in ("redvtp", "fastv"):
            rows = case.knobs.get("rows", "masked")
            assert torch.allclose(case.pruner().importance(view), expected[rows], rtol=1e-6, atol=0), str(case)


def test_no_row_left_is_not_a_division_by_zero():
    view = make_view(12)
    full = replace(view, is_masked=torch.zeros_like(view.is_masked))
    assert not MethodCase("redvtp").pruner().importance(full).any()


@pytest.mark.parametrize("method, rows", [("redvtp", "last"), ("fastv", "committed")])
def test_rows_that_a_method_does_not_take(method, rows):
    with pytest.raises(ValueError, match="prune_rows"):
        pruning.create(method, rows)


# -- single methods --------------------------------------------------------------------------------------------


# Rows with the newline token are powers of two in the first four.
@pytest.mark.parametrize("rows, columns", [(12, 16), (7, 32), (16, 32), (32, 64), (27, 27), (27, 28), (1, 40), (3, 1)])
def test_uniform_gives_every_rectangle_its_share(rows, columns):
    importance = MethodCase("uniform").pruner().importance(view_of_map(rows, columns))
    num = rows * columns
    for count in sorted({max(1, round(num * share)) for share in (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1)}):
        assert unevenness(select(importance, count), rows, columns) <= max(2, math.log2(num))


def test_even_indices_and_random_ones_are_not_even_over_the_map():
    """What the bound above is worth."""
    rows, columns = 16, 32
    num = rows * columns
    every_eighth = torch.arange(0, num, 8)
    assert unevenness(every_eighth, rows, columns) > math.log2(num)
    importance = MethodCase("random").pruner().importance(view_of_map(rows, columns))
    assert unevenness(select(importance, num // 4), rows, columns) > math.log2(num)


def test_uniform_gives_every_image_its_share():
    places = torch.cat([raster_places(144, 12), raster_places(128, 16), raster_places(64, 8)])
    view = replace(make_view(len(places), canvas_len=4, num_text=1), visual_places=places)
    kept = select(MethodCase("uniform").pruner().importance(view), 84)
    for first, num in ((0, 144), (144, 128), (272, 64)):
        assert abs(((kept >= first) & (kept < first + num)).sum() - num / 4) <= 3


def view_of_map(rows, columns):
    view = make_view(rows * columns, canvas_len=4, num_text=1)
    return replace(view, visual_places=raster_places(rows * columns, columns))


def unevenness(kept, rows, columns):
    """Largest distance of the number kept in any rectangle of the map from its share."""
    above = torch.full((rows * columns,), -len(kept) / (rows * columns), dtype=torch.float64)
    above[kept] += 1
    sums = torch.zeros(rows + 1, columns + 1, dtype=torch.float64)
    sums[1:, 1:] = above.view(rows, columns).cumsum(0).cumsum(1)
    bands = sums[None] - sums[:, None]  # rows a up to b, columns up to c
    return float((bands.amax(dim=2) - bands.amin(dim=2)).max())


def test_random_follows_the_seed():
    pruner = MethodCase("random").pruner()
    kept = [select(pruner.importance(make_view(200, request_seed=seed)), 50).tolist() for seed in range(5)]
    assert len({tuple(k) for k in kept}) == 5
    again = make_view(200, seed=9, request_seed=3)  # other numbers, the same seed
    assert select(pruner.importance(again), 50).tolist() == kept[3]


def test_random_takes_any_seed():
    view = make_view(20, request_seed=2**64 + 5)
    assert MethodCase("random").pruner().importance(view).isfinite().all()


def test_diversity_drops_duplicates_first():
    """Forty copies of the pivots, ten tokens unlike any: those ten stay."""
    view = make_view(50, width=64)
    embeds = torch.zeros(50, 64)
    embeds[:, 0] = 1
    odd = torch.tensor([3, 8, 13, 18, 23, 28, 33, 38, 43, 47])
    embeds[odd] = torch.eye(64)[1:11]
    pruner = MethodCase("diversity", {"num_pivots": 2}).pruner()  # tokens 0 and 49
    kept = select(pruner.importance(replace(view, visual_embeds=embeds)), 12).tolist()
    assert kept == sorted([0, 49, *odd.tolist()])


# -- third-party methods ---------------------------------------------------------------------------------------

MODULE = '''
from dataclasses import dataclass
import torch
from vllm_dvlm.pruning import Pruner

@dataclass(frozen=True)
class Tail(Pruner):
    """Later tokens matter more."""

    def importance(self, view):
        return torch.arange(view.visual_embeds.shape[0], dtype=torch.float32)
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install(entry)``: a distribution on sys.path with a module and an entry point ``entry`` to its class."""

    def write(entry):
        info = tmp_path / "made_up_pruner-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up-pruner\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[vllm_dvlm.pruners]\n{entry} = made_up_pruner:Tail\n")
        (tmp_path / "made_up_pruner.py").write_text(MODULE)
        monkeypatch.syspath_prepend(tmp_path)
        names.targets.cache_clear()

    yield write
    sys.modules.pop("made_up_pruner", None)
    monkeypatch.undo()
    names.targets.cache_clear()


def test_third_party_method(install):
    with pytest.raises(ValueError, match="prune_method"):
        resolve({"prune_method": "tail"}, 8, ServerSettings())
    install("tail")
    assert pruning.known_methods()[-1] == "tail"
    assert resolve({"prune_method": "tail"}, 8, ServerSettings()).options.prune_method == "tail"
    assert "made_up_pruner" not in sys.modules, "checking a name imports nothing"
    view = make_view(20)
    pruner = pruning.create("tail")
    assert select(pruner.importance(as_read(view, pruner)), 5).tolist() == [15, 16, 17, 18, 19]


@pytest.mark.parametrize("name", ["redvtp", "none"])
def test_third_party_method_with_a_taken_name(install, name):
    install(name)
    with pytest.raises(ValueError, match=f"{name}.*declared twice.*rename.*made_up_pruner:Tail"):
        pruning.known_methods()


# -- selection and the numbers of both sides -------------------------------------------------------------------

values = st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.25, 1e-30, 1e30]) | st.floats(-10, 10, width=32), min_size=1)


@settings(max_examples=300, deadline=None)
@given(values, st.data())
def test_selection_is_the_stable_ranking(importance, data):
    count = data.draw(st.integers(1, len(importance)))
    kept = select(torch.tensor(importance, dtype=torch.float32), count).tolist()
    exact = torch.tensor(importance, dtype=torch.float32).tolist()
    best = sorted(range(len(exact)), key=lambda i: (-exact[i], i))[:count]
    assert kept == sorted(best)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=4), st.data())
def test_both_sides_agree_on_the_pruned_prompt(parts, data):
    """Scheduler and worker compute the new length from the options; the rows that survive have that length."""
    spans, end = [], 0
    for gap, length in parts:  # text, image, text, image ...
        spans.append(VisualSpan(end + gap, end + gap + length))
        end = spans[-1].end
    prompt_len = end + data.draw(st.integers(0, 9))
    keep_ratio = data.draw(st.floats(0.001, 1.0))
    num_visual = sum(map(len, spans))

    resolved = resolve({"prune_method": "redvtp", "prune_keep_ratio": keep_ratio}, 8, ServerSettings())
    plan = resolved.plan(prompt_len)
    pruned = resolved.pruned_plan(plan, num_visual)
    count = num_kept(num_visual, keep_ratio)
    assert 1 <= count <= num_visual and count == max(1, int(num_visual * keep_ratio))
    assert pruned_prompt_len(prompt_len, num_visual, keep_ratio) == prompt_len - num_visual + count
    if count == num_visual:
        assert pruned is None
        return
    assert pruned == replace(plan, prompt_len=prompt_len - num_visual + count)

    visual = torch.cat([torch.arange(s.start, s.end) for s in spans])
    text = torch.tensor(sorted(set(range(prompt_len)) - set(visual.tolist())), dtype=torch.int64)
    kept = select(torch.rand(num_visual, generator=torch.Generator().manual_seed(num_visual)), count)
    rows = kept_prompt_rows(prompt_len, visual, kept, text).tolist()
    assert len(rows) == pruned.prompt_len
    assert rows == sorted(text.tolist() + visual[kept].tolist())


def test_nothing_to_prune_is_no_plan():
    for extra_args, num_visual in (
        ({"prune_method": "none"}, 10),
        ({"prune_method": "redvtp"}, 0),
        ({"prune_method": "redvtp", "prune_keep_ratio": 1.0}, 10),
        ({"prune_method": "redvtp", "prune_keep_ratio": 0.1}, 1),
    ):
        resolved = resolve(extra_args, 8, ServerSettings())
        assert resolved.pruned_plan(resolved.plan(20), num_visual) is None
    resolved = resolve({"prune_method": "redvtp"}, 8, ServerSettings())
    assert resolved.pruned_plan(resolved.plan(20), 10).prompt_len == 15


def test_parts_of_another_prompt_are_refused():
    with pytest.raises(AssertionError, match="do not make up the prompt"):
        kept_prompt_rows(9, torch.arange(4), torch.arange(2), torch.arange(4, 8))


def test_another_method_than_the_servers():
    """The server's layer and rows are those of its method; they do not stand in the way of a request with another."""
    server = {"prune_method": "fastv", "prune_layer": 2, "prune_rows": "last", "prune_keep_ratio": 0.3}
    server_settings = ServerSettings.from_additional_config({"dvlm": server})
    same = resolve({"prune_method": "fastv"}, 8, server_settings).options
    assert (same.prune_layer, same.prune_rows) == (2, "last")
    for method in ("none", "redvtp", "uniform"):
        other = resolve({"prune_method": method}, 8, server_settings).options
        assert (other.prune_layer, other.prune_rows, other.prune_keep_ratio) == (None, None, 0.3)
    with pytest.raises(ValueError, match="prune_layer belongs to prune_method 'fastv'"):
        resolve({"prune_method": "redvtp", "prune_layer": 2}, 8, server_settings)
