"""The first measurement of an epoch counts, the last epoch's is kept, and a file gives back what was written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from helpers.tables import make_provenance, make_scores

from resofilter_trainer.config import InputError
from resofilter_trainer.scores.drift import on_scale_of, without_drift
from resofilter_trainer.training.measurements import FILE, Measured, Measurements

LAYERS = [2, 3]


def found(
    rows: Sequence[int] | np.ndarray, scores: Sequence[float] | np.ndarray, epoch: int = 0, step: int = 1
) -> Measured:
    """Rows whose layers differ by 2 and have the mean that is asked for."""
    scores = np.asarray(scores, float)
    layers = np.stack([scores - 1, scores + 1], axis=1)
    tokens = np.arange(len(scores)) + 10
    return Measured(epoch, step, np.asarray(rows), scores * 10, tokens, tokens + 5, layers)


def measurements(rows: int, *updates: Measured) -> Measurements:
    made = Measurements(rows, LAYERS)
    for each in updates:
        made.add(each)
    return made


# ---- added


def test_a_measurement_is_of_its_row_and_its_moment():
    made = measurements(4, found([2, 0], [0.5, 0.25], epoch=0, step=3))

    assert made.ever.tolist() == [True, False, True, False]
    assert made.epoch.tolist() == [0, -1, 0, -1]
    assert made.step.tolist() == [3, -1, 3, -1]
    assert made.num_tokens.tolist() == [11, 0, 10, 0]
    assert made.length.tolist() == [16, 0, 15, 0]
    np.testing.assert_array_equal(made.loss, [2.5, np.nan, 5, np.nan])
    np.testing.assert_array_equal(made.layers[[0, 2]], [[-0.75, 1.25], [-0.5, 1.5]])
    np.testing.assert_array_equal(made.measured, [0.25, np.nan, 0.5, np.nan])


def test_the_first_measurement_of_an_epoch_counts():
    made = measurements(3, found([0, 1], [1, 2], step=1), found([1, 2], [7, 3], step=2))
    assert made.measured.tolist() == [1, 2, 3]
    assert made.step.tolist() == [1, 1, 2]
    assert made.num_tokens.tolist() == [10, 11, 11]


def test_the_first_counts_within_a_step_too():
    made = measurements(3, found([2, 0, 2, 0, 1], [1, 2, 3, 4, 5]))
    assert made.measured.tolist() == [2, 5, 1]
    assert made.length.tolist() == [16, 19, 15]


def test_a_later_epoch_replaces_what_it_measures():
    made = measurements(2, found([0, 1], [1, 2], epoch=0, step=1), found([1], [7], epoch=1, step=5))
    assert made.measured.tolist() == [1, 7]
    assert made.epoch.tolist() == [0, 1]
    assert made.step.tolist() == [1, 5]


def test_fillers_are_nobodys():
    made = measurements(3, found([0, -1, -1], [1, 8, 9]), found([-1], [9], epoch=1))
    np.testing.assert_array_equal(made.measured, [1, np.nan, np.nan])
    assert made.ever.tolist() == [True, False, False]


# ---- made into scores


def test_there_are_no_scores_before_the_epoch_ends():
    made = measurements(2, found([0], [1]))
    assert np.isnan(made.score).all()
    made.end_epoch(0, correct_drift=False)
    np.testing.assert_array_equal(made.score, [1, np.nan])


def test_without_correction_scores_are_what_was_measured():
    made = measurements(3, found([0, 1, 2], [1, 2, 3]))
    made.end_epoch(0, correct_drift=False)
    made.add(found([0, 2], [10, 30], epoch=1))
    made.end_epoch(1, correct_drift=False)
    assert made.score.tolist() == [10, 2, 30]


def test_with_correction_the_drift_of_an_epoch_is_taken_out():
    scores = np.random.default_rng(0).random(200) + np.linspace(5, 0, 200)
    made = measurements(200, *(found([row], [scores[row]], step=row) for row in range(200)))

    made.end_epoch(0, correct_drift=True)

    np.testing.assert_allclose(made.score, without_drift(scores, np.arange(200)))
    np.testing.assert_allclose(made.measured, scores)  # as it was
    assert not np.allclose(made.score, scores)


def test_with_correction_later_epochs_are_on_the_scale_of_the_first():
    first = np.arange(10.0)
    made = measurements(12, found(range(10), first))
    made.end_epoch(0, correct_drift=True)
    made.add(found([*range(5), 10], [*(2 * first[:5] + 30), 50], epoch=1))

    made.end_epoch(1, correct_drift=True)

    np.testing.assert_allclose(made.score, [*range(10), 10, np.nan])
    np.testing.assert_allclose(made.measured[:5], 2 * first[:5] + 30)


def test_scales_do_not_drift_over_epochs():
    """Row 0 stays where it was, though each epoch's scores are on a scale of their own."""
    true = np.random.default_rng(1).random(50)
    made = Measurements(50, LAYERS)
    for epoch, (factor, shift) in enumerate([(1, 0), (0.5, 2), (0.1, 7), (3, -1)]):
        rows = np.arange(0, 50, epoch + 1)
        made.add(found(rows, factor * true[rows] + shift, epoch))
        made.end_epoch(epoch, correct_drift=True)
    np.testing.assert_allclose(made.score, true)


