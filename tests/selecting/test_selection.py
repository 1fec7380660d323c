"""The paper's rule against a slow, obvious one, and the record of a decision."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from helpers.oracles import number_dropped, papers_rule
from helpers.tables import WHY, make_provenance, make_scores
from hypothesis import given
from hypothesis import strategies as st

from resofilter_trainer.config import InputError
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.selecting.data_selector import DataSelector
from resofilter_trainer.selecting.selection import Selection
from resofilter_trainer.selecting.shares import drop_share

tenths = st.integers(1, 10).map(lambda tenth: tenth / 10)
tied = st.lists(st.sampled_from([0.0, 1e-5, 2e-5]), min_size=1, max_size=40)
values_of_all_kinds = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40) | tied
distinct = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40, unique=True)


# ---- the rule


@given(values_of_all_kinds, tenths)
def test_largest_are_dropped_by_the_papers_rule(values, keep):
    assert drop_share(np.array(values), keep, "largest").tolist() == papers_rule(values, keep)


@given(values_of_all_kinds, tenths)
def test_smallest_is_the_mirror(values, keep):
    keeps = drop_share(np.array(values), keep, "smallest")
    assert keeps.tolist() == papers_rule(values, keep, drop_largest=False)
    assert keeps.tolist() == drop_share(-np.array(values), keep, "largest").tolist()


@given(distinct, tenths)
def test_both_ends_are_dropped_in_equal_numbers_and_the_odd_one_from_the_largest(values, keep):
    count = number_dropped(len(values), keep)
    order = sorted(range(len(values)), key=lambda row: values[row])
    stays = order[count // 2 : len(values) - (count + 1) // 2]
    assert np.flatnonzero(drop_share(np.array(values), keep, "both")).tolist() == sorted(stays)


@given(tied, tenths, st.sampled_from(["largest", "smallest", "both"]))
def test_count_is_exact_whatever_the_ties(values, keep, drop):
    keeps = drop_share(np.array(values), keep, drop)
    assert (~keeps).sum() == number_dropped(len(values), keep)


def test_of_equal_values_the_earlier_are_dropped():
    assert drop_share(np.array([1.0, 2, 2, 2, 1]), 0.6, "largest").tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("tenth", range(1, 11))
def test_a_tenth_of_a_thousand_is_a_hundred(tenth):
    """1 - 0.9 is a little less than a tenth in floating point; the count must not be."""
    assert drop_share(np.arange(1000.0), tenth / 10, "largest").sum() == 100 * tenth


@pytest.mark.parametrize("drop", ["largest", "smallest", "both"])
def test_keeping_everything_keeps_everything(drop):
    selection = DataSelector(keep=1, drop=drop).select(make_scores([3.0, 1.0, 1.0]))
    assert selection.keep.all()
    assert list(selection.reason) == ["kept"] * 3


# ---- decisions with reasons


def test_half_is_dropped_by_default_and_the_reason_says_so():
    selection = DataSelector().select(make_scores([1.0, 4.0, 2.0, 3.0]))
    assert selection.keep.tolist() == [True, False, True, False]
    assert list(selection.reason) == ["kept", "largest 50 %", "kept", "largest 50 %"]
    assert selection.sample_ids.tolist() == [0, 2]


def test_rows_without_score_keep_their_reason_and_count_for_no_share():
    selection = DataSelector(keep=0.5).select(make_scores([None, 1.0, 4.0, None, 2.0, 3.0, None]))
    assert selection.keep.tolist() == [False, True, False, False, True, False, False]
    assert list(selection.reason) == [WHY, "kept", "largest 50 %", WHY, "kept", "largest 50 %", WHY]


@pytest.mark.parametrize(
    ("drop", "kept", "reason"),
    [
        ("largest", [True, True, False, False], "score above 2"),
        ("smallest", [False, True, True, False], "score below 2"),
    ],
)
def test_a_score_at_the_threshold_is_kept(drop, kept, reason):
    selection = DataSelector(threshold=2.0, drop=drop).select(make_scores([1.0, 2.0, 3.0, None]))
    assert selection.keep.tolist() == kept
    assert reason in selection.reason


def test_threshold_may_drop_nothing_or_everything():
    scores = make_scores([1.0, 2.0])
    assert DataSelector(threshold=2.0).select(scores).keep.all()
    assert not DataSelector(threshold=0.0).select(scores).keep.any()


def test_another_column_can_be_ranked():
    scores = make_scores([1.0, 4.0, 2.0, 3.0])  # num_tokens: 3, 4, 5, 6
    selection = DataSelector(keep=0.5, by="num_tokens").select(scores)
    assert selection.keep.tolist() == [True, True, False, False]
    assert selection.reason[3] == "largest 50 % by num_tokens"


@pytest.mark.parametrize("by", ["bogus", "reason"])
def test_a_column_that_cannot_be_ranked_is_refused(by):
    with pytest.raises(InputError, match=by):
        DataSelector(by=by).select(make_scores([1.0, 4.0]))


# ---- groups


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), min_size=1, max_size=40), tenths)
def test_share_of_each_group_is_that_of_the_group_alone(rows, keep):
    groups, values = zip(*rows, strict=True)
    selection = DataSelector(keep=keep).select(make_scores(values), groups=groups)
    for group in set(groups):
        members = [row for row in range(len(rows)) if groups[row] == group]
        assert selection.keep[members].tolist() == papers_rule([values[row] for row in members], keep)


def test_each_group_may_have_its_own_share():
    scores = make_scores([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    groups = ["easy", "hard"] * 4
    selection = DataSelector(keep={"easy": 0.25, "hard": 1.0}).select(scores, groups=groups)
    assert selection.sample_ids.tolist() == [0, 1, 3, 5, 7]
    assert selection.reason[2] == "largest 75 % of group easy"


def test_unscored_rows_count_for_no_share_of_their_group():
    selection = DataSelector(keep=0.5).select(make_scores([None, None, 1.0, 2.0]), groups=["a", "a", "a", "a"])
    assert selection.sample_ids.tolist() == [2]


def test_groups_may_be_a_column_of_a_dataset():
    column = Dataset.from_dict({"level": [1, 2, 1, 2]})["level"]
    selection = DataSelector(keep={1: 0.5, 2: 1}).select(make_scores([4.0, 3.0, 2.0, 1.0]), groups=column)
    assert selection.sample_ids.tolist() == [1, 2, 3]


@pytest.mark.parametrize("groups", [["a"], ["a"] * 4, []])
def test_every_row_needs_a_group(groups):
    with pytest.raises(InputError, match=f"3 rows and {len(groups)} groups"):
        DataSelector().select(make_scores([1.0, 2.0, 3.0]), groups=groups)


def test_a_group_without_share_is_refused_and_the_others_listed():
    with pytest.raises(InputError, match=r"no share for group 'c'\. It has: a, b"):
        DataSelector(keep={"a": 0.5, "b": 0.5}).select(make_scores([1.0, 2.0]), groups=["a", "c"])


def test_shares_of_groups_need_groups():
    with pytest.raises(InputError, match="groups="):
        DataSelector(keep={"a": 0.5}).select(make_scores([1.0]))


# ---- settings and tables that cannot work


@pytest.mark.parametrize("keep", [0, -1, 1.1, math.nan, math.inf, True, {"a": 0.5, "b": 0}])
def test_keep_outside_0_to_1_is_refused(keep):
    with pytest.raises(InputError, match="above 0 and at most 1"):
        DataSelector(keep=keep)


def test_a_share_and_a_threshold_are_too_much():
    with pytest.raises(InputError, match="one of keep=, threshold= and band=, got keep= and threshold="):
        DataSelector(keep=0.5, threshold=1e-5)


@pytest.mark.parametrize("threshold", [math.nan, math.inf])
def test_a_threshold_is_one_finite_number(threshold):
    with pytest.raises(InputError, match="must be a finite number"):
        DataSelector(threshold=threshold)


def test_a_threshold_has_one_side():
    with pytest.raises(InputError, match="one side"):
        DataSelector(threshold=1.0, drop="both")


def test_unknown_end_lists_those_there_are():
    with pytest.raises(InputError, match="'largest', 'smallest', 'both', got 'biggest'"):
        DataSelector(drop="biggest")


def test_tables_of_different_models_are_refused():
    parts = [make_scores([float(row)], [row], make_provenance(rows=2, weights=str(row))) for row in range(2)]
    with pytest.raises(InputError, match="model weights"):
        DataSelector().select(*parts)


def test_an_incomplete_table_is_refused():
    part = make_scores([1.0, 2.0], [0, 3], make_provenance(rows=4))
    with pytest.raises(InputError, match="4 rows and the scores cover 2"):
        DataSelector().select(part)


# ---- made by a policy


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a policy outside the package."""

    share: float = 0.25
    table: Any = dataclasses.field(default=None, compare=False)


