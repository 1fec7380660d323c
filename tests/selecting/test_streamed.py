"""A selection from a file has the rows and reasons of the one in memory, to the bit; cuts are those of whole arrays."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.tables import make_scores

from resofilter_trainer import DataSelector, InputError, ScoreTable, Selection, SoftPruning, select_file
from resofilter_trainer.io import pieces
from resofilter_trainer.io.files import save_parquet
from resofilter_trainer.scores import order_statistics
from resofilter_trainer.selecting import reasons, selection
from resofilter_trainer.selecting.cuts import Cut, bound_of_rule, cuts_of_band, cuts_of_share
from resofilter_trainer.selecting.reasons import Reasons
from resofilter_trainer.selecting.shares import drop_share, outside
from resofilter_trainer.selecting.thresholds import RULES

AWKWARD = [
    0.0,
    -0.0,
    1.0,
    1.0,
    -1.5,
    5e-324,
    None,
    float("nan"),
    2.0,
    float("inf"),
    1.0,
    float("-inf"),
    None,
    0.0,
    -0.0,
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"keep": 1 / 3, "drop": "smallest"},
    {"keep": 0.6, "drop": "both", "by": "-score"},
    {"band": (0.2, 0.7)},
    {"threshold": 0.5},
    {"threshold": "iqr", "drop": "smallest"},
    {"threshold": "otsu"},
    {"threshold": "knee", "by": ["num_tokens"]},
]


def made(values: list[float | None]) -> ScoreTable:
    """Scores whose column of losses drops its smallest values by default."""
    scores = make_scores(values)
    place = scores.table.schema.get_field_index("loss")
    field = scores.table.schema.field(place).with_metadata({"direction": "smallest"})
    return ScoreTable(scores.table.cast(scores.table.schema.set(place, field)), scores.provenance)


@pytest.fixture
def in_pieces(monkeypatch):
    """A few rows at a time, and a few values in memory."""
    monkeypatch.setattr(pieces, "ROWS", 4)
    monkeypatch.setattr(reasons, "ROWS", 4)
    monkeypatch.setattr(order_statistics, "CACHED", 3)


@pytest.mark.parametrize("values", [AWKWARD, [None, 3.0], [None, float("nan")]], ids=["awkward", "one", "none"])
def test_a_selection_from_a_file_is_that_in_memory(values, tmp_path, in_pieces):
    scores = made(values)
    scores.save(tmp_path)
    for settings in [*SETTINGS, {"by": "loss"}] if values is AWKWARD else SETTINGS[::3]:
        selector = DataSelector(**settings)
        found = Selection.load(select_file(tmp_path, tmp_path / "kept", selector))
        expected = selector.select(scores)
        assert found == expected, settings
        assert (found.policy, found.provenance) == (json.loads(json.dumps(expected.policy)), expected.provenance)


@pytest.mark.parametrize("kind", [pa.uint8(), pa.float32()])
def test_a_column_of_another_type_is_ranked_by_its_numbers(kind, tmp_path, in_pieces):
    whole = made([1.0] * 9)
    numbers = pa.array([3, 0, 200, 7, 7, 90, 1, 255, 0] if kind == pa.uint8() else np.linspace(-0.7, 1.3, 9), kind)
    own, same = (
        ScoreTable(whole.table.append_column("mine", each), whole.provenance)
        for each in (numbers, numbers.cast(pa.float64()))
    )
    own.save(tmp_path)
    for settings in [*SETTINGS, {"threshold": 0.3}]:
        for by in ("mine", "-mine"):
            selector = DataSelector(**{**settings, "by": by})
            expected = selector.select(same)
            assert selector.select(own) == expected, settings
            assert Selection.load(select_file(tmp_path, tmp_path / "kept", selector)) == expected, settings


def test_a_damaged_column_is_refused(tmp_path, in_pieces):
    """Of a joined file, whose columns each have a digest."""
    schema = made(AWKWARD).table.schema
    with pieces.writing_pieces(tmp_path / "scores.parquet", schema) as writer:
        writer.write(made(AWKWARD).table)
        right = writer._digests
        writer._digests = pieces.ColumnDigests(schema.names)  # as of other rows
        writer.end({"resofilter_scores": made(AWKWARD).provenance.to_json()})
        assert right is not writer._digests
    with pytest.raises(InputError, match="not what was written"):
        select_file(tmp_path, tmp_path / "kept")
    assert not (tmp_path / "kept" / "selection.parquet").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"by": ("score", "loss")},
        {"by": {"score": 1}},
        {"length_out": True, "by": "loss"},
        {"stratify_by": "loss"},
        {"keep": {"a": 0.5}},
    ],
)
def test_what_needs_all_rows_in_memory_is_refused(settings, tmp_path):
    with pytest.raises(InputError, match=r"by one column, in one ranking.*ScoreTable.load"):
        select_file(tmp_path, tmp_path, DataSelector(**settings))


def test_scores_are_not_replaced_by_what_is_selected_from_them(tmp_path):
    place = made([0.0, 1.0, 2.0, 3.0, 4.0]).save(tmp_path / "scores.parquet")
    with pytest.raises(InputError, match="is the file of the scores"):
        select_file(place, place)
    assert len(ScoreTable.load(place)) == 5


def test_scores_that_do_not_fit_are_refused(tmp_path):
    made([1.0, 2.0]).save(tmp_path / "whole")
    with pytest.raises(InputError, match=r"no column 'entropy' of numbers\. They have: sample_id, score"):
        select_file(tmp_path / "whole", tmp_path, DataSelector(by="entropy"))
    make_scores([1.0, 2.0], [1, 0]).save(tmp_path / "mixed")
    with pytest.raises(InputError, match="not every row in its order"):
        select_file(tmp_path / "mixed", tmp_path)
    one = made([1.0, 2.0, 3.0])
    ScoreTable(one.table.slice(0, 2), one.provenance).save(tmp_path / "fewer")
    with pytest.raises(InputError, match="has 3 rows and the scores cover 2"):
        select_file(tmp_path / "fewer", tmp_path)
    with pytest.raises(InputError, match="a DataSelector"):
        select_file(tmp_path / "whole", tmp_path, 0.5)


# ---- cuts


def dropped(values: np.ndarray, cuts: list[Cut]) -> list[np.ndarray]:
    """What each cut drops, three values at a time."""
    found = []
    for cut in cuts:
        own, ties = [np.zeros(0, dtype=bool)], 0
        for start in range(0, len(values), 3):
            some = values[start : start + 3]
            own.append(cut.drops(some, ties))
            ties += int((some == cut.bound).sum())
        found.append(np.concatenate(own))
    return found


@pytest.mark.parametrize("gathered", [3, 1 << 24])
def test_cuts_are_those_of_values_in_memory(gathered, monkeypatch):
    monkeypatch.setattr(order_statistics, "GATHERED", gathered)
    random = np.random.default_rng(0)
    for rows in (0, 1, 2, 9):
        for values in (random.normal(size=rows), random.choice([0.0, -0.0, 1.0, 5e-324], rows), np.full(rows, 3.0)):

            def read(values: np.ndarray = values) -> list[np.ndarray]:
                return np.array_split(values, 3)

            for keep, drop in ((0.5, "both"), (0.34, "largest"), (0.8, "smallest"), (0.1, "both"), (1.0, "both")):
                found = dropped(values, cuts_of_share(read, keep, drop))
                assert np.array_equal(~np.any([np.zeros(rows, bool), *found], axis=0), drop_share(values, keep, drop))
            for band in ((0.1, 0.7), (0.45, 0.55)):
                cuts = cuts_of_band(read, band)
                below, above = outside(values, band)
                for cut, own in zip(cuts, dropped(values, cuts), strict=True):
                    assert np.array_equal(own, above if cut.above else below)
                assert {cut.above for cut in cuts} == {end for end, own in ((True, above), (False, below)) if own.any()}
            if rows:
                assert bound_of_rule(read, "iqr") == RULES["iqr"](values)


# ---- many reasons


def test_a_large_selection_is_read_and_written_as_a_small_one(tmp_path, monkeypatch, in_pieces):
    small = DataSelector(keep=0.6).select(made(AWKWARD))
    small.save(tmp_path / "small")
    for module in (reasons, selection):
        monkeypatch.setattr(module, "MANY", 3)
    large = Selection.load(tmp_path / "small")
    assert isinstance(large.reason, Reasons)
    assert large == small == Selection.load(large.save(tmp_path / "large"))
    assert (repr(large), large.summary()) == (repr(small), small.summary())
    assert (large[5], large[:3]["reason"], list(large.reason)) == (small[5], small[:3]["reason"], small.reason)
    assert large.card().text == small.card().text
    assert large.to_pandas()["reason"].tolist() == small.reason
    assert large.reason != small.reason[:-1]
    assert large.reason != [*small.reason[:-1], "other"]
    assert pa.array(large.reason).to_pylist() == small.reason

    damaged = bytearray((tmp_path / "large" / "selection.parquet").read_bytes())
    damaged[damaged.find(b"kept")] ^= 1
    (tmp_path / "large" / "selection.parquet").write_bytes(damaged)
    with pytest.raises(InputError, match="is truncated, damaged or not a Parquet file"):
        Selection.load(tmp_path / "large")


def test_weights_of_a_large_selection_are_numbers(tmp_path, monkeypatch):
    for module in (reasons, selection):
        monkeypatch.setattr(module, "MANY", 1)
    there = SoftPruning(by="score").select(make_scores([1.0, 2.0, 3.0, 4.0]))
    assert Selection.load(there.save(tmp_path)) == there
    text = pa.table({**there._columns(), "sample_id": range(4), "reason": list(there.reason), "weight": list("abcd")})
    save_parquet(text, tmp_path / "selection.parquet", {selection.KEY: there.metadata()})
    with pytest.raises(InputError, match="was written by another version"):
        Selection.load(tmp_path)