# ---- as a table


def test_table_has_a_line_for_every_row_of_the_users_dataset():
    made = measurements(3, found([0, 2], [1, 3], step=4))
    made.end_epoch(0, correct_drift=False)
    reasons = ["not measured yet", "too long", None, "too long", None]

    scores = made.to_scores(np.array([4, 0, 2]), reasons, make_provenance(rows=5))

    assert scores.table.to_pydict() == {
        "sample_id": [0, 1, 2, 3, 4],
        "score": [None, None, 3, None, 1],
        "loss": [None, None, 30, None, 10],
        "num_tokens": [None, None, 11, None, 10],
        "length": [None, None, 16, None, 15],
        "layer_2": [None, None, 2, None, 0],
        "layer_3": [None, None, 4, None, 2],
        "measured": [None, None, 3, None, 1],
        "epoch": [None, None, 0, None, 0],
        "step": [None, None, 4, None, 4],
        "reason": reasons,
    }


def test_table_has_the_types_that_scores_have():
    table = measurements(2, found([0, 1], [1, 2])).to_scores(np.arange(2), [None, None], make_provenance(rows=2)).table
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types.pop("reason") == "string"
    whole = {name for name, kind in types.items() if kind == "int64"}
    assert whole == {"sample_id", "num_tokens", "length", "epoch", "step"}
    assert {kind for name, kind in types.items() if name not in whole} == {"double"}


def test_a_score_that_is_nan_is_a_score_and_no_null():
    made = measurements(2, found([0, 1], [1, np.nan]))
    made.end_epoch(0, correct_drift=False)
    scores = made.to_scores(np.arange(2), [None, None], make_provenance(rows=2))
    assert scores.table["score"].null_count == 0
    np.testing.assert_array_equal(scores.column("score"), [1, np.nan])


def test_corrected_and_measured_are_told_apart():
    made = measurements(3, found([0, 1, 2], [1, 2, 3]))
    made.end_epoch(0, correct_drift=True)
    made.add(found([0, 1, 2], [11, 12, 13], epoch=1))
    made.end_epoch(1, correct_drift=True)
    scores = made.to_scores(np.arange(3), [None] * 3, make_provenance(rows=3))
    assert scores.column("measured").tolist() == [11, 12, 13]
    np.testing.assert_allclose(scores.column("score"), on_scale_of(made.measured, np.array([1.0, 2, 3])))
    np.testing.assert_allclose(scores.column("score"), [1, 2, 3])


# ---- written and read