def test_what_is_not_dropped_is_kept_and_rows_without_a_score_are_not():
    scores = make_scores([1.0, None, 3.0, None])
    selection = Selection.of(Settings(table={}), scores, [None, None, "too long", "too long"], np.array([2, 3, 4, 5]))
    assert selection.keep.tolist() == [True, False, False, False]
    assert list(selection.reason) == ["kept", WHY, "too long", WHY]
    assert selection.weight.tolist() == [2, 0, 0, 0]
    assert selection.policy == {"share": 0.25}
    assert selection.provenance == scores.provenance.to_json()


def test_a_policy_without_fields_has_no_settings():
    assert Selection.of(object(), make_scores([1.0]), [None]).policy == {}


@pytest.mark.parametrize(
    ("why", "weight", "message"),
    [
        ([None], None, "Settings gives reasons for 1 rows and the scores have 2: a policy decides on every row"),
        ([None] * 3, None, "reasons for 3 rows and the scores have 2"),
        ("no", None, "reasons for 1 rows"),
        ([None] * 2, np.ones(3), "Settings gives weights for 3 rows and the scores have 2"),
        ([None, ""], None, "Settings drops row 1 for the reason ''"),
        ([None, "kept"], None, "Settings drops row 1 for the reason 'kept'"),
        ([False, None], None, "Settings drops row 0 for the reason False"),
        ([None, {"why": 1}], None, "Settings drops row 1 for the reason {'why': 1}"),
        ([None] * 2, np.array([1.0, 0.0]), "Settings gives a kept row a weight that is not finite and above 0"),
        ([None] * 2, np.array([math.nan, 1.0]), "not finite and above 0"),
    ],
)
def test_what_a_policy_says_wrongly_is_refused_in_one_line(why, weight, message):
    with pytest.raises(InputError, match=message) as refused:
        Selection.of(Settings(), make_scores([1.0, 2.0]), why, weight)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("keep", "reason", "weight", "message"),
    [
        (np.ones(2, dtype=bool), ["kept"], None, "2 rows and a reason for 1"),
        (np.ones(2, dtype=bool), ["kept"] * 2, np.ones(3), "2 rows and a weight for 3"),
        (np.ones(2), ["kept"] * 2, None, "must be an array of bool"),
        ([True, True], ["kept"] * 2, None, "must be an array of bool.*got list"),
    ],
)
def test_a_selection_is_of_one_length_and_its_keep_is_a_mask(keep, reason, weight, message):
    with pytest.raises(InputError, match=message):
        Selection(keep, reason, {}, "", weight)


