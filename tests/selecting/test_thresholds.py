"""Each threshold against every possible cut, in exact arithmetic; and the contract of all thresholds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from resofilter_trainer.selecting.thresholds import RULES, iqr, knee, otsu

spread = st.lists(st.integers(-1000, 1000), min_size=1, max_size=30)
tied = st.lists(st.integers(0, 5), min_size=1, max_size=30)
whole = spread | tied  # sums and quarters of these are exact


@pytest.fixture(params=RULES.values(), ids=list(RULES))
def rule(request) -> Callable[[np.ndarray], float]:
    return request.param


def floats(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def mean(values: Sequence[int]) -> Fraction:
    return Fraction(sum(values), len(values))


def between_classes(values: Sequence[int], at: float) -> Fraction:
    """Otsu's variance between kept and dropped values: the shares times the squared distance of the means."""
    low, high = [each for each in values if each <= at], [each for each in values if each > at]
    share = Fraction(len(low), len(values))
    return share * (1 - share) * (mean(low) - mean(high)) ** 2


def cuts(values: Sequence[int]) -> list[int]:
    """The largest value to keep, for each split into two groups."""
    return sorted(set(values))[:-1]


def below_chord(values: Sequence[int], at: float) -> Fraction:
    """Distance, times the root of two, from the chord to the first of the falling values that is `at`."""
    falling = sorted(values, reverse=True)
    x = Fraction(falling.index(at), len(values) - 1)
    y = Fraction(falling[falling.index(at)] - falling[-1], falling[0] - falling[-1])
    return 1 - x - y


# ---- against every cut


@given(whole)
def test_otsu_is_the_best_of_all_splits(values):
    assume(len(set(values)) > 1)
    at = otsu(floats(values))
    assert at in cuts(values)
    assert between_classes(values, at) == max(between_classes(values, each) for each in cuts(values))


@given(whole)
def test_iqr_is_tukeys_fence(values):
    assume(len(values) > 1)
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    assert iqr(floats(values)) == pytest.approx(third + 1.5 * (third - first))
    first, third = np.quantile(values, 0.25), np.quantile(values, 0.75)
    assert iqr(floats(values)) == pytest.approx(third + 1.5 * (third - first))


@given(whole)
def test_knee_is_farthest_below_the_chord(values):
    assume(len(set(values)) > 1)
    at = knee(floats(values))
    assert at in values
    assert below_chord(values, at) == max(below_chord(values, each) for each in values)


# ---- invariance


@given(whole, st.integers(-1000, 1000), st.integers(1, 50))
def test_iqr_and_knee_move_with_the_values(values, shift, scale):
    moved = floats([scale * each + shift for each in values])
    assert iqr(moved) == scale * iqr(floats(values)) + shift
    assert knee(moved) == scale * knee(floats(values)) + shift


@given(whole, st.integers(-1000, 1000), st.integers(1, 50))
def test_otsu_moves_with_the_values(values, shift, scale):
    gains = sorted(between_classes(values, each) for each in cuts(values))
    assume(len(gains) < 2 or gains[-1] > gains[-2])  # of equally good splits any will do
    assert otsu(floats([scale * each + shift for each in values])) == scale * otsu(floats(values)) + shift


@given(values=whole, random=st.randoms(use_true_random=False))
def test_order_of_the_values_does_not_matter(values, random):
    shuffled = random.sample(values, len(values))
    for rule in RULES.values():
        assert rule(floats(values)) == rule(floats(shuffled))


# ---- ends and corners


@given(st.floats(-1e6, 1e6), st.integers(1, 30))
def test_equal_values_are_all_kept(value, count):
    values = np.full(count, value)
    for rule in RULES.values():
        assert (values <= rule(values)).all()


@given(whole)
def test_the_smallest_is_always_kept(values):
    for rule in RULES.values():
        assert min(values) <= rule(floats(values))


def test_a_single_value_is_kept(rule):
    assert rule(floats([3.0])) == 3.0


def test_two_groups_far_apart_are_told_apart(rule):
    values = np.concatenate([1e-5 + 1e-7 * np.arange(20), 1e-3 + 1e-7 * np.arange(3)])
    assert (values <= rule(values)).tolist() == [True] * 20 + [False] * 3


def test_otsu_tells_groups_of_equal_size_apart():
    values = floats([0, 101, 1, 100, 2, 102])
    assert otsu(values) == 2


def test_a_straight_line_has_no_knee():
    assert knee(floats(range(9))) == 8
    assert knee(floats([1, 2])) == 2


def test_values_are_left_as_they_were(rule):
    values = floats([3, 1, 2, 9, 1])
    rule(values)
    assert values.tolist() == [3, 1, 2, 9, 1]
