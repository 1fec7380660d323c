"""The numbers of a report agree with the library's selectors and with plain counts."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from helpers.pages import data_of
from helpers.reports import counted, make_table, usual
from helpers.tables import make_provenance, make_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from resofilter_trainer.report import contents, write_report
from resofilter_trainer.report.distribution import Scale, histogram, threshold_of
from resofilter_trainer.report.epochs import epochs_of
from resofilter_trainer.report.findings import of_ratios
from resofilter_trainer.report.paper_figures import layers_of, quarters_of, ratios_of, word_frequency
from resofilter_trainer.report.what_if import what_if
from resofilter_trainer.scores.provenance import Trust
from resofilter_trainer.scores.statistics import rank_correlation
from resofilter_trainer.selecting.data_selector import DataSelector
from resofilter_trainer.selecting.selection import KEPT, Selection
from resofilter_trainer.training.filtering import FilterConfig

tied = st.none() | st.sampled_from([0.0, 1.0, 2.0, math.inf, math.nan]) | st.floats(-1e3, 1e3)
tables = st.lists(st.tuples(tied, st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 4)), min_size=1, max_size=12)


# ---- what if


@pytest.mark.parametrize("drop", ["largest", "smallest", "both"])
@settings(max_examples=25, deadline=None)
@given(by=st.sampled_from(["score", "loss", "num_tokens", ("score", "-num_tokens")]), rows=tables)
def test_what_if_is_what_the_selector_does(drop, by, rows):
    score, loss, tokens = zip(*rows, strict=True)
    scores = make_table(score, loss=loss, num_tokens=tokens)
    groups = ["ab"[row % 2] for row in range(len(rows))]
    found = what_if(DataSelector(drop=drop, by=by), scores, groups)
    without = ~np.isfinite(DataSelector(by=by).values(scores)) | ~scores.scored
    assert found.unscored == without.sum()
    assert found.keep == [float(f"{percent / 100:.2f}") for percent in range(1, 101)]
    for place, share in enumerate(found.keep):
        keep = DataSelector(keep=share, drop=drop, by=by).select(scores).keep
        assert found.rows[place] == keep.sum()
        assert ((found.kept_from <= place + 1) == keep).all()
        assert found.tokens[place] == sum(tokens[row] for row in np.flatnonzero(keep))
        for group in set(groups):
            dropped = [row for row in range(len(rows)) if groups[row] == group and not keep[row]]
            assert found.dropped_of_groups[group][place] == len(dropped)


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


# ---- histogram, scale and threshold


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.booleans()), min_size=1, max_size=40), st.booleans())
def test_bars_count_every_row_once(rows, log):
    values, keep = (np.array(each) for each in zip(*rows, strict=True))
    if log and np.ptp(values) == 0:
        return
    bars = histogram(values, keep, Scale(1.0, "log" if log else "linear", low=values.min(), high=values.max()))
    for decision, which in (("kept", keep), ("dropped", ~keep)):
        assert sum(bar.rows for bar in bars if bar.decision == decision) == which.sum()
    assert bars[0].start < bars[0].end
    assert min(bar.start for bar in bars) <= values.min()
    assert max(bar.end for bar in bars) >= values.max()


@pytest.mark.parametrize("low", [1.0, 1e-5, 0.0])
def test_values_next_to_each_other_have_bars(low):
    """As for saturated scores, which differ in the last digit."""
    high = np.nextafter(low, 1e9)
    bars = histogram(np.array([low, high]), np.array([True, False]), Scale(low=low, high=high))
    assert sorted(bar.rows for bar in bars) == [1, 1]


SATURATED = 1e-5 * (1 - np.geomspace(1e-6, 0.5, 100))
ADAMW = {"update": "adamw", "norm": "mean_abs", "n_layers": 3, "lr": 1e-5}


@pytest.mark.parametrize("trust", [Trust(0.99, 100, 0.5), None], ids=["two passes", "a training run"])
def test_a_saturated_score_is_drawn_by_its_distance_to_lr(trust):
    found = counted(usual(provenance=make_provenance(rows=100, config=ADAMW, trust=trust), score=SATURATED))
    assert (found.scale.full_step, found.scale.kind, sum(bar.rows for bar in found.histogram)) == (1e-5, "log", 100)
    widths = [bar.end / bar.start for bar in found.histogram]  # on a logarithmic axis
    assert max(widths) == pytest.approx(min(widths))


ABOVE = 1e-5 * (1 - np.concatenate([-np.geomspace(1e-5, 0.3, 20), [0.0], np.geomspace(1e-5, 0.5, 79)]))


def test_scores_above_lr_are_drawn_as_shares_on_both_sides_of_100_percent():
    """Weight decay takes scores above lr, where a logarithm of the distance alone has no place for them."""
    scale = counted(usual(provenance=make_provenance(rows=100, config=ADAMW), score=ABOVE)).scale
    assert (scale.kind, scale.title) == ("symlog", "share of entries moved (score / lr)")
    ticks = scale.ticks()
    assert [tick for tick in ticks if tick < 0] == [
        -tick for tick in reversed(ticks) if tick > 0 and -tick >= scale.low
    ]
    assert 0.0 in ticks
    places = scale.heights(scale.shown(np.sort(ABOVE)))
    assert (places[0], places[-1]) == (0, 1)
    assert (np.diff(places) > 0).all()
    edges = scale.edges()
    steps = np.diff(scale.heights(edges))
    assert steps == pytest.approx(-1 / len(steps))
    assert (scale.text(1.1e-5), scale.text(0.99995e-5), scale.text(1e-5)) == ("110.0 %", "99.9950 %", "100.0 %")


@pytest.mark.parametrize(
    ("scores", "kind", "text"),
    [(1e-5 * np.linspace(0.3, 0.6, 100), "linear", "50.0 %"), (1e-5 * np.linspace(0.9, 1.1, 100), "linear", "50.0 %")],
    ids=["far below lr", "around lr, close together"],
)
def test_shares_that_a_linear_axis_tells_apart_have_one(scores, kind, text):
    scale = counted(usual(provenance=make_provenance(rows=100, config=ADAMW), score=scores)).scale
    assert (scale.kind, scale.text(5e-6)) == (kind, text)
    assert (scale.low, scale.high) == pytest.approx((1e7 * scores.min(), 1e7 * scores.max()))


def test_one_score_alone_has_an_axis():
    scale = counted(usual(provenance=make_provenance(rows=100, config=ADAMW), score=np.full(100, 1e-5))).scale
    assert scale.kind == "linear"
    assert scale.edges()[0] < scale.low == scale.high < scale.edges()[-1]
    assert scale.heights(np.array([scale.low])) == [0.5]


OPTIMIZER = ADAMW | dict.fromkeys(("lr", "eps", "weight_decay")) | {"update": "optimizer"}
UNBOUNDED: dict[str, dict[str, Any]] = {
    "the run's own optimizer": {"config": OPTIMIZER, "trust": None},
    "the run's own optimizer, with trust": {"config": OPTIMIZER, "trust": Trust(0.99, 100, None)},
    "plain SGD": {"config": ADAMW | {"update": "sgd"}, "trust": Trust(0.99, 100, None)},
    "the L2 norm": {"config": ADAMW | {"norm": "l2"}, "trust": None},
    "a criterion": {"config": {"criterion": "ifd"}, "trust": None},
}


@pytest.mark.parametrize("case", UNBOUNDED.values(), ids=list(UNBOUNDED))
def test_a_score_without_a_bound_is_drawn_as_it_is(case):
    found = counted(usual(provenance=make_provenance(rows=100, **case), score=SATURATED))
    assert (found.scale.full_step, found.scale.kind, found.scale.title) == (None, "linear", "score")
    assert (found.histogram[0].start, found.histogram[-1].end) == (SATURATED.min(), SATURATED.max())
    assert found.warnings == []


def test_a_run_measured_by_its_own_optimizer_has_a_page_that_says_so(tmp_path):
    provenance = make_provenance(rows=100, config=OPTIMIZER, trust=None)
    report = write_report(contents.Contents(usual(provenance=provenance, score=SATURATED)), tmp_path)
    page = report.path.read_text(encoding="utf-8")
    assert "Scored by resonance (optimizer, last 3 layers)" in page
    assert "update=optimizer, norm=mean_abs, n_layers=3<" in page
    titles = [layer["encoding"]["x"]["title"] for layer in data_of(report.path)["charts"]["scores"]["layer"][:1]]
    assert titles == ["score"]


@pytest.mark.parametrize(
    ("keep", "threshold"),
    [([1, 1, 0, 0], 2.0), ([0, 0, 1, 1], 3.0), ([1, 0, 1, 0], None), ([1, 1, 1, 1], None), ([0, 0, 0, 0], None)],
)
def test_the_threshold_is_the_last_kept_score(keep, threshold):
    assert threshold_of(np.array([1.0, 2.0, 3.0, 4.0]), np.array(keep, dtype=bool)) == threshold


# ---- verdict, correlations, warnings


def test_correlations_are_rank_correlations():
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
    "almost the length": ({"score": RISING, "num_tokens": RISING[::-1]}, {}, 0),
    "almost the loss": ({"score": RISING, "loss": RISING}, {}, 0),
    "partly noise": ({}, {"trust": Trust(0.9, 8, None)}, 0),
    "saturated": ({}, {"trust": Trust(0.99, 8, 1e-4)}, 0),
    "repeat the text": ({}, {}, 2),
    "All scores are equal": ({"score": np.ones(100)}, {}, 0),
    "have no score": ({"score": np.array([None] * 6 + list(range(94)), dtype=object)}, {}, 0),
    "1 scores are not finite": ({"score": np.array([math.inf, *range(99)])}, {}, 0),
    "have max_length=64 tokens": ({"length": np.where(RISING <= 6, 64, 200)}, {}, 0),
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
def test_there_is_one_warning_for_each_doubt(what):
    warnings = warnings_of(*WARNINGS[what])
    assert len(warnings) == 1
    assert what in warnings[0]


@pytest.mark.parametrize("case", QUIET.values(), ids=list(QUIET))
def test_there_is_no_warning_without_a_doubt(case):
    assert warnings_of(*case) == []


# ---- the paper's figures, epochs, comparisons


@pytest.mark.parametrize("rows", [1, 3, 8, 41])
def test_quarters_are_plain_means(rows):
    draw = np.random.default_rng(rows)
    score, tokens, frequency = draw.permutation(rows).tolist(), draw.integers(1, 9, rows), draw.random(rows)
    frequency[0] = np.nan
    found = quarters_of(make_table(score, num_tokens=tokens), frequency)
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
    found = word_frequency(texts)
    assert found[0] == pytest.approx(sum(share[word] for word in words[:6]) / 6)
    assert found[1] == pytest.approx((share["a"] + share["cat"]) / 2)
    assert np.isnan(found[2:4]).all()
    assert found[4] == pytest.approx(0.2)


def test_layers_are_quantiles_lowest_first():
    found = layers_of(make_scores([1.0, 2.0, 3.0, None]))
    assert [(each.layer, each.low, each.high) for each in found] == [(2, 1.5, 2.5), (3, 0.75, 1.25)]


@settings(deadline=None)
@given(st.lists(st.none() | st.sets(st.integers(0, 5)), max_size=6))
def test_readmitted_and_dropped_rows_are_differences_of_sets(kept):
    keeps = [None if rows is None else np.isin(np.arange(6), list(rows)) for rows in kept]
    selections = [None if keep is None else Selection(keep, [KEPT] * 6, {}, "") for keep in keeps]
    epochs = [contents.Epoch(number, None, selection) for number, selection in enumerate(selections, 1)]
    last = None
    for each, rows in zip(epochs_of(epochs), kept, strict=True):
        assert each.rows == (None if rows is None else len(rows))
        known = rows is not None and last is not None
        assert (each.readmitted, each.dropped) == ((len(rows - last), len(last - rows)) if known else (None, None))
        last = last if rows is None else rows


def test_scores_of_an_epoch_are_its_quartiles():
    epoch = contents.Epoch(1, make_scores([1.0, 2.0, 3.0, None, math.nan]), None)
    (found,) = epochs_of([epoch])
    assert (found.low, found.median, found.high) == (1.5, 2.0, 2.5)
    assert epochs_of([contents.Epoch(1, make_scores([None]), None)])[0].median is None


def line(selector: str, keep: float, metric: float | None, **more: Any) -> dict[str, Any]:
    names = ("selector", "model", "keep", "metric", "metric_low", "metric_high")
    return dict(zip(names, (selector, "m", keep, metric, 0, 1), strict=True)) | more


def test_ratios_are_the_lines_with_a_metric_at_equal_epochs():
    lines = [line("full", 0.5, 0.9), line("a", 0.5, 0.8, budget="flops"), line("a", 0.5, None), line("a", 0.1, 0.7)]
    assert ratios_of({"lines": lines}) == [line("full", 1.0, 0.9), line("a", 0.1, 0.7)]
    assert ratios_of(None) == []


def test_a_selector_without_a_share_is_placed_at_what_it_kept():
    lines = [line("full", 1.0, 0.9, sdf=1.0), line("eaft", 1.0, 0.8, sdf=0.83), line("a", 0.5, 0.7, sdf=0.51)]
    assert [each["keep"] for each in ratios_of({"lines": lines})] == [1.0, 0.83, 0.5]
    assert of_ratios(ratios_of({"lines": lines[1:]})).endswith("of eaft with 83 % of the rows or tokens.")
