"""The records of a probe against plain counts: which rows are compared with which, and within what."""

from __future__ import annotations

import math

import numpy as np
import pytest

from resofilter_trainer.probe.findings import (
    ALL,
    LABELLED,
    SELF_MADE,
    Rows,
    alike_of,
    comparisons,
    missing_values,
    number_of,
    records_of,
)

COUNT = 40  # drawn rows


def rows_of(kinds: dict[str, int], seed: int = 0, **fields) -> Rows:
    """Unplanted rows, and so many copies of the first of them for each kind, with a larger loss."""
    random = np.random.default_rng(seed)
    source = np.array([*range(COUNT), *(place for count in kinds.values() for place in range(count))])
    kind = np.array([""] * COUNT + [name for name, count in kinds.items() for _ in range(count)])
    planted = kind != ""
    lengths = random.integers(5, 60, len(source)).astype(float)
    signals = {
        "loss": random.normal(size=len(source)) + planted,
        "small": random.normal(size=len(source)) - 2.0 * planted,
        "num_tokens": lengths,
    }
    usual = {
        "signals": signals,
        "directions": {"loss": "largest", "small": "smallest", "num_tokens": "largest"},
        "lengths": lengths,
        "kind": kind,
        "faulty": planted.copy(),
        "stratum": np.array([""] * len(source)),
        "source": source,
        "prompt": source,
        "seconds": {"loss": 2.0},
    }
    return Rows(**{**usual, **fields})


def pairs_won(values: np.ndarray, faults: np.ndarray, others: np.ndarray, same=lambda i, j: True) -> float:
    won = [(values[i] > values[j]) + 0.5 * (values[i] == values[j]) for i in faults for j in others if same(i, j)]
    return float(np.mean(won))


def by_name(rows: Rows) -> dict[tuple[str, str], dict]:
    compared, _, _ = comparisons(rows)
    return {(each["signal"], each["kind"]): each for each in records_of(rows, compared)}


def test_each_kind_is_compared_with_the_unplanted_rows():
    rows = rows_of({"cut": 15, "number": 30})
    found = by_name(rows)
    others = np.arange(COUNT)
    for kind in ("cut", "number"):
        faults = np.flatnonzero(rows.kind == kind)
        loss = rows.signals["loss"]
        one = found["loss", kind]
        assert one["auroc"] == pytest.approx(pairs_won(loss, faults, others))
        within = pairs_won(loss, faults, others, lambda i, j: rows.source[i] == rows.source[j])
        assert one["auroc_within_prompt"] == pytest.approx(within)
        assert (one["faulty"], one["compared"], one["pairs_within_prompt"]) == (len(faults), COUNT, len(faults))
        assert one["low"] < one["auroc"] < one["high"]
        assert one["beyond"] == pytest.approx((loss[:COUNT] > np.median(loss[faults])).mean())
    assert found["loss", "cut"]["seconds"] == 2.0
    assert found["small", "cut"]["seconds"] is None


def test_a_signal_counts_in_its_own_direction():
    rows = rows_of({"cut": 30})
    small = rows.signals["small"]
    one = by_name(rows)["small", "cut"]
    assert one["direction"] == "smallest"
    assert one["auroc"] == pytest.approx(pairs_won(-small, np.arange(COUNT, COUNT + 30), np.arange(COUNT)))
    assert one["auroc"] > 0.8
    assert one["beyond"] == pytest.approx((small[:COUNT] < np.median(small[COUNT:])).mean())


def test_below_a_half_the_share_is_of_the_other_end():
    rows = rows_of({"cut": 30}, directions={"loss": "smallest", "small": "largest", "num_tokens": "largest"})
    one, loss = by_name(rows)["loss", "cut"], rows.signals["loss"]
    assert one["auroc"] < 0.5
    assert one["beyond"] == pytest.approx((loss[:COUNT] > np.median(loss[COUNT:])).mean())


def test_all_kinds_together_weigh_the_same_each():
    found = by_name(rows_of({"cut": 10, "number": 40, SELF_MADE: 20}))
    mean = np.mean([found["loss", kind]["auroc"] for kind in ("cut", "number", SELF_MADE)])
    assert found["loss", ALL]["auroc"] == pytest.approx(mean)
    assert found["loss", ALL]["faulty"] == 70
    narrow, wide = ((each := found["loss", kind])["high"] - each["low"] for kind in (ALL, "cut"))
    assert narrow < wide


def test_the_length_says_nothing_beyond_itself():
    found = by_name(rows_of({"cut": 20}))
    assert found["num_tokens", "cut"]["auroc_length_out"] is None
    assert found["loss", "cut"]["auroc_length_out"] is not None
    assert found["loss", "cut"]["low_length_out"] < found["loss", "cut"]["high_length_out"]


def self_made(right: int) -> Rows:
    """Self-made answers in two strata, of which the second has higher values; `right` of them are right."""
    rows = rows_of({SELF_MADE: 40})
    own = np.arange(COUNT, COUNT + 40)
    rows.stratum[own] = np.where(own % 2, "high", "low")
    rows.signals["loss"][own] += np.where(own % 2, 10.0, 0.0)
    rows.faulty[own[:right]] = False
    return rows