# ---- applied and saved


def test_apply_restores_the_original_order():
    dataset = Dataset.from_dict({"name": list("abcdef")})
    selection = DataSelector(keep=0.5).select(make_scores([1.0, 9.0, 3.0, 8.0, 7.0, 2.0]))
    assert list(selection.apply(dataset)["name"]) == ["a", "c", "f"]


@pytest.mark.parametrize("rows", [1, 3])
def test_apply_refuses_another_length(rows):
    selection = DataSelector().select(make_scores([1.0, 2.0]))
    with pytest.raises(InputError, match=f"made for 2 rows and the dataset has {rows}"):
        selection.apply(Dataset.from_dict({"x": [0] * rows}))


def test_to_pandas_has_a_line_for_every_row():
    frame = DataSelector().select(make_scores([1.0, None, 3.0])).to_pandas()
    assert frame.to_dict("list") == {
        "sample_id": [0, 1, 2],
        "keep": [True, False, False],
        "reason": ["kept", WHY, "largest 50 %"],
    }


def test_scores_are_no_selection(tmp_path):
    with pytest.raises(InputError, match="holds no selection"):
        Selection.load(make_scores([1.0]).save(tmp_path))


def test_missing_selection_is_named(tmp_path):
    with pytest.raises(InputError, match="No selection at"):
        Selection.load(tmp_path)


