"""Ranks, rank correlation, AUROC and intervals, against their formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resofilter_trainer.scores.statistics import NORMAL975, T975, auroc, interval, rank_correlation, ranks

values_with_ties = st.lists(st.integers(0, 5).map(float), min_size=2, max_size=12)


# ---- ranks


@given(values_with_ties)
def test_a_rank_counts_the_smaller_values_and_half_of_the_equal_ones(values):
    smaller = [sum(other < value for other in values) for value in values]
    equal = [values.count(value) for value in values]
    assert ranks(np.array(values)).tolist() == [
        below + (same + 1) / 2 for below, same in zip(smaller, equal, strict=True)
    ]


@given(values_with_ties, st.randoms())
def test_rank_correlation_is_pearsons_of_the_ranks(values, chance):
    other = chance.sample(values, len(values))
    found = rank_correlation(np.array(values), np.array(other))
    if len(set(values)) == 1:
        assert found == 0
        return
    a, b = (each - each.mean() for each in (ranks(np.array(values)), ranks(np.array(other))))
    assert found == pytest.approx((a @ b) / math.sqrt((a @ a) * (b @ b)))


def test_rank_correlation_of_a_monotone_function_is_one():
    values = np.array([0.1, 3.0, -2.0, 7.0])
    assert rank_correlation(values, np.exp(values)) == pytest.approx(1)
    assert rank_correlation(values, -(values**3)) == pytest.approx(-1)


# ---- AUROC


@given(st.lists(st.tuples(st.integers(0, 4).map(float), st.booleans()), min_size=2, max_size=12))
def test_auroc_is_the_share_of_pairs_in_order(rows):
    values, positive = np.array([value for value, _ in rows]), np.array([truth for _, truth in rows])
    if positive.all() or not positive.any():
        return
    pairs = [np.sign(high - low) for high in values[positive] for low in values[~positive]]
    assert auroc(values, positive) == pytest.approx((np.mean(pairs) + 1) / 2)


# ---- intervals


def test_the_interval_is_students():
    mean, low, high = interval([1.0, 2.0, 4.0])
    half = 4.303 * np.std([1, 2, 4], ddof=1) / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half))


def test_one_seed_has_no_interval_and_none_no_mean():
    assert interval([0.5])[0] == 0.5
    assert math.isnan(interval([0.5])[1])
    assert all(map(math.isnan, interval([])))


@pytest.mark.parametrize(("count", "t"), [(31, 2.042), (32, 2.040), (61, 2.000), (121, 1.980), (100_001, 1.960)])
def test_the_table_of_t_falls_to_the_normal_distributions(count, t):
    assert len(T975) == 30
    assert list(T975) == sorted(T975, reverse=True)
    assert T975[-1] > NORMAL975
    values = list(np.arange(float(count)))
    mean, low, _ = interval(values)
    assert mean - low == pytest.approx(t * np.std(values, ddof=1) / math.sqrt(count), rel=2e-3)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.floats(-10, 10))
def test_an_interval_moves_with_its_values(values, shift):
    before, after = interval(values), interval([value + shift for value in values])
    np.testing.assert_allclose(after, np.array(before) + shift, atol=1e-9)
