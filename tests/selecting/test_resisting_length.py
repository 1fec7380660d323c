"""Selections that resist length, against slow rules: length taken out, one row of each prompt, a band, votes."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pyarrow as pa
import pytest
from helpers.tables import make_provenance, make_scores
from hypothesis import given
from hypothesis import strategies as st

from resofilter_trainer import DataSelector, OnePerPrompt, Selection, votes_of
from resofilter_trainer.config import InputError
from resofilter_trainer.report.what_if import selector_of, what_if
from resofilter_trainer.scores.score_table import ScoreTable, count_reasons
from resofilter_trainer.scores.statistics import rank_correlation, ranks
from resofilter_trainer.selecting.selection import settings_of
from resofilter_trainer.training.filtering import FilterConfig


def with_columns(scores: ScoreTable, directions: dict[str, str] | None = None, **columns) -> ScoreTable:
    """The scores with columns added or replaced; with a direction in their metadata where one is given."""
    table = scores.table
    for name, values in columns.items():
        direction = (directions or {}).get(name)
        array = pa.array(values)
        field = pa.field(name, array.type, metadata={"direction": direction} if direction else None)
        place = table.schema.get_field_index(name)
        table = table.append_column(field, array) if place < 0 else table.set_column(place, field, array)
    return ScoreTable(table, scores.provenance)


def dropped(selection: Selection) -> list[int]:
    return np.flatnonzero(~selection.keep).tolist()


# ---- length taken out


@pytest.fixture(scope="module")
def long_ones() -> ScoreTable:
    rng = np.random.default_rng(0)
    length = rng.integers(5, 500, 200)
    loss = length / 100 + rng.normal(size=200)
    return with_columns(make_scores([1.0] * 200), loss=loss, num_tokens=length)


def test_length_out_is_the_residual_of_the_ranks(long_ones):
    loss, length = ranks(long_ones.column("loss")), ranks(long_ones.column("num_tokens"))
    slope, start = np.polyfit(length, loss, 1)
    values = DataSelector(by="loss", length_out=True).values(long_ones)
    np.testing.assert_allclose(values, loss - slope * length - start, atol=1e-7)
    assert rank_correlation(long_ones.column("loss"), length) > 0.7
    assert abs(rank_correlation(values, length)) < 0.1


@pytest.mark.parametrize("settings", [{}, {"drop": "both", "keep": 0.3}, {"threshold": "iqr"}, {"drop": "smallest"}])
def test_length_out_is_a_short_way_for_the_residual(long_ones, settings):
    short = DataSelector(by="loss", length_out=True, **settings).select(long_ones)
    whole = DataSelector(by=("loss", "num_tokens"), combine="residual", **settings).select(long_ones)
    assert short.keep.tolist() == whole.keep.tolist()


def test_the_reason_says_that_length_is_taken_out(long_ones):
    selection = DataSelector(by="loss", length_out=True).select(long_ones)
    assert set(selection.reason) == {"kept", "largest 50 % by loss with length taken out"}


def test_length_out_keeps_the_ends_of_a_signal_and_of_a_minus(long_ones):
    scores = with_columns(long_ones, {"el2n": "smallest"}, el2n=long_ones.column("loss"))
    values = DataSelector(by="el2n", length_out=True).values(scores)
    own = DataSelector(by="el2n", length_out=True, keep=0.9).select(scores)
    turned = DataSelector(by="-el2n", length_out=True, keep=0.9).select(scores)
    assert dropped(own) == sorted(np.argsort(values)[:20])
    assert dropped(turned) == sorted(np.argsort(values)[-20:])


def test_length_out_applies_within_groups(long_ones):
    groups = ["ab"[row % 2] for row in range(200)]
    values = DataSelector(by="loss", length_out=True).values(long_ones)
    selection = DataSelector(by="loss", length_out=True, keep=0.9).select(long_ones, groups=groups)
    expected = [row for start in (0, 1) for row in (np.argsort(values[start::2])[-10:] * 2 + start).tolist()]
    assert dropped(selection) == sorted(expected)


def test_rows_without_a_number_are_told_apart_with_length_out():
    selection = DataSelector(by="loss", length_out=True).select(make_scores([1.0, math.nan, 2.0, 3.0]))
    assert selection.reason[1] == "loss with length taken out is nan"


def test_the_report_ranks_as_the_selection_did(long_ones, tmp_path):
    for policy in (DataSelector(by="loss", length_out=True), DataSelector(by={"loss": 2, "-num_tokens": 1})):
        loaded = Selection.load(policy.select(long_ones).save(tmp_path))
        assert selector_of(loaded).values(long_ones).tolist() == policy.values(long_ones).tolist()
        assert what_if(selector_of(loaded), long_ones, None).by == policy.what


# ---- a band of ranks


@given(
    st.lists(st.integers(0, 6).map(float), min_size=1, max_size=25),
    st.tuples(st.integers(0, 9), st.integers(1, 10)).filter(lambda bounds: bounds[0] < bounds[1]),
)
def test_a_band_drops_so_many_from_either_end(values, tenths):
    low, high = tenths[0] / 10, tenths[1] / 10
    selection = DataSelector(by="loss", band=(low, high)).select(make_scores([2 * value for value in values]))
    below, above = len(values) * tenths[0] // 10, len(values) * (10 - tenths[1]) // 10
    ordered = sorted(values)
    assert sorted(np.array(values)[selection.keep]) == ordered[below : len(values) - above]
    reasons = list(selection.reason)
    assert reasons.count(f"smallest {10 * tenths[0]} % by loss") == below
    assert reasons.count(f"largest {100 - 10 * tenths[1]} % by loss") == above


def test_a_band_that_ends_at_an_end_is_a_share():
    scores = make_scores([3.0, 1.0, 2.0, 2.0, None, 2.0, 5.0])
    for band, share in (((0, 0.5), {"keep": 0.5}), ((0.3, 1), {"keep": 0.7, "drop": "smallest"})):
        assert DataSelector(band=band).select(scores).reason == DataSelector(**share).select(scores).reason


def test_a_band_is_that_of_each_group_and_stratum():
    scores = make_scores([float(i) for i in range(20)])
    of_groups = DataSelector(band=(0.1, 0.7)).select(scores, groups=[row // 10 for row in range(20)])
    of_strata = DataSelector(band=(0.1, 0.7), stratify_by="num_tokens", strata=2).select(scores)
    assert dropped(of_groups) == dropped(of_strata) == [0, 7, 8, 9, 10, 17, 18, 19]
    assert of_groups.reason[0] == "smallest 10 % of group 0"
    assert of_groups.reason[19] == "largest 30 % of group 1"


@pytest.mark.parametrize("band", [(0.7, 0.1), (0.5, 0.5), (0.1, 1.2), (-0.1, 0.5), (0.1,), 0.5, "ab", (math.nan, 1)])
def test_a_band_that_is_none_is_refused(band):
    with pytest.raises(InputError, match="band"):
        DataSelector(band=band)


# ---- votes


def test_votes_are_the_weighted_mean_of_ranks_each_against_its_own_end():
    el2n, rank = [0.1, 0.4, 0.3, 0.2], [4.0, 3.0, 1.0, 2.0]
    scores = with_columns(make_scores([1.0, 2.0, 3.0, 4.0]), {"el2n": "smallest"}, el2n=el2n, rank=rank)
    values = DataSelector(by={"loss": 0.5, "el2n": 0.25, "-rank": 0.25}).values(scores)
    expected = [(2 * a + b + c) / 4 for a, b, c in zip([1, 2, 3, 4], [4, 1, 2, 3], [1, 2, 4, 3], strict=True)]
    assert values.tolist() == pytest.approx(expected, abs=1e-9)
    turned = DataSelector(by={"loss": 0.5, "+el2n": 0.25, "+rank": 0.25}).values(scores)
    assert turned.tolist() == pytest.approx(
        [(2 * a + b + c) / 4 for a, b, c in zip([1, 2, 3, 4], [1, 4, 3, 2], [4, 3, 1, 2], strict=True)], abs=1e-9
    )


def test_a_criterions_own_end_counts_in_a_vote():
    provenance = make_provenance(rows=3, config={"criterion": "length", "drop": "smallest"})
    scores = make_scores([1.0, 2.0, 3.0], provenance=provenance)
    assert DataSelector(by={"score": 1}).values(scores).tolist() == [3, 2, 1]


def test_a_weight_of_zero_is_no_vote_and_equal_votes_are_ranks():
    scores = make_scores([3.0, 1.0, 2.0])
    same = DataSelector(by={"score": 2, "num_tokens": 2, "nothing": 0})
    assert same.values(scores).tolist() == DataSelector(by=("score", "num_tokens")).values(scores).tolist()
    assert same.select(scores).reason[2] == "largest 50 % by weighted ranks of score and num_tokens"


def test_many_votes_have_a_short_name():
    policy = DataSelector(by={"+a": 1, "-b": 2, "c": 3, "d": 4})
    assert policy.what == "weighted ranks of +a and -b and 2 others"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"by": {}}, "no column with a weight above 0"),
        ({"by": {"loss": 0}}, "no column with a weight above 0"),
        ({"by": {"loss": -1}}, "The weight of loss must be a finite number of at least 0, got -1"),
        ({"by": {"loss": math.nan}}, "The weight of loss"),
        ({"by": {"loss": True}}, "The weight of loss"),
        ({"by": {"-": 1}}, "got the name '-'"),
        ({"by": {3: 1}}, "got the name 3"),
        ({"by": {"+loss": 1, "-loss": 1}}, "a column twice"),
        ({"by": {"loss": 1}, "combine": "topsis"}, "Weights are for combine='ranks'"),
        ({"by": ("loss", "score"), "combine": "residual", "length_out": True}, "both take something out"),
        ({"by": "num_tokens", "length_out": True}, "rank by another column"),
        ({"by": {"-num_tokens": 1, "loss": 1}, "length_out": True}, "rank by another column"),
        ({"length_out": "yes"}, "length_out must be True or False"),
        ({"band": (0.1, 0.7), "keep": 0.5}, "got keep= and band="),
        ({"band": (0.1, 0.7), "threshold": 1.0}, "got threshold= and band="),
        ({"band": (0.1, 0.7), "drop": "largest"}, "leave drop= out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, named):
    with pytest.raises(InputError, match=named.replace("+", r"\+")):
        DataSelector(**settings)


def probe(folder, *signals, **more):
    entries = [{"signal": name, "kind": kind, "auroc": auroc, "low": 0.0} for name, kind, auroc in signals]
    (folder / "probe.json").write_text(json.dumps({"signals": entries, **more}))
    return folder


def test_a_probe_gives_the_weights(tmp_path):
    found = [("loss", "all", 0.9), ("rsr", "all", 0.35), ("resonance", "all", 0.6), ("entropy", "all", 0.5)]
    votes = votes_of(probe(tmp_path, *found, ("loss", "number", 0.2), ("el2n", "all", None)))
    assert votes == {"+loss": 0.8, "-rsr": 0.3, "+score": 0.2}
    assert list(votes) == ["+loss", "-rsr", "+score"]
    assert votes_of(tmp_path / "probe.json", kind="number") == {"-loss": 0.6}
    assert DataSelector(by=votes)._weights.tolist() == [0.8, 0.3, 0.2]


def test_an_auroc_is_that_of_the_signals_direction(tmp_path):
    signals = [
        {"signal": "el2n", "kind": "all", "auroc": 0.75, "direction": "smallest"},
        {"signal": "rsr", "kind": "all", "auroc": 0.25, "direction": "largest"},
        {"signal": "verdict", "kind": "all", "auroc": 0.375, "direction": "smallest"},
        {"signal": "ifd", "kind": "all", "auroc": None, "direction": "smallest"},
    ]
    (tmp_path / "probe.json").write_text(json.dumps({"signals": signals}))
    assert votes_of(tmp_path) == {"-el2n": 0.5, "-rsr": 0.5, "+verdict": 0.25}


def test_the_kind_closest_to_real_errors_counts(tmp_path):
    found = [("loss", "all", 0.9), ("loss", "self_made", 0.8)]
    assert votes_of(probe(tmp_path, *found)) == {"+loss": 0.6}
    assert votes_of(probe(tmp_path, *found, ("loss", "contradicted", 0.75))) == {"+loss": 0.5}
    assert votes_of(probe(tmp_path, *found, ("loss", "labelled", 0.7))) == {"+loss": 0.4}


def test_a_writers_style_and_the_length_have_no_vote(tmp_path):
    found = [("loss", "all", 0.9), ("num_tokens", "all", 0.8)]
    assert votes_of(probe(tmp_path, *found)) == {"+loss": 0.8}
    style = {"signal": "loss", "kind": "self_made", "auroc": 0.2, "against": "rows"}
    entries = json.loads((tmp_path / "probe.json").read_text())["signals"]
    (tmp_path / "probe.json").write_text(json.dumps({"signals": [*entries, style]}))
    assert votes_of(tmp_path) == {"+loss": 0.8}


@pytest.mark.parametrize(("warmup", "expected"), [(None, 0.2), (640, 0.6), (0, 0.6)])
def test_votes_are_of_the_model_that_the_probe_recommends(warmup, expected, tmp_path):
    found = [("loss", "all", 0.6), ("loss (warmed up)", "all", 0.8)]
    probe(tmp_path, *found, recommendation={"signal": "loss", "warmup": warmup})
    assert votes_of(tmp_path) == {"+loss": expected}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "is damaged"),
        ("[]", "holds no AUROC"),
        ('{"signals": []}', "holds no AUROC"),
        ('{"signals": [{"signal": "loss"}]}', "holds no AUROC"),
        ('{"signals": [{"signal": "loss", "kind": "all", "auroc": 3}]}', "holds no AUROC"),
        ('{"signals": [{"signal": "loss", "kind": "all", "auroc": "x"}]}', "holds no AUROC"),
        ('{"signals": [{"signal": "loss", "kind": "all", "auroc": 0.5}]}', "none can vote"),
        ('{"signals": [{"signal": "loss", "kind": "cut", "auroc": 0.9}]}', "no AUROC of kind None. It has: cut"),
    ],
)
def test_a_file_that_gives_no_votes_is_refused(text, named, tmp_path):
    (tmp_path / "probe.json").write_text(text)
    with pytest.raises(InputError, match=named):
        votes_of(tmp_path)


def test_a_probe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no '.*probe\.json'"):
        votes_of(tmp_path)


# ---- one of each prompt


def one_by_one(values, prompts, keep):
    """Rows that a slow rule drops: each prompt's rows sorted by value, then by position."""
    found = set()
    for prompt in {each for each in prompts if each is not None}:
        rows = sorted(
            (row for row in range(len(prompts)) if prompts[row] == prompt), key=lambda row: (values[row], row)
        )
        found |= set(rows[keep:])
    return sorted(found)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([None, 1, 2, 2**62, 2**62 + 1])), min_size=1, max_size=25),
    st.integers(1, 3),
    st.sampled_from(["largest", "smallest"]),
)
def test_each_prompt_keeps_its_best_rows(rows, keep, drop):
    values, prompts = [float(value) for value, _ in rows], [prompt for _, prompt in rows]
    scores = with_columns(make_scores(values), prompt=pa.array(prompts, pa.int64()))
    if not any(prompts):
        return  # refused
    selection = OnePerPrompt(by="score", keep=keep, drop=drop).select(scores)
    assert dropped(selection) == one_by_one([v if drop == "largest" else -v for v in values], prompts, keep)
    by_groups = OnePerPrompt(by="score", keep=keep, drop=drop).select(make_scores(values), groups=prompts)
    assert by_groups.reason == selection.reason