# ---- the contract: every policy, on the same 24 rows

SCORES = [None if row % 7 == 3 else (row * 5 % 11) / 8 for row in range(24)]  # ties, and rows without a score
GROUPS = ["ab"[row % 2] for row in range(24)]
LEVELS = [row % 3 for row in range(24)]
POLICIES = {
    "the paper's": ({}, None),
    "keep most": ({"keep": 0.9}, None),
    "smallest": ({"keep": 0.3, "drop": "smallest"}, None),
    "both": ({"keep": 0.6, "drop": "both"}, None),
    "all": ({"keep": 1.0}, None),
    "by a layer": ({"keep": 0.5, "by": "layer_3"}, None),
    "groups": ({"keep": 0.5}, GROUPS),
    "shares of groups": ({"keep": {"a": 0.25, "b": 0.75}}, GROUPS),
    "shares of levels": ({"keep": {0: 0.25, 1: 0.75, 2: 1.0}}, LEVELS),
    "both, in groups": ({"keep": 0.4, "drop": "both"}, GROUPS),
    "threshold": ({"threshold": 0.5}, None),
    "threshold from below": ({"threshold": 0.5, "drop": "smallest"}, None),
}


@pytest.fixture(params=POLICIES.values(), ids=list(POLICIES))
def policy(request) -> tuple[dict[str, Any], Sequence[Any] | None]:
    return request.param


def same(one: Selection, other: Selection) -> bool:
    return one.keep.tolist() == other.keep.tolist() and list(one.reason) == list(other.reason)


def test_every_row_is_decided_with_a_reason(policy):
    settings, groups = policy
    selection = DataSelector(**settings).select(make_scores(SCORES), groups=groups)

    assert len(selection) == len(selection.keep) == len(selection.reason) == len(SCORES)
    assert selection.keep.dtype == bool
    assert all(isinstance(reason, str) and reason for reason in selection.reason)
    assert [reason == "kept" for reason in selection.reason] == selection.keep.tolist()
    assert [row for row in range(24) if selection.reason[row] == WHY] == [3, 10, 17]
    assert selection.keep.any()


def test_decision_is_the_same_from_shards_in_any_order(policy):
    settings, groups = policy
    provenance = make_provenance(rows=24)
    parts = [make_scores(SCORES[start::3], range(start, 24, 3), provenance) for start in (2, 0, 1)]
    whole = make_scores(SCORES, provenance=provenance)

    selector = DataSelector(**settings)
    assert ScoreTable.join(parts).column("score").tobytes() == whole.column("score").tobytes()
    assert same(selector.select(*parts, groups=groups), selector.select(whole, groups=groups))


def test_only_the_order_of_scores_matters(policy):
    """4 s + 2 is exact for these scores. A threshold moves with them."""
    settings, groups = policy
    moved = dict(settings, threshold=4 * settings["threshold"] + 2) if "threshold" in settings else settings
    before = DataSelector(**settings).select(make_scores(SCORES), groups=groups)
    after = DataSelector(**moved).select(
        make_scores([None if score is None else 4 * score + 2 for score in SCORES]), groups=groups
    )
    assert before.keep.tolist() == after.keep.tolist()


def test_a_saved_selection_is_the_same_and_can_be_repeated(policy, tmp_path):
    settings, groups = policy
    scores = make_scores(SCORES)
    selection = DataSelector(**settings).select(scores, groups=groups)

    loaded = Selection.load(selection.save(tmp_path))

    assert same(loaded, selection)
    assert loaded.provenance == scores.provenance.to_json()
    assert loaded.policy == selection.policy
    assert same(DataSelector(**loaded.policy).select(scores, groups=groups), selection)


def test_keep_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="keep is the share of the rows to keep"):
        DataSelector(keep="half")