def test_self_made_errors_are_compared_with_right_answers_of_their_stratum():
    rows = self_made(right=16)
    compared, left_out, notes = comparisons(rows)
    assert (left_out, notes) == ({}, [])
    own = np.arange(COUNT, COUNT + 40)
    same = pairs_won(rows.signals["loss"], own[16:], own[:16], lambda i, j: rows.stratum[i] == rows.stratum[j])
    one = by_name(rows)["loss", SELF_MADE]
    assert one["auroc"] == pytest.approx(same)
    assert (one["faulty"], one["compared"]) == (24, 16)
    assert len(compared) == 1


def test_without_right_ones_the_rows_as_they_are_stand_in_and_that_is_said():
    rows = self_made(right=9)
    _, _, notes = comparisons(rows)
    assert "the writer gave 9 right answers" in notes[0]
    assert "the writer's style is measured, too" in notes[0]
    one = by_name(rows)["loss", SELF_MADE]
    assert one["auroc"] == pytest.approx(
        pairs_won(rows.signals["loss"], np.arange(COUNT + 9, COUNT + 40), np.arange(COUNT))
    )


def test_labels_are_a_kind_and_wrong_rows_are_compared_with_nothing_else():
    wrong = np.arange(COUNT + 20) % 3 == 0
    wrong[COUNT:] = True
    rows = rows_of({"cut": 20}, faulty=wrong, labelled=True)
    loss, right = rows.signals["loss"], np.flatnonzero(~wrong)
    found = by_name(rows)
    assert found["loss", LABELLED]["auroc"] == pytest.approx(pairs_won(loss, np.flatnonzero(wrong[:COUNT]), right))
    assert found["loss", "cut"]["auroc"] == pytest.approx(pairs_won(loss, np.arange(COUNT, COUNT + 20), right))
    assert found["loss", ALL]["auroc"] == found["loss", "cut"]["auroc"], "labels are not planted"
    only = by_name(rows_of({}, faulty=wrong[:COUNT], labelled=True))
    assert only["loss", ALL] == {**only["loss", LABELLED], "kind": ALL, "beyond": None}


def test_rows_of_one_prompt_are_compared_within_it_and_vary_together():
    shared = rows_of({"cut": 30})
    shared = rows_of({"cut": 30}, prompt=shared.source // 2)
    assert len(np.unique(shared.clusters)) == 20
    one, loss = by_name(shared)["loss", "cut"], shared.signals["loss"]
    within = pairs_won(
        loss, np.arange(COUNT, COUNT + 30), np.arange(COUNT), lambda i, j: shared.prompt[i] == shared.prompt[j]
    )
    assert one["auroc_within_prompt"] == pytest.approx(within)
    assert one["pairs_within_prompt"] == 60
    assert comparisons(shared)[2] == []
    few = rows_of({"cut": 30}, prompt=shared.source % 3)
    assert comparisons(few)[2] == [
        "There are 3 different prompts, too few for intervals over prompts: they are over rows."
    ]
    assert (few.clusters == few.source).all(), "an interval over 3 prompts would say nothing"


def test_rows_that_were_not_measured_do_not_count():
    rows = rows_of({"cut": 30})
    rows.lengths[[0, COUNT]] = np.nan
    one = by_name(rows)["loss", "cut"]
    assert (one["faulty"], one["compared"]) == (29, COUNT - 1)
    assert one["auroc"] == pytest.approx(
        pairs_won(rows.signals["loss"], np.arange(COUNT + 1, COUNT + 30), np.arange(1, COUNT))
    )


def test_values_that_are_no_numbers_are_left_out_and_infinite_ones_are_the_most_extreme():
    rows = rows_of({"cut": 30})
    loss = rows.signals["loss"]
    loss[[1, COUNT + 1]] = np.nan
    loss[[2, COUNT + 2]] = np.inf
    one = by_name(rows)["loss", "cut"]
    faults, others = np.delete(np.arange(COUNT, COUNT + 30), 1), np.delete(np.arange(COUNT), 1)
    assert one["auroc"] == pytest.approx(pairs_won(loss, faults, others))
    assert missing_values(rows) == [
        "loss has no value for 2 of 70 rows, which are left out of its numbers.",
        "loss is infinite for 2 of 70 rows, which rank as the most extreme.",
    ]
    loss[:COUNT] = np.nan
    gone = by_name(rows)["loss", "cut"]
    assert [gone[name] for name in ("auroc", "low", "auroc_length_out", "auroc_within_prompt", "beyond")] == [None] * 5


def test_a_kind_in_too_few_rows_is_left_out():
    _, left_out, _ = comparisons(rows_of({"cut": 4, "number": 5}))
    assert left_out == {"cut": "only 4 rows with it were measured, and at least 5 are needed"}


def test_fewer_than_ten_pairs_of_a_prompt_say_nothing():
    found = by_name(rows_of({"cut": 9, "number": 10}))
    assert found["loss", "cut"]["auroc_within_prompt"] is None
    within = found["loss", "number"]["auroc_within_prompt"]
    assert found["loss", ALL]["auroc_within_prompt"] == within is not None


def test_how_alike_signals_rank():
    rows = rows_of({"cut": 30})
    rows.signals["reversed"] = -np.exp(rows.signals["loss"])
    rows.directions["reversed"] = "smallest"
    rows.signals["reversed"][COUNT:] = 0.0
    found = alike_of(rows)
    assert found["signals"] == ["loss", "small", "num_tokens", "reversed"]
    assert found["spearman"][0][3] == pytest.approx(-1)
    assert found["groups"] == [["loss", "reversed"]]


def test_numbers_of_values():
    assert number_of(["b", "a", "b"]).tolist() == [0, 1, 0]
    assert not math.isnan(number_of([]).sum())