def test_round_trip_with_further_columns(tmp_path):
    made = measurements(4, found([3, 1], [1 / 3, np.nan], step=9))
    made.end_epoch(0, correct_drift=False)
    made.add(found([1], [0.1 + 0.2], epoch=1, step=12))  # an epoch that has not ended
    extra = {"order": np.array([3, 1, -1, -1]), "keep": np.array([True, False, True, True])}

    made.save(tmp_path, extra)
    again, columns = Measurements.load(tmp_path)

    assert again.layer_indices == LAYERS
    for name in ("score", "loss", "num_tokens", "length", "layers", "epoch", "step"):
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name))
        assert getattr(again, name).dtype == getattr(made, name).dtype
    assert set(columns) == set(extra)
    for name, column in columns.items():
        np.testing.assert_array_equal(column, extra[name])


def test_what_was_read_can_be_gone_on_with(tmp_path):
    whole, part = measurements(3, found([0, 1], [1, 2])), measurements(3, found([0, 1], [1, 2]))
    part.save(tmp_path, {})
    part, _ = Measurements.load(tmp_path)
    for each in (whole, part):
        each.add(found([1, 2], [7, 3], step=2))
        each.end_epoch(0, correct_drift=True)
    assert part.score.tolist() == whole.score.tolist() == [1, 2, 3]


def test_a_folder_without_measurements_is_named(tmp_path):
    with pytest.raises(InputError, match="No measurements of a training run at") as refused:
        Measurements.load(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_scores_are_no_measurements(tmp_path):
    make_scores([1.0]).save(tmp_path / FILE)
    with pytest.raises(InputError, match="holds no measurements"):
        Measurements.load(tmp_path)


# ---- rows without a learnt token


def empty(rows: Sequence[int], epoch: int = 0) -> Measured:
    """Rows that were trained on without a learnt token; -1 is a filler."""
    zeros, none = np.zeros(len(rows)), np.zeros(len(rows), dtype=int)
    return Measured(epoch, 1, np.asarray(rows), zeros, none, none + 5, np.zeros((len(rows), 2)))


def test_a_row_is_idle_until_it_is_measured():
    made = measurements(4, empty([2, -1, 3]), found([0, 3], [0.5, 0.25]), empty([0], epoch=1))
    assert made.idle.tolist() == [False, False, True, False]
    assert made.ever.tolist() == [True, False, False, True]


def test_idle_rows_are_known_again_from_a_file(tmp_path):
    made = measurements(3, empty([2]), found([0], [0.5]))
    made.save(tmp_path, {})
    assert Measurements.load(tmp_path)[0].idle.tolist() == [False, False, True]


# ---- joined


def test_groups_have_the_mean_over_their_learnt_tokens():
    """Of pieces measured in other steps, one without a learnt token, one never seen, and one that is not finite."""
    made = measurements(7, found([0, 1], [1.0, 4.0], step=3), found([4, 5], [2.0, np.nan], epoch=1, step=9))
    empty = dataclasses.replace(found([2, 6], [7.0, 7.0]), num_tokens=np.zeros(2, int))
    made.add(empty)
    made.end_epoch(0, correct_drift=False)
    made.end_epoch(1, correct_drift=False)

    joined = made.joined(np.array([0, 0, 0, 1, 1, 2, 3]), 4)

    assert joined.num_tokens.tolist() == [10 + 11, 10, 11, 0]
    assert np.allclose(joined.score, [(10 * 1 + 11 * 4) / 21, 2, np.nan, np.nan], equal_nan=True)
    assert np.allclose(joined.loss, [10 * (10 * 1 + 11 * 4) / 21, 20, np.nan, np.nan], equal_nan=True)
    assert np.allclose(joined.measured, joined.score, equal_nan=True)
    assert joined.epoch.tolist() == [0, 1, 1, -1]
    assert joined.step.tolist() == [3, 9, 9, -1]
    assert joined.idle.tolist() == [False, False, False, True]
