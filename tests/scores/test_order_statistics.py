"""Order statistics over pieces are those of the sorted whole, to the bit, however few values may be in memory."""

from __future__ import annotations

import numpy as np
import pytest

from resofilter_trainer.scores import order_statistics as module
from resofilter_trainer.scores.order_statistics import order_statistics, quantiles

RANDOM = np.random.default_rng(0)
VALUES = {
    "spread": RANDOM.normal(size=40),
    "close together": 1e-5 * (1 - 1e-9 * RANDOM.random(40)),
    "few different": RANDOM.choice([0.0, -0.0, 1.0, 5e-324, -5e-324, 1e308, -1e308], 40),
    "equal": np.full(40, 3.0),
    "one": np.array([-2.5]),
}


@pytest.mark.parametrize("gathered", [2, 1 << 24])
@pytest.mark.parametrize("case", VALUES)
def test_every_place_has_its_value_and_its_neighbours(case, gathered, monkeypatch):
    monkeypatch.setattr(module, "GATHERED", gathered)
    monkeypatch.setattr(module, "CACHED", 7)
    values, passes = VALUES[case], []

    def read() -> list[np.ndarray]:
        passes.append(1)
        return np.array_split(values, 4)

    places = range(0, len(values), 7)
    count, found = order_statistics(read, lambda rows: places)

    ordered = np.sort(values)
    assert count == len(values)
    assert len(passes) <= 5
    for place, each in zip(places, found, strict=True):
        assert each.value == ordered[place]
        assert not np.signbit(each.value) or each.value < 0  # -0.0 is 0.0
        counts = [int(np.sum(own)) for own in (values < each.value, values == each.value, values > each.value)]
        assert [each.below, each.equal, each.above] == counts


@pytest.mark.parametrize("case", ["spread", "close together", "equal", "one"])
def test_quantiles_are_those_of_numpy(case):
    values, shares = VALUES[case], [0.05, 0.25, 0.5, 1 / 3, 0.95, 0.0, 1.0]
    assert quantiles(lambda: np.array_split(values, 4), shares) == np.quantile(values, shares).tolist()


def test_no_values_have_no_places():
    assert order_statistics(lambda: [np.zeros(0)], lambda rows: range(rows)) == (0, [])
