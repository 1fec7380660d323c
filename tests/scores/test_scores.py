"""Scores are read bit for bit as they were written; scores that do not belong together are not joined."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tables import WHY, files_in, make_provenance, make_scores

from resofilter_trainer.config import InputError
from resofilter_trainer.io.files import save_parquet
from resofilter_trainer.scores.provenance import Provenance, Trust
from resofilter_trainer.scores.score_table import SCORES_FILE, ScoreTable
from resofilter_trainer.selecting.data_selector import DataSelector

AWKWARD = [1e-5, 0.1 + 0.2, 5e-324, np.nextafter(1e-5, 1), 0.0, 1 / 3]  # no decimal shorter than 17 digits tells them


# ---- written and read


def test_round_trip_is_exact_to_the_bit(tmp_path):
    scores = make_scores([*AWKWARD, None, -0.0])

    again = ScoreTable.load(scores.save(tmp_path))

    assert again.table.equals(scores.table)
    assert again.table["score"].null_count == 1
    assert again.column("score").tobytes() == scores.column("score").tobytes()  # equals() takes -0.0 for 0.0
    assert again.reasons == [None] * 6 + [WHY, None]
    assert again.provenance == scores.provenance


@pytest.mark.parametrize("trust", [None, Trust(agreement=None, rows=2, saturation=0.25)])
def test_provenance_survives_with_whatever_trust(tmp_path, trust):
    scores = make_scores(AWKWARD, provenance=make_provenance(trust=trust))
    assert ScoreTable.load(scores.save(tmp_path)).provenance == scores.provenance


def test_saves_into_a_new_folder(tmp_path):
    path = make_scores(AWKWARD).save(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / SCORES_FILE
    assert files_in(path.parent) == [SCORES_FILE]
    assert len(ScoreTable.load(path.parent)) == len(AWKWARD)


def test_saves_to_a_file(tmp_path):
    path = make_scores(AWKWARD).save(tmp_path / "mine.parquet")
    assert path == tmp_path / "mine.parquet"
    assert files_in(tmp_path) == ["mine.parquet"]
    assert len(ScoreTable.load(path)) == len(AWKWARD)


def test_saving_again_replaces(tmp_path):
    make_scores(AWKWARD).save(tmp_path)
    make_scores([7.0]).save(tmp_path)
    assert ScoreTable.load(tmp_path).column("score").tolist() == [7.0]
    assert files_in(tmp_path) == [SCORES_FILE]


@pytest.mark.parametrize("interruption", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["write", "rename"])
def test_an_interrupted_save_leaves_the_old_file_unchanged(tmp_path, monkeypatch, interruption, step):
    path = make_scores(AWKWARD).save(tmp_path)
    before = path.read_bytes()

    def half_a_file(table: pa.Table, where: Path, **options: object) -> None:
        Path(where).write_bytes(before[: len(before) // 2])
        raise interruption

    def no_rename(old: Path, new: Path) -> None:
        raise interruption

    monkeypatch.setattr(*((pq, "write_table", half_a_file) if step == "write" else (os, "replace", no_rename)))
    with pytest.raises(type(interruption)):
        make_scores([7.0]).save(tmp_path)

    assert path.read_bytes() == before
    assert files_in(tmp_path) == [SCORES_FILE]


# ---- what cannot be read


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_named_with_the_remedy(tmp_path, share):
    path = make_scores(AWKWARD).save(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])

    with pytest.raises(InputError, match=r"truncated.*Make it again") as refused:
        ScoreTable.load(tmp_path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_text_under_the_name_of_parquet_is_refused(tmp_path):
    (tmp_path / SCORES_FILE).write_text("sample_id,score\n0,1e-5\n")
    with pytest.raises(InputError, match="not a Parquet file"):
        ScoreTable.load(tmp_path)


def test_a_parquet_file_of_another_program_is_refused(tmp_path):
    path = tmp_path / "theirs.parquet"
    pq.write_table(pa.table({"score": [1.0]}), path)
    with pytest.raises(InputError, match="holds no scores written by resofilter") as refused:
        ScoreTable.load(path)
    assert str(path) in str(refused.value)


def test_a_selection_is_not_a_table_of_scores(tmp_path):
    path = DataSelector().select(make_scores(AWKWARD)).save(tmp_path)
    with pytest.raises(InputError, match="holds no scores"):
        ScoreTable.load(path)


@pytest.mark.parametrize("name", ["", "nowhere", "nowhere.parquet"])
def test_missing_file_is_named(tmp_path, name):
    with pytest.raises(InputError, match=r"No scores at .*Pass the folder or the file") as refused:
        ScoreTable.load(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


# ---- the columns


def test_to_pandas_has_the_documented_columns():
    frame = make_scores([1e-5, None, 2e-5]).to_pandas()

    assert list(frame.columns) == ["sample_id", "score", "loss", "num_tokens", "prompt", "layer_2", "layer_3", "reason"]
    assert frame["score"].dtype == np.float64
    assert frame["sample_id"].tolist() == [0, 1, 2]
    assert frame["score"].isna().tolist() == [False, True, False]
    assert frame["reason"].isna().tolist() == [True, False, True]
    assert frame["reason"][1] == WHY


def test_a_missing_value_is_nan_in_a_column():
    scores = make_scores([1e-5, None])
    np.testing.assert_array_equal(scores.column("score"), [1e-5, np.nan])
    np.testing.assert_array_equal(scores.column("num_tokens"), [3, np.nan])
    assert scores.scored.tolist() == [True, False]


def test_an_unknown_column_is_refused_with_the_known_ones():
    scores = make_scores([1e-5])
    with pytest.raises(InputError, match="no column 'scores'") as refused:
        scores.column("scores")
    known = [name for name in scores.table.column_names if name not in ("prompt", "reason")]
    assert str(refused.value).endswith(f"They have: {', '.join(known)}.")


def test_a_text_column_is_refused():
    with pytest.raises(InputError, match="reason"):
        make_scores([1e-5, 2e-5]).column("reason")


# ---- joined


def test_shards_are_joined_in_the_order_of_the_dataset():
    provenance = make_provenance(rows=5)
    shards = [
        make_scores([0.4, 0.1], [4, 1], provenance),
        make_scores([None], [2], provenance),
        make_scores([0.3, 0.0], [3, 0], provenance),
    ]
    joined = ScoreTable.join(shards)

    assert joined.column("sample_id").tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(joined.column("score"), [0.0, 0.1, np.nan, 0.3, 0.4])
    assert joined.reasons == [None, None, WHY, None, None]
    assert joined.provenance == provenance


def test_another_forward_is_another_table():
    """precision="auto" may choose another one on another machine."""
    one = make_scores([1.0, 2, 3], provenance=make_provenance())
    other = make_scores(
        [4.0, 5, 6], [3, 4, 5], make_provenance(trust=Trust(0.99, 6, saturation=None, forward="bfloat16"))
    )
    with pytest.raises(InputError, match=r"forward \(float32 / bfloat16\)"):
        ScoreTable.join([one, other])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weights": "fedcba9876543210", "model": "other"}, "model weights (tiny 01234567 / other fedcba98)"),
        ({"config": {"eps": 1e-4, "n_layers": 2}}, "eps (1e-08 / 0.0001)"),
        ({"preparation": {"max_length": 32, "prompt_column": None}}, "max_length (64 / 32)"),
        ({"versions": {"torch": "2.6.0"}}, "torch (2.13.0 / 2.6.0)"),
        ({"versions": {"torch": "2.13.0", "trl": "1.16.0"}}, "trl (None / 1.16.0)"),
        ({"tokenizer": "t1"}, "tokenizer (t0 / t1)"),
        ({"template": "c1"}, "template (c0 / c1)"),
        ({"dataset": "d1"}, "dataset (d0 / d1)"),
        ({"rows": 7}, "rows (6 / 7)"),
    ],
)
def test_tables_that_differ_are_not_joined_and_the_difference_is_named(changes, named):
    one = make_scores([0.1], [0], make_provenance())
    other = make_scores([0.2], [1], make_provenance(**changes))

    with pytest.raises(InputError, match="do not belong together") as refused:
        ScoreTable.join([one, other])
    assert str(refused.value).endswith(f"they differ in {named}.")  # this, and nothing else


def test_names_and_trust_are_not_compared():
    one = make_provenance()
    assert one.differences(make_provenance(model="other", source={"dataset": "moved.jsonl"}, trust=None)) == []


def test_provenance_does_not_differ_from_itself_saved():
    """With a tuple, as from `prompt_column=("instruction", "input")`."""
    one = make_provenance(preparation={"prompt_column": ("instruction", "input")})
    assert one.differences(Provenance.from_json(one.to_json())) == []


def test_a_row_in_two_shards_is_refused():
    provenance = make_provenance()
    with pytest.raises(InputError, match="Row 1 is scored twice"):
        ScoreTable.join([make_scores([0.1, 0.2], [0, 1], provenance), make_scores([0.3, 0.4], [2, 1], provenance)])


@pytest.mark.parametrize(
    ("agreement", "trusted"), [(None, True), (1.0, True), (0.95, True), (0.9499, False), (float("nan"), False)]
)
def test_an_agreement_below_95_hundredths_is_not_trusted_and_has_a_remedy(agreement, trusted):
    trust = Trust(agreement=agreement, rows=8, saturation=0.5)
    assert trust.trusted is trusted
    assert ("larger eps" in str(trust)) is not trusted


def test_scores_of_another_version_are_told_apart_from_broken_ones(tmp_path):
    scores = make_scores([1e-5])
    other = '{"model": "m", "trust": null, "unknown": 1}'
    save_parquet(scores.table, tmp_path / "scores.parquet", {"resofilter_scores": other})
    with pytest.raises(InputError, match="written by another version"):
        ScoreTable.load(tmp_path)
