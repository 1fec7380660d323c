"""The rule by which a step of a run stands out from those before it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from resofilter_trainer.ledger.live import LAST, LEAST, stands_out, usual

NOISY = np.random.default_rng(0).normal(2.0, 0.1, 300).tolist()


def plain(value: float, earlier: list[float]) -> bool:
    """As the module's docstring says."""
    last = sorted(earlier[-100:])
    level = float(np.median(last))
    noise = 1.4826 * float(np.median([abs(each - level) for each in last]))
    return value > level + 6 * max(noise, level / 1000)


def test_hardly_any_value_of_normal_noise_stands_out():
    out = [at for at in range(1, 300) if stands_out(NOISY[at], NOISY[:at])]
    assert out == []


@pytest.mark.parametrize("value", [1.0, 2.3, 2.5, 2.6, 2.7, 3.0, 9.0])
@pytest.mark.parametrize("count", [LEAST, 50, LAST, 300])
def test_it_is_the_plain_rule(value, count):
    assert stands_out(value, NOISY[:count]) == plain(value, NOISY[:count])
    factors = np.exp(NOISY[:count]).tolist()
    assert stands_out(math.exp(value), factors, by_factor=True) == plain(value, NOISY[:count])


def test_only_the_last_steps_count():
    assert stands_out(3.0, [9.0] * 500 + NOISY[:LAST])
    assert not stands_out(3.0, [2.0] * 500 + [3.0] * LAST)


def test_before_there_are_enough_steps_nothing_stands_out():
    assert not stands_out(1e9, NOISY[: LEAST - 1])
    assert not stands_out(math.nan, [])
    assert not stands_out(1e9, [*NOISY[: LEAST - 1], *[math.nan] * 50])
    assert stands_out(1e9, NOISY[:LEAST])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("by_factor", [False, True])
def test_a_value_that_is_no_number_stands_out(value, by_factor):
    assert stands_out(value, NOISY[:50], by_factor)


def test_where_all_are_the_same_a_thousandth_is_the_noise():
    assert not stands_out(2.0119, [2.0] * 50)
    assert stands_out(2.0121, [2.0] * 50)
    assert not stands_out(0.0, [1.0] * 50, by_factor=True)


def test_the_usual_value_is_the_median_of_the_last_steps():
    assert usual([9.0] * 50 + [1.0, math.nan] * 50) == 1.0
    assert math.isnan(usual([]))
