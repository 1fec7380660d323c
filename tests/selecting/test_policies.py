"""The contract of every policy, on the same rows; and each rule against a slow, obvious one."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.oracles import number_dropped, papers_rule
from helpers.tables import WHY, make_provenance, make_scores
from hypothesis import given
from hypothesis import strategies as st

import resofilter_trainer
from resofilter_trainer.config import InputError
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.selecting import policies
from resofilter_trainer.selecting.combining import COMBINATIONS
from resofilter_trainer.selecting.data_selector import DataSelector
from resofilter_trainer.selecting.policies import POLICIES, DiverseSelector, OnePerPrompt, RandomSelector, SoftPruning
from resofilter_trainer.selecting.selection import Selection
from resofilter_trainer.selecting.thresholds import RULES

Make = Callable[[np.ndarray], Any]  # a policy, from the features of each row
BOTH = ("score", "loss")
# An example of each policy with required arguments; the others are made with their defaults.
EXAMPLES: dict[str, Make] = {"DiverseSelector": lambda features: DiverseSelector(features)}
VARIANTS: dict[str, Make] = {
    "otsu": lambda features: DataSelector(threshold="otsu"),
    "otsu from below": lambda features: DataSelector(threshold="otsu", drop="smallest"),
    "iqr": lambda features: DataSelector(threshold="iqr"),
    "knee": lambda features: DataSelector(threshold="knee"),
    "ranks of two": lambda features: DataSelector(by=BOTH, combine="ranks"),
    "topsis of two": lambda features: DataSelector(by=BOTH, combine="topsis"),
    "pareto of two": lambda features: DataSelector(by=BOTH, combine="pareto", drop="both"),
    "topsis with a minus": lambda features: DataSelector(
        by=("score", "-num_tokens"), combine="topsis", threshold="iqr"
    ),
    "short ones dropped": lambda features: DataSelector(by="-num_tokens"),
    "stratified": lambda features: DataSelector(stratify_by="num_tokens", strata=4),
    "stratified otsu": lambda features: DataSelector(stratify_by="num_tokens", strata=2, threshold="otsu"),
    "diverse, the smallest dropped": lambda features: DiverseSelector(
        features, 0.3, "smallest", by="loss", similarity=0.2
    ),
    "diverse by two": lambda features: DiverseSelector(features, by=BOTH),
    "residual": lambda features: DataSelector(by=("score", "num_tokens"), combine="residual"),
    "soft from above": lambda features: SoftPruning(keep=0.2, drop="largest", by="score", seed=7),
    "soft by two": lambda features: SoftPruning(by=BOTH),
    "one of several": lambda features: OnePerPrompt(by=("score", "-num_tokens"), drop="smallest", keep=2),
    "length out": lambda features: DataSelector(by="loss", length_out=True),
    "length out of two, stratified": lambda features: DataSelector(
        by=BOTH, combine="topsis", length_out=True, stratify_by="num_tokens", strata=2
    ),
    "length out otsu": lambda features: DataSelector(by="-loss", length_out=True, threshold="otsu"),
    "band": lambda features: DataSelector(band=(0.1, 0.7)),
    "band of votes": lambda features: DataSelector(by={"loss": 0.7, "-num_tokens": 0.2}, band=[0.25, 1]),
    "votes": lambda features: DataSelector(by={"loss": 1, "+layer_2": 0.5, "-num_tokens": 0.25}),
    "votes, length out": lambda features: DataSelector(by={"loss": 1, "+layer_2": 2}, length_out=True),
}


def example(name: str) -> Make:
    """A policy of `POLICIES`, made with its defaults or as in `EXAMPLES`."""

    def make(features: np.ndarray) -> Any:
        try:
            return EXAMPLES[name](features) if name in EXAMPLES else POLICIES[name]()
        except TypeError as error:
            pytest.fail(f"{name} cannot be made with its defaults ({error}): give it an example in EXAMPLES.")

    return make


CASES = {**{name: example(name) for name in POLICIES}, **VARIANTS}
AT_RANDOM = {"RandomSelector", "SoftPruning", "soft from above", "soft by two"}
SHARE_OF_A_SIDE = {"SoftPruning"}  # keep is the share of the rows beyond the mean
WITH_SHARE = ["DataSelector", "DiverseSelector", "RandomSelector", "SoftPruning"]  # keep is a share of the rows
SCORES = [None if row % 7 == 3 else (row * 5 % 11) / 8 for row in range(24)]  # ties, and rows without a score
DIFFERENT = [None if row % 7 == 3 else (row * 5 % 24) / 8 + (row % 5 == 0) * 30 for row in range(24)]
NOT_FINITE = [{4: math.nan, 8: math.inf, 9: -math.inf}.get(row, score) for row, score in enumerate(SCORES)]


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def make(request) -> Make:
    return request.param


def features_of(rows: int, dimensions: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dimensions))


def floats(values: Sequence[int]) -> list[float]:
    return [float(value) for value in values]


def same(one: Selection, other: Selection) -> bool:
    def decided(selection: Selection) -> tuple[Any, ...]:
        weight = None if selection.weight is None else selection.weight.tolist()
        return selection.keep.tolist(), list(selection.reason), weight

    return decided(one) == decided(other)


def taken(scores: ScoreTable, order: Sequence[int]) -> ScoreTable:
    """The scores if the dataset had only these rows, in this order."""
    table = scores.table.take(order).set_column(0, "sample_id", pa.array(range(len(order)), pa.int64()))
    return ScoreTable(table, dataclasses.replace(scores.provenance, rows=len(order)))


# ---- the contract


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_a_frozen_dataclass_with_a_public_name(name):
    policy = example(name)(features_of(3))
    assert type(policy) is POLICIES[name] is getattr(resofilter_trainer, name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.anything = 1


def test_no_policy_is_left_out():
    found = {each for each in vars(policies).values() if isinstance(each, type) and hasattr(each, "select")}
    assert found - {policies.Policy} == set(POLICIES.values())


@pytest.mark.parametrize("values", [SCORES, DIFFERENT, NOT_FINITE], ids=["tied", "different", "not finite"])
def test_every_row_is_decided_with_a_reason(make, values):
    selection = make(features_of(24)).select(make_scores(values))

    assert len(selection) == len(selection.keep) == len(selection.reason) == 24
    assert selection.keep.dtype == bool
    assert all(isinstance(reason, str) and reason for reason in selection.reason)
    assert [reason == "kept" for reason in selection.reason] == selection.keep.tolist()


def test_rows_without_score_are_dropped_for_their_own_reason(make):
    selection = make(features_of(24)).select(make_scores(SCORES))
    assert [row for row in range(24) if selection.reason[row] == WHY] == [3, 10, 17]
    assert not selection.keep[[3, 10, 17]].any()


def test_rows_without_score_change_nothing_for_the_others(make):
    rows = [row for row in range(24) if SCORES[row] is not None]
    features = features_of(24)
    alone = make(features[rows]).select(taken(make_scores(SCORES), rows))
    assert make(features).select(make_scores(SCORES)).keep[rows].tolist() == alone.keep.tolist()


@pytest.mark.parametrize("values", [SCORES, NOT_FINITE], ids=["finite", "not finite"])
def test_the_same_again_is_the_same(make, values):
    one, other = (make(features_of(24)).select(make_scores(values)) for _ in range(2))
    assert same(one, other)


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", WITH_SHARE)
def test_the_share_to_keep_is_that_of_the_rows_with_a_score(name, keep):
    policy = dataclasses.replace(example(name)(features_of(24)), keep=keep)
    kept, expected = policy.select(make_scores(SCORES)).keep.sum(), 21 - number_dropped(21, keep)
    assert kept >= expected if name in SHARE_OF_A_SIDE else kept == expected


def test_a_table_that_leaves_out_rows_is_refused(make):
    with pytest.raises(InputError, match="4 rows and the scores cover 2"):
        make(features_of(2)).select(make_scores([1.0, 2.0], [0, 3], make_provenance(rows=4)))


@pytest.mark.parametrize("name", [name for name in CASES if name not in AT_RANDOM])
@pytest.mark.parametrize("seed", range(3))
def test_order_of_rows_does_not_matter_where_all_differ(name, seed):
    order = np.random.default_rng(seed).permutation(24)
    scores, features = make_scores(DIFFERENT), features_of(24)
    before = CASES[name](features).select(scores)
    after = CASES[name](features[order]).select(taken(scores, order))
    assert after.keep.tolist() == before.keep[order].tolist()


def test_a_saved_selection_is_the_same_and_can_be_repeated(make, tmp_path):
    policy, scores = make(features_of(24)), make_scores(SCORES)
    selection = policy.select(scores)

    loaded = Selection.load(selection.save(tmp_path))

    assert same(loaded, selection)
    assert loaded.provenance == scores.provenance.to_json()
    assert loaded.policy == json.loads(json.dumps(selection.policy))
    assert same(dataclasses.replace(policy, **loaded.policy).select(scores), selection)


def test_weights_are_zero_exactly_for_dropped_rows(make):
    selection = make(features_of(24)).select(make_scores(SCORES))
    if selection.weight is not None:
        assert selection.weight.shape == (24,)
        assert (selection.weight > 0).tolist() == selection.keep.tolist()


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12) | st.lists(st.sampled_from([0.1, 0.3]), min_size=1))
def test_some_row_of_any_table_is_kept(values):
    scores, features = make_scores(values), features_of(len(values))
    for name, make in CASES.items():
        assert make(features).select(scores).keep.any(), name


def test_a_table_without_any_score_keeps_nothing_and_says_why(make):
    selection = make(features_of(3)).select(make_scores([None] * 3))
    assert not selection.keep.any()
    assert list(selection.reason) == [WHY] * 3


def test_scores_and_features_are_left_as_they_were(make):
    scores, features = make_scores(SCORES), features_of(24)
    make(features).select(scores)
    assert features.tolist() == features_of(24).tolist()
    assert scores.table.equals(make_scores(SCORES).table)


# ---- settings that cannot work


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        (DataSelector, {"keep": 0}, "keep"),
        (DataSelector, {"threshold": "nonsense"}, "threshold must be one of 'otsu', 'iqr', 'knee', got 'nonsense'"),
        (
            DataSelector,
            {"threshold": math.nan},
            "other than otsu, iqr, knee must be a finite number, got nan",
        ),
        (DataSelector, {"threshold": "otsu", "drop": "both"}, "threshold has one side"),
        (
            DataSelector,
            {"threshold": "otsu", "keep": 0.5},
            "one of keep=, threshold= and band=, got keep= and threshold=",
        ),
        (DataSelector, {"by": ()}, "by is the name"),
        (DataSelector, {"by": ""}, "by is the name"),
        (DataSelector, {"by": "-"}, "by is the name"),
        (DataSelector, {"by": ("score", "-")}, "by is the name"),
        (DataSelector, {"by": ("score", 2)}, "by is the name"),
        (DataSelector, {"combine": "x"}, "combine must be one of 'ranks', 'topsis', 'pareto', 'residual', got 'x'"),
        (DataSelector, {"strata": 0}, "strata"),
        (DataSelector, {"strata": 2.5}, "strata"),
        (DataSelector, {"strata": True}, "strata"),
        (DiverseSelector, {"keep": 0}, "keep"),
        (DiverseSelector, {"keep": None}, "keep"),
        (DiverseSelector, {"keep": {"a": 0.5}}, "keep"),
        (DiverseSelector, {"drop": "both"}, "drop must be one of 'largest', 'smallest', got 'both'"),
        (DiverseSelector, {"by": ()}, "by is the name"),
        (DiverseSelector, {"similarity": 2}, "similarity"),
        (DiverseSelector, {"similarity": math.nan}, "similarity"),
        (DiverseSelector, {"features": np.ones(3)}, "features"),
        (SoftPruning, {"keep": 0}, "keep"),
        (SoftPruning, {"keep": None}, "keep"),
        (SoftPruning, {"keep": {"a": 0.5}}, "keep"),
        (SoftPruning, {"drop": "both"}, "drop must be one of 'largest', 'smallest', got 'both'"),
        (SoftPruning, {"by": "-"}, "by is the name"),
        (SoftPruning, {"seed": -1}, "seed"),
        (SoftPruning, {"seed": 0.5}, "seed"),
        (SoftPruning, {"seed": True}, "seed"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(kind, settings, named):
    if kind is DiverseSelector:
        settings = {"features": features_of(3), **settings}
    with pytest.raises(InputError, match=named):
        kind(**settings)


@pytest.mark.parametrize(
    "policy", [DataSelector(by=("score", "bogus")), DataSelector(stratify_by="bogus"), SoftPruning(by="-bogus")]
)
def test_a_column_that_is_not_there_is_refused(policy):
    with pytest.raises(InputError, match="no column 'bogus'"):
        policy.select(make_scores([1.0, 2.0]))


@pytest.mark.parametrize(
    "policy",
    [
        SoftPruning(seed=np.int64(3)),
        DataSelector(stratify_by="num_tokens", strata=np.int64(2)),
        DataSelector(threshold=np.float32(2.0)),
        DiverseSelector(features_of(4), similarity=np.float32(0.5)),
    ],
    ids=["seed", "strata", "threshold", "similarity"],
)
def test_numpys_numbers_are_settings_that_can_be_saved(policy, tmp_path):
    selection = policy.select(make_scores([1.0, 2.0, 3.0, 4.0]))
    assert same(Selection.load(selection.save(tmp_path)), selection)


# ---- thresholds and columns, as the selector takes them


@pytest.mark.parametrize("rule", list(RULES))
def test_the_values_say_where_to_cut_and_the_reason_says_which_rule(rule):
    values = [1.0, 1.25, 1.5, 1.125, 50.0, 1.375, 1.25]
    selection = DataSelector(threshold=rule).select(make_scores([*values, None]))
    assert selection.sample_ids.tolist() == [0, 1, 2, 3, 5, 6]
    assert selection.reason[4].startswith("score above ")
    assert selection.reason[4].endswith(f"({rule})")


@pytest.mark.parametrize("rule", list(RULES))
def test_from_below_is_the_mirror(rule):
    mirrored = [None if value is None else -value for value in DIFFERENT]
    above = DataSelector(threshold=rule).select(make_scores(DIFFERENT))
    below = DataSelector(threshold=rule, drop="smallest").select(make_scores(mirrored))
    assert below.keep.tolist() == above.keep.tolist()
    assert 0 < above.keep.sum() < 21


@pytest.mark.parametrize("combine", list(COMBINATIONS))
def test_columns_are_combined_over_the_scored_rows_and_a_minus_turns_one_round(combine):
    values = [4.0, None, 1.0, 3.0, 1.0]
    table = np.array([(4.0, -3), (1.0, -5), (3.0, -6), (1.0, -7)])  # num_tokens is 3 + row
    got = DataSelector(by=("score", "-num_tokens"), combine=combine).values(make_scores(values))
    np.testing.assert_array_equal(got[[0, 2, 3, 4]], COMBINATIONS[combine](table))
    assert np.isnan(got[1])


def test_a_minus_drops_the_other_end():
    scores = make_scores([1.0, 4.0, 2.0, 3.0])  # num_tokens: 3, 4, 5, 6
    selection = DataSelector(by="-num_tokens").select(scores)
    assert selection.sample_ids.tolist() == [2, 3]
    assert selection.reason[0] == "largest 50 % by -num_tokens"


def test_the_reason_names_the_columns_and_how_they_were_combined():
    selection = DataSelector(by=BOTH, combine="pareto").select(make_scores([1.0, 2.0]))
    assert selection.reason[1] == "largest 50 % by pareto of score and loss"


# ---- strata


@given(st.permutations(range(20)), st.sampled_from([0.2, 0.4, 0.6, 1.0]), st.sampled_from([1, 2, 4, 5, 10]))
def test_the_share_holds_within_each_stratum(values, keep, strata):
    selection = DataSelector(keep=keep, stratify_by="num_tokens", strata=strata).select(make_scores(floats(values)))
    size = 20 // strata
    for start in range(0, 20, size):  # num_tokens rises from row to row
        assert selection.keep[start : start + size].tolist() == papers_rule(values[start : start + size], keep)


def test_rows_without_score_are_in_no_stratum():
    scores = make_scores([1.0, 2.0, None, None, None, None, 3.0, 4.0])
    selection = DataSelector(stratify_by="num_tokens", strata=2).select(scores)
    assert selection.sample_ids.tolist() == [0, 6]
    assert selection.reason[1] == "largest 50 % of group num_tokens 3 to 4"


def test_equal_values_are_in_one_stratum():
    """By position the first stratum would end within the fives."""
    scores = make_scores([5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 9.0, 9.0])
    selection = DataSelector(by="num_tokens", stratify_by="score", strata=2).select(scores)
    assert selection.sample_ids.tolist() == [0, 1, 2, 6]


def test_where_all_values_are_equal_there_is_one_stratum():
    selection = DataSelector(by="num_tokens", stratify_by="score", strata=4).select(make_scores([5.0] * 8))
    assert selection.sample_ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("step", [1.0, 1e-8])
def test_strata_are_told_apart_however_near_their_values(step):
    scores = make_scores([1 + step * row for row in range(4)])
    selection = DataSelector(by="num_tokens", stratify_by="score", strata=2).select(scores)
    assert selection.sample_ids.tolist() == [0, 2]


def test_groups_and_strata_are_too_much():
    with pytest.raises(InputError, match="one of groups= and stratify_by=, got groups= and stratify_by="):
        DataSelector(stratify_by="num_tokens").select(make_scores([1.0, 2.0]), groups=["a", "b"])


# ---- rows that differ


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))


def greedily(values: Sequence[float], features: np.ndarray, keep: float, similarity: float) -> list[int]:
    """Take the best rows that are unlike all taken before, then the best of those passed over."""
    count = len(values) - number_dropped(len(values), keep)
    taken: list[int] = []
    passed: list[int] = []
    for row in sorted(range(len(values)), key=lambda row: values[row]):
        alike = any(cosine(features[row], features[other]) > similarity for other in taken)
        (passed if alike or len(taken) == count else taken).append(row)
    return sorted(taken + passed[: count - len(taken)])


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=25),
    st.integers(0, 10**6),
    st.integers(1, 10).map(lambda tenth: tenth / 10),
    st.sampled_from([-0.5, 0.0, 0.5, 0.9, 0.99]),
)
def test_diverse_rows_are_taken_greedily(values, seed, keep, similarity):
    features = features_of(len(values), 2, seed)
    for drop, sign in (("largest", 1), ("smallest", -1)):
        selection = DiverseSelector(features, keep, drop, similarity=similarity).select(make_scores(values))
        expected = greedily([sign * value for value in values], features, keep, similarity)
        assert selection.sample_ids.tolist() == expected


def test_identical_rows_are_passed_over_and_the_reason_names_the_row():
    features = np.array([(1, 0), (2, 0), (0, 1), (-1, 0)])  # row 1 is row 0 again, only longer
    selection = DiverseSelector(features, keep=0.5).select(make_scores([1.0, 2.0, 3.0, 4.0]))
    assert list(selection.reason) == ["kept", "resembles row 0", "kept", "largest 50 %"]


def test_the_reason_names_rows_of_the_dataset_not_of_the_scored():
    features = np.array([(0, 0), (0, 1), (1, 0), (1, 0.01)])
    selection = DiverseSelector(features, keep=0.6).select(make_scores([None, 3.0, 2.0, 1.0]))
    assert list(selection.reason) == [WHY, "kept", "resembles row 3", "kept"]


def test_the_reason_names_the_row_that_is_most_like_it():
    angles = np.array([0.0, 1.0, 0.6])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    selection = DiverseSelector(features, keep=0.6, similarity=0.8).select(make_scores([1.0, 2.0, 3.0]))
    assert list(selection.reason) == ["kept", "kept", "largest 40 %"]
    angles = np.array([0.0, 1.0, 0.6, 2.5])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    selection = DiverseSelector(features, keep=0.75, similarity=0.8).select(make_scores([1.0, 2.0, 3.0, 4.0]))
    assert list(selection.reason) == ["kept", "kept", "resembles row 1", "kept"]


def test_where_too_few_differ_the_best_of_those_passed_over_fill_up():
    features = np.array([(1, 0)] * 5 + [(0, 1)])
    selection = DiverseSelector(features, keep=0.5).select(make_scores([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]))
    assert selection.sample_ids.tolist() == [1, 2, 5]
    assert list(selection.reason) == ["resembles row 1", "kept", "kept", "resembles row 1", "resembles row 1", "kept"]


def test_where_all_rows_are_alike_the_best_are_kept():
    values = [float(row * 5 % 11) for row in range(11)]
    selection = DiverseSelector(np.ones((11, 4)), keep=0.5).select(make_scores(values))
    assert selection.keep.tolist() == DataSelector(keep=0.5).select(make_scores(values)).keep.tolist()


def test_no_cosine_is_above_one():
    """Rounding makes some a little more: of rows that are the same, once they have length 1."""
    twice = features_of(30, 5).repeat(2, axis=0)
    selection = DiverseSelector(twice, keep=0.5, similarity=1).select(make_scores(floats(range(60))))
    assert selection.sample_ids.tolist() == list(range(30))


def test_length_of_features_does_not_matter():
    features, lengths = features_of(24), np.random.default_rng(1).uniform(0.01, 100, size=(24, 1))
    one, other = (DiverseSelector(some).select(make_scores(SCORES)) for some in (features, features * lengths))
    assert same(one, other)


@pytest.mark.parametrize("wrong", [0.0, math.nan, math.inf])
def test_features_that_point_nowhere_are_refused_and_the_row_named(wrong):
    features = features_of(4)
    features[2] = wrong
    with pytest.raises(InputError, match="Row 2 has a score, but its features are zero or not finite"):
        DiverseSelector(features).select(make_scores([3.0, None, 1.0, 2.0]))
    assert DiverseSelector(features).select(make_scores([3.0, 1.0, None, 2.0])).keep.sum() == 2


@pytest.mark.parametrize("rows", [0, 2, 4])
def test_every_row_needs_features(rows):
    with pytest.raises(InputError, match=f"3 rows and features of {rows}"):
        DiverseSelector(features_of(rows)).select(make_scores([1.0, 2.0, 3.0]))


# ---- at random


@given(
    st.lists(st.integers(-1000, 1000).map(float), min_size=1, max_size=30),
    st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0]),
    st.sampled_from(["largest", "smallest"]),
    st.integers(0, 1000),
)
def test_kept_rows_beyond_the_mean_count_for_the_dropped_ones(values, keep, drop, seed):
    selection = SoftPruning(keep, drop, by="score", seed=seed).select(make_scores(values))
    mean = np.mean(values)
    beyond = np.array(values) > mean if drop == "largest" else np.array(values) < mean
    kept = beyond & selection.keep

    assert selection.keep[~beyond].all()
    assert (selection.weight[~beyond] == 1).all()
    assert (selection.weight[~selection.keep] == 0).all()
    if beyond.any():
        assert beyond.sum() * keep <= kept.sum() + 1e-9 < beyond.sum() * keep + 1 + 2e-9
        assert (selection.weight[kept] == beyond.sum() / kept.sum()).all()
    assert selection.weight.sum() == pytest.approx(len(values))


@pytest.mark.parametrize("keep", [0.07, 0.14, 0.28, 0.55, 0.56, 0.9])
def test_a_share_of_a_hundred_rows_beyond_the_mean_is_exact(keep):
    """0.55 times 100 is a little more than 55 in floating point; the count must not be."""
    selection = SoftPruning(keep, "smallest", by="score").select(make_scores([1.0] * 100 + [3.0] * 100))
    assert selection.keep.sum() == 100 + round(100 * keep)


def test_weights_sum_to_the_number_of_scored_rows():
    selection = SoftPruning(keep=0.3).select(make_scores(SCORES))
    assert selection.weight.sum() == pytest.approx(21)
    assert selection.weight[[3, 10, 17]].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("drop", "side"), [("smallest", "below"), ("largest", "above")])
def test_the_reason_says_at_random_and_from_which_side(drop, side):
    selection = SoftPruning(keep=0.1, drop=drop, by="loss").select(make_scores(floats(range(10))))
    assert set(selection.reason) == {"kept", f"at random, loss {side} the mean"}


def test_every_row_is_expected_to_count_once():
    scores = make_scores(DIFFERENT)
    weights = np.mean([SoftPruning(keep=0.3, seed=seed).select(scores).weight for seed in range(400)], axis=0)
    assert weights[scores.scored] == pytest.approx(1, abs=0.35)  # more than four standard errors
    assert not weights[~scores.scored].any()


def test_another_seed_draws_other_rows():
    lots = {tuple(SoftPruning(seed=seed).select(make_scores(DIFFERENT)).keep.tolist()) for seed in range(5)}
    assert len(lots) > 1


def test_another_table_of_values_draws_other_rows():
    """Of the same rows: twice the values have the same rows below the mean."""
    lots = [
        tuple(
            SoftPruning().select(make_scores([None if value is None else factor * value for value in DIFFERENT])).keep
        )
        for factor in (1, 2, 4, 8)
    ]
    assert len(set(lots)) > 1


@pytest.mark.parametrize("drop", ["largest", "smallest"])
@given(value=st.floats(-1e3, 1e3), count=st.integers(1, 30))
def test_equal_values_are_not_beyond_their_mean(drop, value, count):
    """Also where the mean is rounded: that of three times 0.1 is a little more than 0.1."""
    selection = SoftPruning(drop=drop, by="score").select(make_scores([value] * count))
    assert selection.keep.all()
    assert selection.weight.tolist() == [1] * count


def test_keeping_all_beyond_the_mean_keeps_all():
    selection = SoftPruning(keep=1).select(make_scores(floats(range(9))))
    assert selection.keep.all()
    assert selection.weight.tolist() == [1] * 9


def test_a_criterions_own_end_holds_for_every_way_to_name_its_score():
    provenance = make_provenance(rows=4, config={"criterion": "ifd", "drop": "smallest"})
    scores = make_scores(floats(range(4)), provenance=provenance)
    for policy in (DataSelector(), DataSelector(by=["score"]), DiverseSelector(np.eye(4))):
        assert policy.select(scores).keep.tolist() == [False, False, True, True]


def test_a_random_share_is_exact_and_another_seeds_is_another():
    scores = make_scores(floats(range(40)))
    one, other = (RandomSelector(0.3, seed=seed).select(scores) for seed in (0, 1))
    assert one.keep.sum() == other.keep.sum() == 12
    assert one.keep.tolist() != other.keep.tolist()
    mean = np.mean([RandomSelector(0.3, seed=seed).select(scores).keep for seed in range(400)], axis=0)
    assert np.abs(mean - 0.3).max() < 0.12