def test_the_reason_names_the_row_that_stays():
    scores = make_scores([3.0, 1.0, 2.0, 4.0, 4.0, math.nan])
    lowest, highest = OnePerPrompt().select(scores), OnePerPrompt(by="score", drop="smallest").select(scores)
    assert lowest.reason[0] == "row 1 has the same prompt and a lower loss"
    assert lowest.reason[3:] == ["kept", "row 3 has the same prompt and the same loss", "loss is nan"]
    assert highest.reason[:3] == ["kept", *["row 0 has the same prompt and a higher score"] * 2]
    assert ("another row has the same prompt and a lower loss", 2) in count_reasons(lowest.reason, 3)


def test_prompts_may_be_messages():
    question = [{"role": "user", "content": "1 + 1 ?"}]
    selection = OnePerPrompt().select(make_scores([2.0, 1.0, 3.0]), groups=[question, [*question], [*question] * 2])
    assert dropped(selection) == [0]


def test_scores_that_know_no_prompts_are_refused():
    scores = make_scores([1.0, 2.0])
    old = ScoreTable(scores.table.drop_columns("prompt"), scores.provenance)
    with pytest.raises(InputError, match=r"version 0\.1\.0\. Score the rows again, or pass groups="):
        OnePerPrompt().select(old)
    assert dropped(OnePerPrompt().select(old, groups=["a", "a"])) == [1]
    with pytest.raises(InputError, match="2 rows and 1 groups"):
        OnePerPrompt().select(old, groups=["a"])
    half = [ScoreTable(each.table.slice(row, 1), scores.provenance) for row, each in enumerate((scores, old))]
    with pytest.raises(InputError, match="not all have the columns prompt"):
        ScoreTable.join(half)


