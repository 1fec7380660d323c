"""The AUROC of dependent rows against counts of all pairs, and its interval against a bootstrap over clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from resofilter_trainer.probe.statistics import (
    Auroc,
    alike,
    clustered_auroc,
    length_out,
    mean_of,
    rank_correlations,
)


def counted(values, positive, strata) -> float:
    """The oracle: every pair of a stratum, one after another."""
    won = pairs = 0.0
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive & (strata == strata[i])):
            won += 1.0 if values[i] > values[j] else 0.5 if values[i] == values[j] else 0.0
            pairs += 1
    return won / pairs if pairs else math.nan


def rows(seed: int, sources: int = 60, shift: float = 0.7, coarse: bool = False):
    """Unplanted rows, and copies of some of them whose values depend on those of their source."""
    random = np.random.default_rng(seed)
    base = random.normal(size=sources)
    copied = random.permutation(sources)[: sources // 2]
    values = np.concatenate([base, 0.8 * base[copied] + 0.6 * random.normal(size=len(copied)) + shift])
    positive = np.arange(len(values)) >= sources
    clusters = np.concatenate([np.arange(sources), copied])
    return values.round(0 if coarse else 9), positive, clusters


def bootstrap(values, positive, clusters, strata, repeats: int = 1500) -> float:
    """The oracle of the standard error: whole clusters drawn again and again."""
    random, count, found = np.random.default_rng(0), clusters.max() + 1, []
    members = [np.flatnonzero(clusters == each) for each in range(count)]
    for _ in range(repeats):
        drawn = random.integers(0, count, count)
        taken = np.concatenate([members[each] for each in drawn])
        found.append(clustered_auroc(values[taken], positive[taken], clusters[taken], strata[taken]).value)
    return float(np.nanstd(found))


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("strata", [1, 3, 60])
def test_the_auroc_is_the_share_of_pairs(strata, coarse):
    values, positive, clusters = rows(strata, coarse=coarse)
    groups = clusters % strata
    found = clustered_auroc(values, positive, clusters, groups)
    assert found.value == pytest.approx(counted(values, positive, groups), abs=1e-12)
    each = [(positive & (groups == g)).sum() * (~positive & (groups == g)).sum() for g in range(strata)]
    assert found.pairs == sum(each)


def test_infinite_values_are_the_largest_and_tie_with_each_other():
    values, positive = np.array([np.inf, np.inf, 1.0, -np.inf]), np.array([True, False, False, True])
    assert clustered_auroc(values, positive, np.arange(4)).value == pytest.approx((0.5 + 1 + 0 + 0) / 4)


@pytest.mark.parametrize("strata", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 0.7, 1.5])
def test_the_standard_error_is_that_of_a_bootstrap_over_clusters(strata, shift):
    values, positive, clusters = rows(7, sources=240, shift=shift)
    groups = clusters % strata
    error = clustered_auroc(values, positive, clusters, groups).error
    assert error == pytest.approx(bootstrap(values, positive, clusters, groups, 600), rel=0.1)


def test_a_copy_varies_with_its_row_so_that_the_error_is_smaller_than_of_independent_rows():
    values, positive, clusters = rows(3, sources=200)
    assert (
        clustered_auroc(values, positive, clusters).error
        < 0.9 * clustered_auroc(values, positive, np.arange(len(values))).error
    )


def test_the_variance_is_obuchowskis_up_to_pairs_within_a_cluster():
    values, positive, clusters = rows(5, sources=400)
    found = clustered_auroc(values, positive, clusters)
    x, y = values[positive], values[~positive]
    won = (x[:, None] > y).astype(float) + 0.5 * (x[:, None] == y)
    v10, v01 = won.mean(1) - found.value, won.mean(0) - found.value
    count = clusters.max() + 1
    of_x = np.bincount(clusters[positive], v10, minlength=count)
    of_y = np.bincount(clusters[~positive], v01, minlength=count)
    i10, i01 = (np.bincount(clusters[each], minlength=count).astype(bool).sum() for each in (positive, ~positive))
    m, n = len(x), len(y)
    s10, s01 = i10 / (i10 - 1) / m * (of_x**2).sum(), i01 / (i01 - 1) / n * (of_y**2).sum()
    s11 = count / (count - 1) * (of_x * of_y).sum()
    obuchowski = s10 / m + s01 / n + 2 * s11 / (m * n)
    assert found.error**2 - found.least == pytest.approx(obuchowski, rel=0.02)


def test_pairs_within_a_prompt_alone_have_the_error_of_a_mean_over_prompts():
    """Where each stratum is a cluster with one pair, the AUROC is a mean of independent wins."""
    random = np.random.default_rng(0)
    values, positive = random.normal(size=200), np.arange(200) % 2 == 0
    clusters = np.arange(200) // 2
    found = clustered_auroc(values, positive, clusters, clusters)
    wins = (values[positive] > values[~positive]).astype(float)
    assert found.value == wins.mean()
    assert found.error**2 - found.least == pytest.approx(wins.var(ddof=1) / 100, rel=1e-9)


def test_a_perfect_auroc_of_few_rows_is_not_certain():
    values, positive = np.arange(50.0), np.arange(50) >= 40
    found = clustered_auroc(values, positive, np.arange(50))
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(1 - 1.96 * math.sqrt(1 / 20**2 + 1 / 80**2))


def test_without_a_pair_nothing_is_known():
    found = clustered_auroc(np.arange(4.0), np.ones(4, bool), np.arange(4))
    assert [math.isnan(each) for each in (found.value, found.low, found.high)] == [True] * 3
    assert found.pairs == 0


def test_one_cluster_has_no_interval():
    found = clustered_auroc(np.arange(4.0), np.array([True, False, True, False]), np.zeros(4, int))
    assert (found.value, math.isnan(found.low)) == (0.25, True)


def test_the_mean_of_kinds_weighs_them_alike_and_knows_that_they_share_rows():
    values, positive, clusters = rows(1, sources=300)
    one = clustered_auroc(values, positive, clusters)
    few = positive & (np.cumsum(positive) % 5 == 0)
    other = clustered_auroc(-values[few | ~positive], few[few | ~positive], clusters[few | ~positive], count=300)
    together = mean_of([one, other, clustered_auroc(values[:3], positive[:3], clusters[:3], count=300)])
    assert together.value == pytest.approx((one.value + other.value) / 2)
    # the same values, reversed, of partly the same rows: what moves one up moves the other down
    assert together.error < 0.9 * math.hypot(one.error, other.error) / 2
    same = mean_of([one, one])
    assert same.error == pytest.approx(one.error, rel=0.01)


def test_a_mean_of_nothing_is_nothing():
    assert math.isnan(mean_of([]).value)
    assert isinstance(mean_of([]), Auroc)


def test_what_rises_with_the_length_alone_says_nothing_with_length_out():
    random = np.random.default_rng(0)
    lengths = random.integers(5, 300, 400).astype(float)
    positive = lengths + random.normal(size=400) * 60 > 180
    assert clustered_auroc(lengths**2, positive, np.arange(400)).value > 0.9
    assert clustered_auroc(length_out(lengths**2, lengths), positive, np.arange(400)).value == 0.5


def test_rank_correlations_and_what_is_alike():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 300))
    columns = [a, np.exp(a), -a, b, np.full(300, 2.0), np.where(np.arange(300) < 299, np.nan, b)]
    found = rank_correlations(columns)
    assert found[0, 1] == pytest.approx(1)
    assert found[0, 2] == pytest.approx(-1)
    assert abs(found[0, 3]) < 0.2
    assert found[0, 4] == 0
    assert math.isnan(found[0, 5])
    assert alike(found, "abcdef", 0.95) == [["a", "b", "c"]]
