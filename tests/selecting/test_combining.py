"""Combinations of several columns, against their definitions written out row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resofilter_trainer.scores.statistics import rank_correlation
from resofilter_trainer.selecting.combining import COMBINATIONS, mean_rank, pareto, residual, topsis

Rows = Sequence[Sequence[float]]


def tables(columns: int) -> st.SearchStrategy[list[tuple[float, ...]]]:
    """Rows of `columns` values: few different ones, so that rows tie and repeat, or any."""
    few = st.lists(st.tuples(*[st.integers(0, 4).map(float)] * columns), min_size=1, max_size=25)
    return few | st.lists(st.tuples(*[st.floats(-1e3, 1e3)] * columns), min_size=1, max_size=25)


rows_of_all_kinds = tables(1) | tables(2) | tables(3)


def array(rows: Rows) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def mean_rank_of(row: Sequence[float], rows: Rows) -> float:
    """Equal values share the mean of their ranks."""
    ranks = []
    for k, value in enumerate(row):
        column = [each[k] for each in rows]
        ranks.append(sum(each < value for each in column) + (column.count(value) + 1) / 2)
    return sum(ranks) / len(ranks)


def topsis_of(row: Sequence[float], rows: Rows) -> float:
    from_best = from_worst = 0.0
    for k, value in enumerate(row):
        norm = math.sqrt(sum(each[k] ** 2 for each in rows)) or 1.0
        column = [each[k] / norm for each in rows]
        from_best += (value / norm - min(column)) ** 2
        from_worst += (value / norm - max(column)) ** 2
    whole = math.sqrt(from_best) + math.sqrt(from_worst)
    return math.sqrt(from_best) / whole if whole else 0.0


def fronts_of(rows: Rows) -> list[int]:
    """Remove the rows that no other row dominates, again and again."""

    def better(one: Sequence[float], other: Sequence[float]) -> bool:
        return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)

    front, left, number = [0] * len(rows), set(range(len(rows))), 0
    while left:
        number += 1
        peeled = {i for i in left if not any(better(rows[j], rows[i]) for j in left)}
        for i in peeled:
            front[i] = number
        left -= peeled
    return front


def order(values: np.ndarray) -> list[int]:
    """The rank of each value among the distinct ones."""
    return np.unique(values, return_inverse=True)[1].ravel().tolist()


# ---- against the definitions


@given(rows_of_all_kinds)
def test_mean_rank_is_the_mean_of_the_ranks(rows):
    assert mean_rank(array(rows)) == pytest.approx([mean_rank_of(row, rows) for row in rows])


@given(st.lists(st.tuples(*[st.integers(-20, 20).map(float)] * 3), min_size=1, max_size=25))
def test_topsis_is_the_formula(rows):
    assert topsis(array(rows)) == pytest.approx([topsis_of(row, rows) for row in rows], abs=1e-7)


@given(tables(2))
def test_fronts_of_two_indicators_are_those_that_peeling_finds(rows):
    assert np.floor(pareto(array(rows))).tolist() == fronts_of(rows)


@given(tables(3))
def test_fronts_of_three_indicators_are_those_that_peeling_finds(rows):
    assert np.floor(pareto(array(rows))).tolist() == fronts_of(rows)


@given(rows_of_all_kinds)
def test_within_a_front_the_mean_rank_orders_and_no_front_is_crossed(rows):
    slow = sorted(set(zip(fronts_of(rows), mean_rank(array(rows)).tolist(), strict=True)))
    places = [slow.index(each) for each in zip(fronts_of(rows), mean_rank(array(rows)).tolist(), strict=True)]
    assert order(pareto(array(rows))) == places


def test_a_front_is_one_number_and_the_next_is_another():
    rows = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]
    assert np.floor(pareto(array(rows))).tolist() == [1, 2, 2, 3, 1]


# ---- the contract of all combinations


@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=list(COMBINATIONS))
@given(rows=tables(1) | tables(2), constant=st.sampled_from([0.0, 3.0, -0.1]))
def test_a_constant_column_changes_no_order(combine, rows, constant):
    before = combine(array(rows))
    after = combine(np.column_stack([array(rows), np.full(len(rows), constant)]))
    assert order(after.round(9)) == order(before.round(9))


@pytest.mark.parametrize("combine", [mean_rank, topsis, pareto])
@given(rows=rows_of_all_kinds)
def test_equal_rows_get_equal_values_and_better_rows_smaller_ones(combine, rows):
    values = combine(array(rows))
    assert values.shape == (len(rows),)
    assert np.isfinite(values).all()
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            if all(a <= b for a, b in zip(one, other, strict=True)):
                assert values[i] <= values[j] + 1e-12


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_where_nothing_differs_topsis_is_zero(columns):
    assert topsis(np.full((4, columns), 0.1)).tolist() == [0] * 4
    assert topsis(np.zeros((4, columns))).tolist() == [0] * 4


@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=list(COMBINATIONS))
def test_where_nothing_differs_all_rows_are_equal(combine):
    assert len(set(combine(np.full((5, 2), 0.1)).tolist())) == 1


def test_topsis_runs_from_the_best_to_the_worst():
    assert topsis(array([(1, 10), (2, 20), (3, 30)])).tolist() == pytest.approx([0, 0.5, 1])


def test_topsis_knows_no_units():
    rows = np.random.default_rng(0).random((20, 3))
    assert topsis(rows) == pytest.approx(topsis(rows * [1, 1000, 1e-5]))


def test_the_residual_is_what_the_others_do_not_explain():
    rng = np.random.default_rng(0)
    loss, length, own = rng.normal(size=(3, 200))
    found = residual(np.column_stack([loss + length + own, loss, length]))
    assert abs(rank_correlation(found, loss)) < 0.1
    assert abs(rank_correlation(found, length)) < 0.1
    assert rank_correlation(found, own) > 0.8


def test_nothing_is_left_of_what_another_says_already():
    values = np.random.default_rng(0).normal(size=50)
    assert residual(np.column_stack([values, values**3])) == pytest.approx(np.zeros(50), abs=1e-9)
