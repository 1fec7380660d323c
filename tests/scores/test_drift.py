"""A trend that is put in is taken out, and what is no trend is left."""

from __future__ import annotations

import numpy as np
import pytest

from resofilter_trainer.scores.drift import drop_rate_by_moment, on_scale_of, without_drift
from resofilter_trainer.scores.statistics import rank_correlation

ROWS = 4000
QUARTILES = [0.25, 0.5, 0.75]
TRENDS = {  # of the moment, 0 to 1: what the score is multiplied by, and what is added
    "linear": lambda t: (1 - 0.6 * t, 0),
    "exponential": lambda t: (np.exp(-2 * t), 0),
    "rising": lambda t: (1 + 2 * t, 0),
    "level alone": lambda t: (1, -3 * t),
    "fast at first": lambda t: (0.3 + 0.7 * np.exp(-5 * t), 0),
}


def truth(seed: int = 0, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 0.5, rows)


def moments(seed: int = 0, rows: int = ROWS) -> np.ndarray:
    """Updates of 8 rows, each row in a random one."""
    return np.random.default_rng(seed + 100).permutation(rows) // 8


def dropped(scores: np.ndarray) -> np.ndarray:
    return scores > np.median(scores)


# ---- within an epoch


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("trend", TRENDS.values(), ids=list(TRENDS))
def test_trend_is_taken_out(trend, seed):
    true, when = truth(seed), moments(seed)
    factor, shift = trend(when / when.max())
    measured = true * factor + shift

    corrected = without_drift(measured, when)

    assert np.ptp(drop_rate_by_moment(dropped(measured), when)) > 0.4
    assert np.abs(drop_rate_by_moment(dropped(corrected), when) - 0.5).max() < 0.06
    assert rank_correlation(corrected, true) > 0.97 > rank_correlation(measured, true)


@pytest.mark.parametrize("trend", TRENDS.values(), ids=list(TRENDS))
def test_scores_keep_their_median_and_spread(trend):
    when = moments()
    factor, shift = trend(when / when.max())
    measured = truth() * factor + shift

    low, middle, high = np.quantile(measured, QUARTILES)
    first, median, third = np.quantile(without_drift(measured, when), QUARTILES)

    assert median == pytest.approx(middle, abs=0.1 * (high - low))
    assert third - first == pytest.approx(high - low, rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_scores_without_drift_hardly_change(seed):
    scores = truth(seed)
    assert rank_correlation(without_drift(scores, moments(seed)), scores) > 0.98


def test_only_the_order_of_the_moments_matters():
    scores, when = truth(), moments()
    np.testing.assert_array_equal(without_drift(scores, when), without_drift(scores, 7.0 * when**2 - 5))


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_and_counts_for_nothing(hole):
    when = moments()
    scores = truth() * np.exp(-when / when.max())
    whole = np.random.default_rng(0).random(ROWS) < 0.8
    scores[~whole] = hole

    corrected = without_drift(scores, when)

    np.testing.assert_array_equal(corrected[~whole], scores[~whole])
    np.testing.assert_array_equal(corrected[whole], without_drift(scores[whole], when[whole]))


def test_scores_that_are_passed_are_not_changed():
    scores, when = truth() * np.linspace(1, 2, ROWS), np.arange(ROWS)
    before = scores.copy()
    assert not np.array_equal(without_drift(scores, when), before)
    np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize("holes", [0, 100])
def test_fewer_than_100_scores_are_copied(holes):
    scores = np.concatenate([np.linspace(1, 2, 99), np.full(holes, np.nan)])
    found = without_drift(scores, np.arange(len(scores)))
    np.testing.assert_array_equal(found, scores)
    assert not np.shares_memory(found, scores)


def test_100_scores_are_enough():
    when = np.arange(100)
    scores = truth(rows=100) - 5 * when / 100
    early, late = drop_rate_by_moment(dropped(scores), when, bins=2)
    assert early - late > 0.8
    early, late = drop_rate_by_moment(dropped(without_drift(scores, when)), when, bins=2)
    assert abs(early - late) < 0.4  # half windows at either end are all there is


def test_constants_stay():
    np.testing.assert_array_equal(without_drift(np.full(500, 3.0), np.arange(500)), np.full(500, 3.0))


def test_a_stretch_of_constants_stays_finite():
    """As where the first steps have a learning rate of zero."""
    scores = truth(rows=500)
    scores[:200] = 0
    assert np.isfinite(without_drift(scores, np.arange(500))).all()


# ---- between epochs


def test_epochs_are_put_on_the_scale_of_their_common_rows():
    first, second = truth(0, 300), truth(1, 300) * 0.2 + 4
    first[:100], second[200:] = np.nan, np.nan
    common = slice(100, 200)

    found = on_scale_of(second, first)

    np.testing.assert_allclose(np.quantile(found[common], 0.5), np.quantile(first[common], 0.5))
    assert np.subtract(*np.quantile(found[common], [0.75, 0.25])) == pytest.approx(
        np.subtract(*np.quantile(first[common], [0.75, 0.25]))
    )


def test_another_scale_is_undone_also_for_rows_not_in_common():
    true = truth(rows=300)
    earlier, later = true.copy(), 3 * true - 1
    earlier[:150], later[250:] = np.nan, np.nan
    np.testing.assert_allclose(on_scale_of(later, earlier), [*true[:250], *[np.nan] * 50])


@pytest.mark.parametrize("earlier", [[np.nan] * 3, [np.nan, np.nan, 5.0]])
def test_without_common_rows_nothing_changes(earlier):
    scores = np.array([1.0, 2.0, np.nan])
    found = on_scale_of(scores, np.array(earlier))
    np.testing.assert_array_equal(found, scores)
    assert not np.shares_memory(found, scores)


@pytest.mark.parametrize(
    ("earlier", "found"), [([7, np.nan, np.nan], [7, 8, 10]), ([5, 5, 5], [4, 5, 7])], ids=["one row", "constant"]
)
def test_without_a_spread_scores_are_only_moved(earlier, found):
    np.testing.assert_allclose(on_scale_of(np.array([1.0, 2, 4]), np.array(earlier, float)), found)


# ---- what the correction is judged by


def test_drop_rate_is_of_rows_by_when_they_were_measured():
    when = np.array([5, 0, 3, 1, 4, 2])
    gone = np.array([True, False, True, False, False, True])
    assert drop_rate_by_moment(gone, when, bins=3).tolist() == [0, 1, 0.5]


def test_drop_rate_has_ten_parts_and_takes_every_row():
    gone = np.arange(25) % 2 == 0
    rates = drop_rate_by_moment(gone, np.arange(25))
    assert len(rates) == 10
    assert np.average(rates, weights=[3] * 5 + [2] * 5) == pytest.approx(gone.mean())
