"""Settings that cannot work are refused, every dropped row has a reason, and shares are of the whole dataset."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers.tables import make_provenance
from hypothesis import given
from hypothesis import strategies as st

from resofilter_trainer.config import InputError
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.selecting.data_selector import DataSelector
from resofilter_trainer.selecting.policies import SoftPruning
from resofilter_trainer.selecting.selection import Selection
from resofilter_trainer.training.filtering import FilterConfig, decide
from resofilter_trainer.training.measurements import Measured, Measurements

NAN = math.nan
EMPTY = "empty completion"
shares_of = st.floats(0.01, 1)


def measured(
    scores: Sequence[float | None], loss: Sequence[float] | None = None, sample_ids: Sequence[int] | None = None
) -> ScoreTable:
    """Row i has `scores[i]`, or was not measured; its row in the user's dataset is `sample_ids[i]`."""
    ids = np.arange(len(scores)) if sample_ids is None else np.array(sample_ids)
    rows = np.array([row for row, score in enumerate(scores) if score is not None], dtype=int)
    values = np.array([scores[row] for row in rows], dtype=float)
    losses = np.zeros(len(rows)) if loss is None else np.array(loss, dtype=float)[rows]
    tokens = np.full(len(rows), 5)
    found = Measurements(len(ids), [3])
    found.add(Measured(0, 1, rows, losses, tokens, tokens + 2, values[:, None]))
    found.end_epoch(0, correct_drift=False)
    reasons: list[str | None] = [EMPTY] * (ids.max() + 1)
    for row in ids:
        reasons[row] = None
    return found.to_scores(ids, reasons, make_provenance(rows=len(reasons)))


def start(count: int, sample_ids: Sequence[int] | None = None) -> Selection:
    """The selection before the first decision: all rows that can be trained on."""
    keep = np.zeros(count, dtype=bool)
    keep[np.arange(count) if sample_ids is None else sample_ids] = True
    return Selection(keep, ["kept" if stays else EMPTY for stays in keep], {}, "")


def decided(config: FilterConfig, scores: ScoreTable, last: Selection | None = None, epoch: int = 1) -> Selection:
    """The decision on an epoch of a run of four epochs."""
    rows = np.flatnonzero(scores.scored)
    last = start(len(scores), rows) if last is None else last
    return decide(config, epoch, config.shares(4)[epoch], scores, rows, last)


