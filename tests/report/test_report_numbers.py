"""A report says what the library decides and a plain count finds; and whatever comes in, there is a page."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from helpers.tables import make_provenance, make_scores, make_token_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from resofilter_trainer.config import InputError
from resofilter_trainer.io.files import save_parquet
from resofilter_trainer.report import Contents, Report, contents, numbers, read_contents, samples, write_report
from resofilter_trainer.scores.provenance import Trust
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.scores.statistics import rank_correlation
from resofilter_trainer.selecting.selection import KEPT, DataSelector, Selection
from resofilter_trainer.selecting.token_selection import EMPTIED, TokenSelection, TokenSelector
from resofilter_trainer.training.filtering import FilterConfig

WHY = "no completion"
tied = st.none() | st.sampled_from([0.0, 1.0, 2.0, math.inf, math.nan]) | st.floats(-1e3, 1e3)
tables = st.lists(st.tuples(tied, st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 4)), min_size=1, max_size=12)


def make_table(score: Sequence[float | None], provenance: Any = None, **columns: Sequence[Any]) -> ScoreTable:
    """Rows of None have no score and nothing else."""
    missing = np.array([value is None for value in score], dtype=bool)
    table = pa.table(
        {
            "sample_id": np.arange(len(score)),
            "score": pa.array(score, pa.float64()),
            **{name: pa.array(np.asarray(values), mask=missing) for name, values in columns.items()},
            "reason": pa.array([WHY if each else None for each in missing], pa.string()),
        }
    )
    return ScoreTable(table, provenance or make_provenance(rows=len(score)))


def usual(rows: int = 100, provenance: Any = None, **changes: Any) -> ScoreTable:
    """A table that nothing is wrong with, but for what is changed."""
    draw = np.random.default_rng(0)
    columns = {name: draw.permutation(rows) + 1 for name in ("score", "loss", "num_tokens", "length")} | changes
    return make_table(columns.pop("score").tolist(), provenance, **columns)


def counted(scores: ScoreTable, copies: int = 0, **more: Any) -> numbers.Numbers:
    found = numbers.numbers_of(Contents(scores, **more), None, None, copies)
    assert found is not None
    return found


def cleaning() -> TokenSelection:
    """Of four rows 0 and 2 have tokens, and row 0 keeps two."""
    losses = [[(3.0, 0.0), (2.0, 0.0), (1.0, 0.0)], [(0.5, 0.4)]]
    return TokenSelector(0.5).select(make_token_scores(losses, provenance=make_provenance(rows=4)))


# ---- what if


@pytest.mark.parametrize("drop", ["largest", "smallest", "both"])
@settings(max_examples=25, deadline=None)
@given(by=st.sampled_from(["score", "loss", "num_tokens", ("score", "-num_tokens")]), rows=tables)
def test_what_if_is_what_the_selector_does(drop, by, rows):
    score, loss, tokens = zip(*rows, strict=True)
    scores = make_table(score, loss=loss, num_tokens=tokens)
    groups = ["ab"[row % 2] for row in range(len(rows))]
    found = numbers.what_if(DataSelector(drop=drop, by=by), scores, groups)
    without = ~np.isfinite(DataSelector(by=by).values(scores)) | ~scores.scored
    assert found.unscored == without.sum()
    assert found.keep == [float(f"{percent / 100:.2f}") for percent in range(1, 101)]
    for place, share in enumerate(found.keep):
        keep = DataSelector(keep=share, drop=drop, by=by).select(scores).keep
        assert found.rows[place] == keep.sum()
        assert found.tokens[place] == sum(tokens[row] for row in np.flatnonzero(keep))
        for group in set(groups):
            gone = [row for row in range(len(rows)) if groups[row] == group and not keep[row]]
            assert found.dropped_of_groups[group][place] == len(gone)


@pytest.mark.parametrize(
    "settings",
    [{}, {"drop": "both"}, {"by": "loss", "drop": "smallest"}, {"by": ("score", "-num_tokens"), "combine": "topsis"}],
)
def test_what_if_ranks_as_the_selection_did(settings, tmp_path):
    scores, selector = usual(), DataSelector(**settings)
    selection = Selection.load(selector.select(scores).save(tmp_path))
    found = counted(scores, selection=selection).what_if
    expected = dataclasses.replace(selector, keep=0.3).select(scores).keep
    assert found.drop == selector.end()
    assert found.tokens[29] == scores.column("num_tokens")[expected].sum()


@pytest.mark.parametrize("given", [{"keep": DataSelector(by="loss")}, {"selector": DataSelector(by="loss")}], ids=list)
def test_what_if_ranks_as_a_training_did(given):
    scores = usual()
    selection = dataclasses.replace(DataSelector(by="loss").select(scores), policy=FilterConfig(**given).to_json())
    assert counted(scores, selection=selection).what_if.by == "loss"


def test_what_if_drops_the_end_that_the_criterion_says():
    scores = usual(provenance=make_provenance(rows=100, config={"criterion": "ifd", "drop": "smallest"}))
    assert counted(scores).what_if.drop == "smallest"


# ---- histogram and cut


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.booleans()), min_size=1, max_size=40), st.booleans())
def test_bars_hold_every_row_once(rows, log):
    values, keep = (np.array(each) for each in zip(*rows, strict=True))
    if log and np.ptp(values) == 0:
        return
    bars = numbers.histogram(values, keep, log)
    for decision, which in (("kept", keep), ("dropped", ~keep)):
        assert sum(bar.rows for bar in bars if bar.decision == decision) == which.sum()
    assert bars[0].start < bars[0].end
    assert min(bar.start for bar in bars) <= values.min()
    assert max(bar.end for bar in bars) >= values.max()


@pytest.mark.parametrize("low", [1.0, 1e-5, 0.0])
def test_values_next_to_each_other_have_bars(low):
    """Saturated scores differ in the last digit."""
    bars = numbers.histogram(np.array([low, np.nextafter(low, 1e9)]), np.array([True, False]), log=False)
    assert sorted(bar.rows for bar in bars) == [1, 1]


def test_a_saturated_score_is_drawn_by_its_distance_to_lr():
    adamw = make_provenance(rows=100, config={"update": "adamw", "lr": 1e-5, "n_layers": 3})
    scores = usual(provenance=adamw, score=1e-5 * (1 - np.geomspace(1e-6, 0.5, 100)))
    found = counted(scores)
    assert (found.scale.lr, sum(bar.rows for bar in found.histogram)) == (1e-5, 100)
    widths = [bar.end / bar.start for bar in found.histogram]  # on a logarithmic axis
    assert max(widths) == pytest.approx(min(widths))


@pytest.mark.parametrize(
    ("keep", "cut"),
    [([1, 1, 0, 0], 2.0), ([0, 0, 1, 1], 3.0), ([1, 0, 1, 0], None), ([1, 1, 1, 1], None), ([0, 0, 0, 0], None)],
)
def test_the_cut_is_the_last_score_that_stays(keep, cut):
    assert numbers.cut_of(np.array([1.0, 2.0, 3.0, 4.0]), np.array(keep, dtype=bool)) == cut


# ---- verdict, correlations, warnings


def test_correlations_are_the_librarys():
    scores = usual(score=np.array([None, math.nan, *np.random.default_rng(1).random(98)], dtype=object))
    found, there = counted(scores), np.arange(2, 100)
    of = {name: scores.column(name)[there] for name in ("score", "loss", "num_tokens")}
    assert found.loss_correlation == rank_correlation(of["score"], of["loss"])
    assert found.length_correlation == rank_correlation(of["score"], of["num_tokens"])


@pytest.mark.parametrize("selection", [None, DataSelector(keep=0.3, drop="both")], ids=["preview", "decided"])
def test_verdict_is_a_plain_count(selection):
    scores = usual(score=np.array([None, math.nan, *range(98)], dtype=object))
    decided = (selection or DataSelector()).select(scores)
    verdict = counted(scores, selection=selection and decided).verdict
    kept, tokens = decided.keep.tolist(), np.nan_to_num(scores.column("num_tokens"))
    assert (verdict.rows, verdict.scored, verdict.kept) == (100, 99, sum(kept))
    assert verdict.dropped == 100 - sum(kept)
    assert (verdict.tokens, verdict.tokens_kept) == (tokens.sum(), tokens[decided.keep].sum())
    assert dict(verdict.reasons) == Counter(reason for reason in decided.reason if reason != KEPT)
    assert verdict.previewed == (selection is None)


RISING = np.arange(100) + 1
WARNINGS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "almost only length": ({"score": RISING, "num_tokens": RISING[::-1]}, {}, 0),
    "almost only loss": ({"score": RISING, "loss": RISING}, {}, 0),
    "partly noise": ({}, {"trust": Trust(0.9, 8, None)}, 0),
    "saturated": ({}, {"trust": Trust(0.99, 8, 1e-4)}, 0),
    "repeat the text": ({}, {}, 2),
    "All scores are equal": ({"score": np.ones(100)}, {}, 0),
    "have no score": ({"score": np.array([None] * 6 + list(range(94)), dtype=object)}, {}, 0),
    "no finite number": ({"score": np.array([math.inf, *range(99)])}, {}, 0),
    "fill max_length 64": ({"length": np.where(RISING <= 6, 64, 200)}, {}, 0),
    "No row has a score": ({"score": np.array([None] * 100, dtype=object)}, {}, 0),
}
QUIET: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "nothing": ({}, {}, 0),
    "a criterion that is the loss": ({"score": RISING, "loss": RISING}, {"config": {"criterion": "loss"}}, 0),
    "trusted": ({}, {"trust": Trust(0.95, 8, 1e-3)}, 0),
    "no trust": ({}, {"trust": None}, 0),
    "a copy in a hundred": ({}, {}, 1),
    "five in a hundred without score": ({"score": np.array([None] * 5 + list(range(95)), dtype=object)}, {}, 0),
    "five in a hundred at max_length": ({"length": np.where(RISING <= 5, 64, 200)}, {}, 0),
    "no max_length": ({"length": np.full(100, 64)}, {"preparation": {}}, 0),
}


def warnings_of(columns: dict[str, Any], provenance: dict[str, Any], copies: int) -> list[str]:
    scores = usual(provenance=make_provenance(rows=100, **provenance), **{"length": np.full(100, 200)} | columns)
    return counted(scores, copies).warnings


@pytest.mark.parametrize("what", list(WARNINGS))
def test_what_makes_the_verdict_doubtful_is_said_and_nothing_else(what):
    warnings = warnings_of(*WARNINGS[what])
    assert len(warnings) == 1
    assert what in warnings[0]


@pytest.mark.parametrize("case", QUIET.values(), ids=list(QUIET))
def test_nothing_is_said_where_nothing_is_wrong(case):
    assert warnings_of(*case) == []


# ---- the paper's figures, epochs, comparisons


@pytest.mark.parametrize("rows", [1, 3, 8, 41])
def test_quarters_are_plain_means(rows):
    draw = np.random.default_rng(rows)
    score, tokens, frequency = draw.permutation(rows).tolist(), draw.integers(1, 9, rows), draw.random(rows)
    frequency[0] = np.nan
    found = numbers.quarters(make_table(score, num_tokens=tokens), np.ones(rows, dtype=bool), frequency)
    order, count = sorted(range(rows), key=lambda row: score[row]), max(1, rows // 4)
    for quarter, part in zip(found, (order[:count], order[-count:], order), strict=True):
        assert quarter.tokens == pytest.approx(sum(tokens[row] for row in part) / len(part))
        assert (quarter.tokens_low, quarter.tokens_high) == tuple(np.quantile(tokens[part], [0.25, 0.75]))
        known = [frequency[row] for row in part if row]
        assert quarter.frequency == (pytest.approx(sum(known) / len(known)) if known else None)


def test_word_frequency_is_a_plain_count():
    texts = ["The cat, the dog.", "a CAT", "", None, "été été"]
    words = ["the", "cat", ",", "the", "dog", ".", "a", "cat", "été", "été"]
    share = {word: words.count(word) / len(words) for word in words}
    found = numbers.word_frequency(texts)
    assert found[0] == pytest.approx(sum(share[word] for word in words[:6]) / 6)
    assert found[1] == pytest.approx((share["a"] + share["cat"]) / 2)
    assert np.isnan(found[2:4]).all()
    assert found[4] == pytest.approx(0.2)


def test_layers_are_quantiles_lowest_first():
    found = numbers.layers_of(make_scores([1.0, 2.0, 3.0, None]))
    assert [(each.layer, each.low, each.high) for each in found] == [(2, 1.5, 2.5), (3, 0.75, 1.25)]


@settings(deadline=None)
@given(st.lists(st.none() | st.sets(st.integers(0, 5)), max_size=6))
def test_who_came_and_went_is_a_difference_of_sets(kept):
    keeps = [None if rows is None else np.isin(np.arange(6), list(rows)) for rows in kept]
    selections = [None if keep is None else Selection(keep, [KEPT] * 6, {}, "") for keep in keeps]
    epochs = [contents.Epoch(number, None, selection) for number, selection in enumerate(selections, 1)]
    last = None
    for each, rows in zip(numbers.moved(epochs), kept, strict=True):
        assert each.rows == (None if rows is None else len(rows))
        known = rows is not None and last is not None
        assert (each.came, each.went) == ((len(rows - last), len(last - rows)) if known else (None, None))
        last = last if rows is None else rows


def test_scores_of_an_epoch_are_its_quartiles():
    epoch = contents.Epoch(1, make_scores([1.0, 2.0, 3.0, None, math.nan]), None)
    (found,) = numbers.moved([epoch])
    assert (found.low, found.median, found.high) == (1.5, 2.0, 2.5)
    assert numbers.moved([contents.Epoch(1, make_scores([None]), None)])[0].median is None


def line(selector: str, keep: float, metric: float | None, **more: Any) -> dict[str, Any]:
    names = ("selector", "model", "keep", "metric", "metric_low", "metric_high")
    return dict(zip(names, (selector, "m", keep, metric, 0, 1), strict=True)) | more


def test_ratios_are_the_lines_with_a_metric_at_equal_epochs():
    lines = [line("full", 0.5, 0.9), line("a", 0.5, 0.8, budget="flops"), line("a", 0.5, None), line("a", 0.1, 0.7)]
    assert numbers.ratios_of({"lines": lines}) == [line("full", 1.0, 0.9), line("a", 0.1, 0.7)]
    assert numbers.ratios_of(None) == []


# ---- samples


def test_all_rows_are_shown_or_both_ends_and_an_even_part_of_the_rest():
    assert samples.chosen_rows(np.array([np.nan, 1, 0]), np.array([False, True, True]), 3).tolist() == [0, 1, 2]
    values, scored = np.random.default_rng(0).permutation(1000.0 * np.arange(10_000)), np.ones(10_000, dtype=bool)
    scored[::7] = False
    rows = samples.chosen_rows(values, scored, 400)
    shown, ranked = np.sort(values[rows[scored[rows]]]), np.sort(values[scored])
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert (len(shown), (~scored[rows]).sum()) == (400, samples.UNSCORED)
    assert shown[:100].tolist() == ranked[:100].tolist()
    assert shown[-100:].tolist() == ranked[-100:].tolist()
    gaps = np.diff(np.searchsorted(ranked, shown[100:-100]))
    assert gaps.max() - gaps.min() <= 1


def test_a_copy_names_the_first_of_its_text():
    texts = [("a", "b"), ("ab", ""), ("a", "b"), ("", "ab"), ("\ud800", "x"), ("\ud800", "x")]
    assert samples.first_of_copies(texts).tolist() == [0, 1, 0, 3, 4, 4]


def test_the_same_text_is_nearest_and_none_alike_has_none():
    texts = ["one two three four", "one two three five", "six seven", "ONE two three four", "", ""]
    found = samples.neighbours(texts, np.arange(6) * 10)
    assert found[0][0] == (30, 1.0)
    assert [row for row, _ in found[0]] == [30, 10]
    assert found[2] == found[4] == []
    assert samples.neighbours(["alone"], np.array([7])) == [[]]


def test_texts_are_cut_so_that_all_fit():
    texts = ["é" * 300, "<" * 1000, "abc"]
    assert samples.cut_at(texts) == samples.LONGEST
    cut = samples.cut_at(texts, 1000)
    assert sum(samples.page_bytes(text[:cut]) for text in texts) <= 1000
    assert sum(samples.page_bytes(text[: 2 * cut]) for text in texts) > 1000


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("<>&\u2028\u2029\\\"'/")))
def test_json_comes_back_and_ends_no_script(text):
    found = samples.as_json({"text": [text]})
    assert json.loads(found) == {"text": [text]}
    assert not set(found) & set("<>&\u2028\u2029")


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\\\ud800"])
def test_half_a_surrogate_pair_comes_back(text):
    assert json.loads(samples.as_json(text).encode()) == text


# ---- what a folder holds


def test_a_file_of_scores_and_its_folder_are_read(tmp_path):
    scores = usual(8)
    scores.save(tmp_path / "mine.parquet")
    DataSelector(keep=0.25).select(scores).save(tmp_path)
    for place in (scores.save(tmp_path), tmp_path, str(tmp_path), tmp_path / "mine.parquet"):
        found = read_contents(place)
        assert found.scores.table.equals(scores.table)
        assert found.decided().keep.sum() == 2


def test_a_trainings_output_is_read_epoch_by_epoch(tmp_path):
    scores, folder = usual(8), tmp_path / "resofilter"
    scores.save(folder)
    for epoch, keep in ((2, 0.5), (10, 0.25)):
        scores.save(folder / f"scores-epoch-{epoch}.parquet")
        DataSelector(keep=keep).select(scores).save(folder / f"selection-epoch-{epoch}.parquet")
    (folder / "log.json").write_text(json.dumps([{"step": 1, "learning_rate": 0.5}, {"step": 2, "loss": 1.0}]))
    found = read_contents(tmp_path)
    assert [each.number for each in found.epochs] == [2, 10]
    assert found.decided().keep.sum() == 2
    assert [(each.rows, each.went) for each in counted(**vars(found)).epochs] == [(4, None), (2, 2)]
    assert counted(**vars(found)).log == [{"step": 1, "what": "learning rate", "value": 0.5}]


def test_cleaned_tokens_are_decided_again(tmp_path):
    cleaned = cleaning()
    cleaned.scores.save(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"keep_tokens": 0.5, "ranking": "global"}))
    found = read_contents(tmp_path)
    verdict = counted(**vars(found)).verdict
    assert found.cleaned.keep.tolist() == cleaned.keep.tolist() == [True, True, False, False]
    assert found.decided().keep.tolist() == [True, False, False, False]
    assert found.scores.column("score")[[0, 2]].tolist() == [2.0, 0.5]
    assert found.scores.scored.tolist() == [True, False, True, False]
    assert (verdict.tokens, verdict.tokens_kept, verdict.scored) == (4, 2, 2)


def test_rows_of_cleaned_tokens_say_why_they_went():
    assert contents.rows_of(cleaning()).reason[2] == EMPTIED
    assert contents.rows_of(cleaning()).reason[1] == contents.as_scores(cleaning().scores).reasons[1]


def test_scores_beside_cleaned_tokens_keep_their_name():
    assert "resonance" in counted(usual(4), cleaned=cleaning()).verdict.score


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(InputError, match="nothing at"):
        read_contents(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no scores and no comparison"):
        read_contents(tmp_path)


@pytest.mark.parametrize("text", ["", '{"lines": [', "\xff", "[]", "3", '{"lines": null}', '{"lines": [{}]}'])
def test_a_damaged_comparison_is_named(tmp_path, text):
    (tmp_path / "comparison.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"comparison\.json"):
        write_report(read_contents(tmp_path), tmp_path)


@pytest.mark.parametrize("change", [{"weights": "other"}, {"config": {"eps": 1}}])
def test_a_selection_of_other_scores_is_refused(tmp_path, change):
    usual(8).save(tmp_path)
    DataSelector().select(usual(8, make_provenance(rows=8, **change))).save(tmp_path)
    with pytest.raises(InputError, match="selection is of other scores, they differ in"):
        read_contents(tmp_path)


def test_other_numbers_of_rows_are_refused():
    with pytest.raises(InputError, match="selection is of 9 rows and the scores are of 8"):
        Contents(usual(8), DataSelector().select(usual(9)))
    with pytest.raises(InputError, match="6 rows and the scores cover 2"):
        Contents(make_scores([1.0, 2.0], [0, 1], make_provenance()))


def test_scores_in_another_order_are_no_other_scores():
    found = counted(make_scores([1.0, 9.0, 2.0], [2, 0, 1]))  # row 0 scores 9
    assert [bar.decision for bar in found.histogram if bar.end == 9] == ["dropped"]


@pytest.mark.parametrize("name", ["scores.parquet", "selection.parquet"])
def test_a_table_of_another_version_is_refused_in_one_line(tmp_path, name):
    scores = usual(8)
    scores.save(tmp_path)
    old = {"resofilter_scores": "{}", "resofilter_selection": '{"policy": {}, "provenance": "{}"}'}
    save_parquet(DataSelector().select(scores)._table() if "sel" in name else scores.table, tmp_path / name, old)
    with pytest.raises(InputError, match="written by another version") as refused:
        read_contents(tmp_path)
    assert "\n" not in str(refused.value)


# ---- whatever comes in, there is a page

LONG = ["a" * 100_000, "שלום עולם", "नमस्ते दुनिया", "漢字 かな", "<script>", "\ud800 half", "\u202e", ""]
ODD = np.array([math.nan, math.inf, -math.inf, 1, 2, 3, 4, None], dtype=object)
TABLES: dict[str, tuple[ScoreTable, list[str] | None]] = {
    "no row": (make_table([], loss=np.empty(0), num_tokens=np.empty(0, dtype=int)), []),
    "one row, without text": (usual(1), None),
    "all equal": (usual(8, score=np.ones(8)), LONG),
    "not finite": (usual(8, score=ODD), LONG[::-1]),
    "all unscored": (usual(8, score=np.array([None] * 8, dtype=object)), LONG),
    "of another criterion": (make_table([3.0, 1.0, 2.0], make_provenance(rows=3, config={"criterion": "ifd"})), None),
}


@pytest.fixture(scope="module", params=list(TABLES))
def written(request, tmp_path_factory) -> tuple[ScoreTable, Selection, Report]:
    scores, texts = TABLES[request.param]
    pairs = None if texts is None else [(f"prompt {row % 2}", text) for row, text in enumerate(texts)]
    selection = DataSelector().select(scores)
    groups = ["ab"[row % 2] for row in range(len(scores))]
    folder = tmp_path_factory.mktemp("report")
    return scores, selection, write_report(Contents(scores, selection), folder, pairs, groups)


def shown(report: Report) -> dict[str, Any]:
    page = report.path.read_text(encoding="utf-8")
    return json.loads(page.split('id="data">')[1].split("</script>")[0])["samples"]


def test_every_table_has_a_page_with_all_its_rows(written):
    scores, selection, report = written
    rows = shown(report)
    assert rows["row"] == list(range(len(scores)))
    assert rows["decision"] == ["kept" if each else "dropped" for each in selection.keep]
    assert rows["score"] == [value if math.isfinite(value) else None for value in scores.column("score").tolist()]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.pictures)
    assert sorted(each.name for each in report.path.parent.iterdir()) == ["report", "report.html"]


def test_the_dropped_rows_lie_beside_the_page(written):
    _, selection, report = written
    gone = np.flatnonzero(~selection.keep)
    for read in (pq.read_table, pa.csv.read_csv):
        table = read(report.path.parent / "report" / f"dropped.{'csv' if read is pa.csv.read_csv else 'parquet'}")
        assert table["sample_id"].to_pylist() == gone.tolist()
        assert table["reason"].to_pylist() == [selection.reason[row] for row in gone]


@pytest.mark.parametrize("what", ["texts", "groups"])
@pytest.mark.parametrize("count", [0, 7, 9])
def test_every_row_needs_a_text_and_a_group(what, count, tmp_path):
    values = [("", "")] * count if what == "texts" else ["a"] * count
    with pytest.raises(InputError, match=f"8 rows and {count} {what}"):
        write_report(Contents(usual(8)), tmp_path, **{what: values})
    assert list(tmp_path.iterdir()) == []


def test_groups_may_be_an_array(tmp_path):
    report = write_report(Contents(usual(4)), tmp_path, groups=np.array(["a", "b", "a", "b"]))
    assert shown(report)["group"] == ["a", "b", "a", "b"]


def test_a_layer_with_a_change_that_is_no_number_is_no_obstacle(tmp_path):
    table = usual(2)
    write_report(Contents(table, layers=make_scores([1.0, math.nan], provenance=table.provenance)), tmp_path)
    assert numbers.layers_of(make_scores([None, None])) == []
    with pytest.raises(InputError, match="another weights than the scores"):
        Contents(table, layers=make_scores([1.0, 2.0], provenance=make_provenance(rows=2, weights="other")))