def test_rows_whose_prompts_are_learnt_are_refused():
    scores = make_scores([1.0, 2.0])
    none = scores.table.set_column(scores.table.column_names.index("prompt"), "prompt", pa.nulls(2, pa.int64()))
    with pytest.raises(InputError, match="No row has a prompt apart from what is learnt"):
        OnePerPrompt().select(ScoreTable(none, scores.provenance))


def test_the_hash_of_a_prompt_is_no_number_to_rank_by():
    with pytest.raises(InputError, match="no column 'prompt' of numbers"):
        DataSelector(by="prompt").select(make_scores([1.0]))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"keep": 0}, "keep"), ({"keep": 0.5}, "keep"), ({"drop": "both"}, "drop"), ({"by": ()}, "by")],
)
def test_what_one_per_prompt_cannot_do_is_refused(settings, named):
    with pytest.raises(InputError, match=named):
        OnePerPrompt(**settings)


# ---- in a training run, and what is written


def test_a_run_does_not_know_prompts_and_a_band_is_no_share():
    with pytest.raises(InputError, match="OnePerPrompt needs to know which rows have the same prompt"):
        FilterConfig(selector=OnePerPrompt())
    with pytest.raises(InputError, match="A band of ranks is not a share of the whole dataset"):
        FilterConfig(keep=DataSelector(band=(0.1, 0.7)))
    assert FilterConfig(selector=DataSelector(band=(0.1, 0.7)), readmit=True).to_json()["selector"]["band"] == [
        0.1,
        0.7,
    ]


def test_settings_of_a_later_version_are_written_only_where_they_say_something():
    first = {"keep": None, "drop": None, "threshold": None, "by": "score", "combine": "ranks"}
    first |= {"stratify_by": None, "strata": 10}
    assert settings_of(DataSelector()) == first
    assert settings_of(DataSelector(length_out=True, by="loss")) == {**first, "by": "loss", "length_out": True}
    assert FilterConfig(keep=DataSelector(keep=0.5)).to_json()["keep"] == {**first, "keep": 0.5}
    assert FilterConfig(selector=DataSelector()).to_json()["selector"] == {"policy": "DataSelector", **first}


def test_a_change_of_the_mapping_afterwards_changes_no_policy():
    votes = {"loss": 1.0}
    policy = DataSelector(by=votes)
    votes["loss"] = 0.0
    assert policy.by == {"loss": 1.0}
    assert dataclasses.replace(policy, keep=0.9).by == {"loss": 1.0}