# ---- settings that cannot work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"when": "after"}, "when must be one of 'training', 'before', got 'after'"),
        ({"keep": 0.5, "threshold": 1.0}, "one of keep=, threshold= and selector=, got keep= and threshold="),
        ({"threshold": 1.0, "selector": DataSelector()}, "got threshold= and selector="),
        ({"keep": DataSelector(), "selector": DataSelector()}, "got keep= and selector="),
        ({"keep": [1.0, 0.5], "start_epoch": 1}, "leave start_epoch out"),
        ({"start_epoch": 0}, "start_epoch=0: the first epoch has no scores"),
        ({"end_epoch": 3}, "end_epoch takes dropped rows back: pass readmit=True"),
        ({"keep": [1.0, 0.5], "end_epoch": 3, "readmit": True}, "end with 1.0 instead"),
        ({"end_epoch": 1, "readmit": True}, "end_epoch=1: filtering begins with epoch 1, so no row would be dropped"),
        ({"end_epoch": 1.5, "readmit": True}, "end_epoch must be a whole number"),
        ({"start_epoch": -1, "when": "before"}, "start_epoch=-1"),
        ({"keep": []}, "empty list"),
        ({"keep": 0}, "above 0 and at most 1, got 0"),
        ({"keep": -0.5}, "above 0 and at most 1"),
        ({"keep": 1.1}, "above 0 and at most 1"),
        ({"keep": NAN}, "above 0 and at most 1"),
        ({"keep": True}, "above 0 and at most 1, got True"),
        ({"keep": "half"}, "above 0 and at most 1, got 'half'"),
        ({"keep": [1.0, 0]}, "above 0 and at most 1, got 0"),
        ({"keep": [1.0, "half"]}, "above 0 and at most 1, got 'half'"),
        ({"keep": {"easy": 0.5}}, "share for each group"),
        ({"keep": DataSelector(keep={"easy": 0.5})}, "share for each group"),
        ({"keep": [0.5, 0.25]}, r"keep begins with 0\.5: the first epoch has no scores"),
        ({"keep": [1.0, 0.5, 0.6]}, "keep rises"),
        ({"keep": [0.5, 0.6], "when": "before"}, "keep rises"),
        ({"threshold": NAN}, "threshold must be a finite number"),
        ({"threshold": math.inf}, "threshold must be a finite number"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        FilterConfig(**settings)


# ---- how much is kept, and when


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, [1, 0.5, 0.5, 0.5]),
        ({"keep": 0.25}, [1, 0.25, 0.25, 0.25]),
        ({"keep": 1}, [1, 1, 1, 1]),
        ({"keep": 0.25, "start_epoch": 3}, [1, 1, 1, 0.25]),
        ({"keep": 0.25, "start_epoch": 9}, [1, 1, 1, 1]),
        ({"keep": 0.25, "end_epoch": 3, "readmit": True}, [1, 0.25, 0.25, 1]),
        ({"keep": 0.25, "when": "before", "end_epoch": 2, "readmit": True}, [0.25, 0.25, 1, 1]),
        ({"keep": 0.25, "when": "before"}, [0.25, 0.25, 0.25, 0.25]),
        ({"keep": 0.25, "when": "before", "start_epoch": 2}, [1, 1, 0.25, 0.25]),
        ({"keep": [1.0, 0.5]}, [1, 0.5, 0.5, 0.5]),
        ({"keep": (1.0, 0.75, 0.5, 0.25)}, [1, 0.75, 0.5, 0.25]),
        ({"keep": [0.5, 0.25], "when": "before"}, [0.5, 0.25, 0.25, 0.25]),
        ({"keep": [1, 0.25, 0.75], "readmit": True}, [1, 0.25, 0.75, 0.75]),
        ({"keep": DataSelector(keep=0.25)}, [1, 0.25, 0.25, 0.25]),
        ({"keep": DataSelector(drop="both"), "when": "before"}, [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_share_and_rows_of_each_epoch(settings, shares):
    config = FilterConfig(**settings)
    assert config.has_shares
    assert config.shares(4) == shares
    assert config.sizes(4, 1000) == [1000 * share for share in shares]


def test_the_number_of_rows_is_that_of_the_papers_rule():
    """floor(N * (1 - keep)) rows are dropped, with keep as it was written."""
    assert FilterConfig(keep=[1.0, 0.9, 0.5, 0.35]).sizes(4, 10) == [10, 9, 5, 4]
    assert FilterConfig(keep=0.5).sizes(2, 7) == [7, 4]


@pytest.mark.parametrize("length", [1, 2])
def test_a_list_longer_than_the_run_is_refused(length):
    with pytest.raises(InputError, match=f"3 shares and the run {length} epochs"):
        FilterConfig(keep=[1.0, 0.5, 0.25]).shares(length)


@pytest.mark.parametrize(
    "settings", [{"threshold": 1.0}, {"selector": DataSelector()}, {"keep": DataSelector(threshold=1.0)}]
)
def test_what_a_policy_will_leave_is_not_known_beforehand(settings):
    config = FilterConfig(**settings)
    assert not config.has_shares
    assert config.sizes(3, 100) == [100] * 3


@pytest.mark.parametrize(
    "settings", [{"keep": DataSelector(keep=0.25, by="loss")}, {"keep": [1.0, 0.5]}, {"selector": DataSelector()}]
)
def test_settings_can_be_written_and_compared(settings):
    config = FilterConfig(**settings)
    assert json.dumps(config.to_json()) == json.dumps(FilterConfig(**settings).to_json())
    assert config.to_json() != FilterConfig(readmit=True, **settings).to_json()
    assert config.to_json() != FilterConfig(keep=0.75).to_json()


# ---- shares


def test_the_larger_half_is_dropped_and_the_reason_says_when():
    selection = decided(FilterConfig(), measured([1.0, 4.0, 2.0, 3.0]))
    assert selection.keep.tolist() == [True, False, True, False]
    assert list(selection.reason) == ["kept", "largest 50 %, after epoch 1"] * 2


@pytest.mark.parametrize("settings", [{}, {"selector": SoftPruning(keep=0.5)}, {"threshold": 2.5}])
def test_from_the_end_epoch_on_all_rows_are_back(settings):
    config = FilterConfig(readmit=True, end_epoch=3, **settings)
    scores = measured([1.0, 4.0, 2.0, 3.0, None], [1.0, 2.0, 3.0, 4.0, 0.0])
    rows, last = np.arange(5), start(5)
    for epoch in (1, 2):
        assert config.decides(epoch)
        last = decide(config, epoch, config.shares(4)[epoch] if config.has_shares else 1.0, scores, rows, last)
        assert not last.keep.all()
    assert config.decides(3)
    found = decide(config, 3, 1.0, scores, rows, last)
    assert found.keep.all()
    assert set(found.reason) == {"kept"}
    assert found.weight is None


@pytest.mark.parametrize("settings", [{}, {"selector": SoftPruning(keep=0.5)}, {"threshold": 2.5}])
def test_rows_without_a_token_to_learn_stay_only_while_no_row_is_to_be_dropped(settings):
    config = FilterConfig(readmit=True, start_epoch=1, end_epoch=2, **settings)
    scores, idle = measured([1.0, 4.0, 2.0, 3.0, None], [1.0, 2.0, 3.0, 4.0, 0.0]), {4: "no token to learn"}
    rows, last, found = np.arange(4), start(5), []
    for epoch in (1, 2):
        share = config.shares(4)[epoch] if config.has_shares else 1.0
        last = decide(config, epoch, share, scores, rows, last, idle)
        found.append((last.keep[4], last.reason[4], last.keep.sum()))
    assert found[0][:2] == (False, "no token to learn")
    assert found[0][2] < 4
    assert found[1] == (True, "kept", 5)


def test_rows_without_a_token_to_learn_stay_where_all_rows_do():
    scores = measured([1.0, 4.0, 2.0], [1.0, 2.0, 3.0])
    found = decide(FilterConfig(keep=1.0), 1, 1.0, scores, np.arange(2), start(3), {2: "no token to learn"})
    assert found.keep.all()
    assert set(found.reason) == {"kept"}


def test_a_policy_that_is_asked_before_training_is_asked_once_and_ended():
    config = FilterConfig(selector=DataSelector(), when="before", readmit=True, end_epoch=3)
    assert [config.decides(epoch) for epoch in range(5)] == [True, False, False, True, False]
    assert [FilterConfig(when="before").decides(epoch) for epoch in range(3)] == [True] * 3


def test_scores_from_before_training_are_of_no_epoch():
    selection = decided(FilterConfig(when="before"), measured([1.0, 2.0]), epoch=0)
    assert list(selection.reason) == ["kept", "largest 50 %"]


@given(st.lists(st.integers(0, 9).map(float), min_size=1, max_size=40), shares_of)
def test_as_many_are_kept_as_the_plan_says_and_they_are_the_smallest(scores, share):
    config = FilterConfig(keep=share)
    keep = decided(config, measured(scores)).keep
    assert keep.sum() == config.sizes(4, len(scores))[1]
    values = np.array(scores)
    assert keep.all() or values[keep].max(initial=0) <= values[~keep].min()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.lists(shares_of, min_size=1, max_size=3), st.booleans())
def test_shares_are_of_the_whole_dataset_in_every_epoch(scores, shares, readmit):
    shares = [1.0, *(shares if readmit else sorted(shares, reverse=True))]
    config = FilterConfig(keep=shares, readmit=readmit)
    selection = start(len(scores))
    for epoch, size in enumerate(config.sizes(4, len(scores))):
        if epoch >= config.first:
            selection = decided(config, measured(scores), selection, epoch)
        assert selection.keep.sum() == size


def test_the_same_share_again_drops_nothing_more():
    config = FilterConfig(keep=0.5)
    first = decided(config, measured([1.0, 4.0, 2.0, 3.0]))
    second = decided(config, measured([9.0, 4.0, 2.0, 3.0]), first, epoch=2)
    assert second.keep.tolist() == first.keep.tolist()
    assert list(second.reason) == list(first.reason)


def test_dropped_rows_stay_dropped_with_the_reason_they_had():
    config = FilterConfig(keep=[1.0, 0.75, 0.5])
    first = decided(config, measured([1.0, 4.0, 2.0, 3.0]))
    second = decided(config, measured([9.0, 0.0, 2.0, 3.0]), first, epoch=2)
    assert list(second.reason) == ["largest 50 %, after epoch 2", "largest 25 %, after epoch 1", "kept", "kept"]
    assert [reason == "kept" for reason in second.reason] == second.keep.tolist()


def test_with_readmit_dropped_rows_are_ranked_again():
    config = FilterConfig(keep=0.5, readmit=True)
    first = decided(config, measured([1.0, 4.0, 2.0, 3.0]))
    second = decided(config, measured([9.0, 0.0, 2.0, 3.0]), first, epoch=2)
    assert list(second.reason) == ["largest 50 %, after epoch 2", "kept", "kept", "largest 50 %, after epoch 2"]


def test_the_selection_before_is_not_changed():
    before = start(4)
    decided(FilterConfig(), measured([1.0, 4.0, 2.0, 3.0]), before)
    assert before.keep.all()
    assert list(before.reason) == ["kept"] * 4


def test_keeping_everything_keeps_everything():
    selection = decided(FilterConfig(keep=1.0), measured([3.0, NAN, None, 1.0]))
    assert list(selection.reason) == ["kept"] * 4
    assert selection.keep.all()


@pytest.mark.parametrize(
    ("selector", "kept", "reason"),
    [
        (DataSelector(), [0, 2], "largest 50 %"),
        (DataSelector(keep=0.75), [0, 2, 3], "largest 25 %"),
        (DataSelector(drop="smallest"), [1, 3], "smallest 50 %"),
        (DataSelector(drop="both"), [2, 3], "largest and smallest 50 %"),
        (DataSelector(by="loss"), [1, 3], "largest 50 % by loss"),
        (DataSelector(by="layer_3", drop="smallest"), [1, 3], "smallest 50 % by layer_3"),
        (DataSelector(threshold=2.0), [0, 2], "score above 2"),
        (DataSelector(threshold=3.0, drop="smallest"), [1, 3], "score below 3"),
        (DataSelector(threshold=7.0, by="loss"), [1, 3], "loss above 7"),
    ],
)
def test_a_data_selector_decides_as_it_would_after_training(selector, kept, reason):
    scores = measured([1.0, 4.0, 2.0, 3.0], loss=[9.0, 6.0, 8.0, 7.0])
    selection = decided(FilterConfig(keep=selector), scores)
    assert selection.sample_ids.tolist() == kept == selector.select(scores).sample_ids.tolist()
    assert set(selection.reason) == {"kept", f"{reason}, after epoch 1"}


# ---- rows that cannot be ranked


def test_a_row_that_was_never_measured_is_kept():
    scores = measured([4.0, None, 1.0, 3.0])
    assert scores.column("epoch").tolist() == [0, -1, 0, 0]
    selection = decided(FilterConfig(), scores)
    assert selection.sample_ids.tolist() == [1, 2]
    assert selection.reason[1] == "kept"


def test_rows_never_measured_are_kept_even_where_too_few_are_left_to_drop():
    assert decided(FilterConfig(keep=0.25), measured([4.0, None, None, None])).sample_ids.tolist() == [1, 2, 3]


@pytest.mark.parametrize("broken", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("drop", ["largest", "smallest", "both"])
def test_a_score_that_is_not_finite_is_dropped_first(broken, drop):
    config = FilterConfig(keep=DataSelector(keep=0.75, drop=drop))
    selection = decided(config, measured([1.0, broken, 9.0, 3.0]))
    assert list(selection.reason) == ["kept", f"score is {broken}, after epoch 1", "kept", "kept"]


def test_a_score_that_is_not_finite_counts_for_the_share():
    selection = decided(FilterConfig(), measured([1.0, NAN, 9.0, 3.0]))
    assert list(selection.reason) == ["kept", "score is nan, after epoch 1", "largest 50 %, after epoch 1", "kept"]


@pytest.mark.parametrize("settings", [{"threshold": 2.0}, {"selector": DataSelector(threshold=2.0)}])
def test_a_threshold_drops_rows_that_are_not_finite_and_keeps_rows_that_were_not_measured(settings):
    selection = decided(FilterConfig(**settings), measured([1.0, NAN, 9.0, None, 2.0]))
    after = ", after epoch 1"
    assert list(selection.reason) == ["kept", f"score is nan{after}", f"score above 2{after}", "kept", "kept"]
    assert selection.keep.tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("settings", [{}, {"threshold": 2.0}, {"selector": DataSelector()}, {"readmit": True}])
def test_rows_that_cannot_be_trained_on_keep_their_reason(settings):
    scores = measured([1.0, 4.0, 2.0, 3.0], sample_ids=[5, 0, 3, 2])  # users' rows 1 and 4 were too short, say
    selection = decided(FilterConfig(**settings), scores)
    assert selection.sample_ids.tolist() == [3, 5]
    assert [row for row, reason in enumerate(selection.reason) if reason == EMPTY] == [1, 4]


# ---- thresholds and policies outside the package


class Even:
    """Keeps even rows; remembers what it saw."""

    def select(self, scores: ScoreTable) -> Selection:
        self.seen = np.flatnonzero(scores.scored).tolist()
        self.reasons = scores.reasons
        self.values = scores.column("score")[self.seen].tolist()
        keep = np.arange(len(scores)) % 2 == 0
        return Selection(keep, ["kept" if stays else "odd" for stays in keep], {}, "")


def test_a_policy_of_ones_own_decides():
    policy = Even()
    selection = decided(FilterConfig(selector=policy), measured([1.0, 4.0, None, NAN, 2.0, 3.0]))
    assert policy.seen == [0, 1, 4, 5]  # what has a score to be judged by
    assert policy.values == [1, 4, 2, 3]
    assert list(selection.reason) == [
        "kept",
        "odd, after epoch 1",
        "kept",
        "score is nan, after epoch 1",
        "kept",
        "odd, after epoch 1",
    ]


@pytest.mark.parametrize(("readmit", "seen"), [(False, [0, 2]), (True, [0, 1, 2, 3])])
def test_a_policy_sees_dropped_rows_only_to_readmit_them(readmit, seen):
    last = Selection(np.array([True, False, True, False]), ["kept", "gone", "kept", "gone"], {}, "")
    policy = Even()
    selection = decided(FilterConfig(selector=policy, readmit=readmit), measured([1.0, 2.0, 3.0, 4.0]), last, epoch=2)
    assert policy.seen == seen
    assert selection.reason[1] == ("odd, after epoch 2" if readmit else "gone")


def test_a_policy_is_told_why_a_row_has_no_score():
    last = start(4, [0, 2, 3])
    policy = Even()
    decided(FilterConfig(selector=policy), measured([1.0, NAN, 3.0], sample_ids=[0, 2, 3]), last)
    assert policy.reasons == [None, EMPTY, "not ranked", None]


def test_a_data_selector_as_policy_compounds():
    """Its share is of the rows it is asked about: a half, and then a half of the half."""
    config = FilterConfig(selector=DataSelector())
    scores = measured([1.0, 2.0, 3.0, 4.0])
    first = decided(config, scores)
    assert first.sample_ids.tolist() == [0, 1]
    assert decided(config, scores, first, epoch=2).sample_ids.tolist() == [0]


def test_a_threshold_readmits_what_falls_below_it():
    config = FilterConfig(threshold=2.0, readmit=True)
    first = decided(config, measured([1.0, 3.0]))
    assert first.sample_ids.tolist() == [0]
    assert decided(config, measured([3.0, 1.0]), first, epoch=2).sample_ids.tolist() == [1]


class Returns:
    """A policy that returns whatever it is given."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def select(self, scores: ScoreTable) -> Any:
        return self.found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, r"Returns\.select returned NoneType, but a policy returns a Selection: build it with Selection\.of"),
        (np.ones(3, dtype=bool), "returned ndarray"),
        (start(2), "returned a selection of 2 rows for scores of 3 rows.*also on those without a score"),
        (start(4), "returned a selection of 4 rows for scores of 3 rows"),
    ],
    ids=["None", "a mask", "too few", "too many"],
)
def test_a_policy_that_returns_no_selection_of_all_rows_is_refused_in_one_line(found, message):
    with pytest.raises(InputError, match=message) as refused:
        decided(FilterConfig(selector=Returns(found)), measured([1.0, 2.0, 3.0]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("weight", [0.0, -1.0, NAN, math.inf])
def test_a_policy_whose_weight_of_a_kept_row_is_no_weight_is_refused_by_name(weight):
    keep = np.array([True, True, False])
    found = Selection(keep, ["kept", "kept", "x"], {}, "", np.array([1.0, weight, NAN]))
    with pytest.raises(InputError, match="Returns gives a kept row a weight that is not finite and above 0"):
        decided(FilterConfig(selector=Returns(found)), measured([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("selector", [DataSelector, "otsu", 3])
def test_a_selector_is_an_object_that_selects(selector):
    with pytest.raises(InputError, match=r"selector must be an object with a method select\(scores\)"):
        FilterConfig(selector=selector)


def test_all_rows_may_be_dropped():
    assert not decided(FilterConfig(threshold=0.0), measured([1.0, 2.0])).keep.any()


def test_a_decision_can_be_saved_and_says_what_it_is_from(tmp_path):
    config, scores = FilterConfig(keep=[1.0, 0.5]), measured([1.0, 2.0])
    selection = decided(config, scores)

    again = Selection.load(selection.save(tmp_path))

    assert again.policy == {**config.to_json(), "epoch": 1}
    assert again.provenance == scores.provenance.to_json()
    assert again.keep.tolist() == selection.keep.tolist()
    assert list(again.reason) == list(selection.reason)
