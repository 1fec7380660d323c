"""Token scores are mapped into memory bit for bit as they were written, or refused."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.tables import files_in, make_provenance, make_token_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from resofilter_trainer.config import InputError
from resofilter_trainer.io.files import load_arrow
from resofilter_trainer.scores.provenance import Trust
from resofilter_trainer.scores.token_scores import ALWAYS, KEY, STATISTICS, TOKEN_SCORES_FILE, TokenScores

ROWS = [[(1.5, 0.5), (0.1, 0.2)], [], [(3.0, 2.0)], []]
KINDS = {"sample_id": np.int64, "offsets": np.int64, **ALWAYS, "reference": np.float32}
losses = st.floats(-1e9, 1e9, width=32)


def assert_same(one: TokenScores, other: TokenScores) -> None:
    assert one.columns == other.columns
    for name in ("sample_id", "offsets", *one.columns):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.dtype == theirs.dtype, name
        assert mine.tobytes() == theirs.tobytes(), name  # -0.0 is not 0.0
    assert one.provenance == other.provenance


def write(table: pa.Table, path: Path, metadata: dict[str, Any] | None = None) -> Path:
    """An Arrow file with any content, as another program may write it."""
    table = table.replace_schema_metadata(metadata)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def table_of(scores: TokenScores, path: Path) -> tuple[pa.Table, dict[str, str]]:
    """What `save` writes, as a table to be changed."""
    table, metadata = load_arrow(scores.save(path), KEY, "token scores")
    return table, {KEY: metadata}


def assert_refused(path: Path, match: str) -> None:
    """The refusal is one line that names the file."""
    with pytest.raises(InputError, match=match) as refused:
        TokenScores.load(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


# ---- written and read


@pytest.mark.parametrize("rows", [ROWS, [[(1.0, -0.0)]], [[], [], []], []], ids=["ragged", "one", "no token", "no row"])
@pytest.mark.parametrize("name", ["", "new/folder", "mine.arrow"])
@pytest.mark.parametrize("more", [(), ("entropy",), STATISTICS])
@pytest.mark.parametrize("reference", [True, False])
def test_round_trip_is_exact_to_the_bit(tmp_path, rows, name, more, reference):
    scores = make_token_scores(rows)
    found = {each: np.random.default_rng(0).random(len(scores)).astype(np.float32) for each in more}
    scores = dataclasses.replace(scores, reference=scores.reference if reference else None, **found)

    path = scores.save(tmp_path / name)

    assert path == (tmp_path / name if name.endswith(".arrow") else tmp_path / name / TOKEN_SCORES_FILE)
    assert files_in(path.parent) == [path.name]
    assert_same(TokenScores.load(tmp_path / name), scores)
    assert_same(TokenScores.load(path), scores)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.tuples(losses, losses), max_size=4), max_size=6))
def test_round_trip_of_any_rows(tmp_path_factory, rows):
    scores = make_token_scores(rows)
    assert_same(TokenScores.load(scores.save(tmp_path_factory.mktemp("any"))), scores)


def test_loaded_scores_can_be_saved_over_their_own_file(tmp_path):
    scores = make_token_scores(ROWS)
    mapped = TokenScores.load(scores.save(tmp_path))
    mapped.save(tmp_path)
    assert_same(TokenScores.load(tmp_path), scores)
    assert_same(mapped, scores)  # still mapped, although the file was replaced


def test_saving_again_replaces(tmp_path):
    make_token_scores(ROWS).save(tmp_path)
    other = make_token_scores([[(7.0, 1.0)]])
    other.save(tmp_path)
    assert_same(TokenScores.load(tmp_path), other)
    assert files_in(tmp_path) == [TOKEN_SCORES_FILE]


@pytest.mark.parametrize("rows", [ROWS, [[]], []])
def test_arrays_have_the_documented_types(tmp_path, rows):
    loaded = TokenScores.load(make_token_scores(rows).save(tmp_path))
    assert {name: getattr(loaded, name).dtype for name in KINDS} == KINDS


def test_arrays_of_other_types_are_converted(tmp_path):
    scores = make_token_scores(ROWS)
    wide = {name: getattr(scores, name).astype(np.float64) for name in ("base", "reference")}
    whole = {name: getattr(scores, name).astype(np.int64) for name in ("position", "token")}
    narrow = {name: getattr(scores, name).astype(np.int32) for name in ("sample_id", "offsets")}
    other = dataclasses.replace(scores, **wide, **whole, **narrow)
    assert_same(TokenScores.load(other.save(tmp_path)), scores)


def test_loading_maps_the_file_and_copies_nothing(tmp_path):
    path = make_token_scores([[(1.0, 0.5)] * 100_000]).save(tmp_path)
    before = pa.total_allocated_bytes()

    loaded = TokenScores.load(path)

    assert pa.total_allocated_bytes() - before < 10_000  # the file has 1.6 million
    for name in KINDS:
        assert not getattr(loaded, name).flags.owndata, name
        assert not getattr(loaded, name).flags.writeable, name


@pytest.mark.parametrize("trust", [None, Trust(agreement=0.99, rows=2, saturation=None)])
def test_provenance_survives(tmp_path, trust):
    provenance = make_provenance(trust=trust, config={"reference": "tüned", "reference_weights": "fe" * 8})
    scores = make_token_scores(ROWS, provenance=provenance)
    assert TokenScores.load(scores.save(tmp_path)).provenance == provenance


# ---- the scores


def test_lengths_and_rows():
    scores = make_token_scores(ROWS)
    assert len(scores) == 3
    assert scores.num_tokens.tolist() == [2, 0, 1, 0]
    assert [len(scores.of_row(row)) for row in range(4)] == [2, 0, 1, 0]


@given(st.lists(st.lists(st.tuples(losses, losses), max_size=4), max_size=6))
def test_score_of_a_token_is_the_difference_in_float64(rows):
    scores = make_token_scores(rows)
    for row, pairs in enumerate(rows):
        assert scores.of_row(row).dtype == np.float64
        assert scores.of_row(row).tolist() == [base - reference for base, reference in pairs]


def test_score_keeps_what_float32_would_round_away():
    scores = make_token_scores([[(1e8, 1.0), (1e8, 0.0)]])
    assert scores.of_row(0).tolist() == [99_999_999, 100_000_000]


# ---- arrays that do not fit together


@pytest.mark.parametrize(
    "offsets", [[], [0], [0, 3], [0, 2, 2, 3], [0, 2, 2, 3, 3, 3], [1, 2, 2, 3, 3], [0, 2, 2, 3, 4], [0, 2, 1, 3, 3]]
)
def test_offsets_that_do_not_cut_the_tokens_into_the_rows_are_refused(offsets):
    with pytest.raises(InputError, match=r"offsets do not cut 3 tokens into 4 rows\.$") as refused:
        dataclasses.replace(make_token_scores(ROWS), offsets=np.array(offsets, dtype=np.int64))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ids", [[], [0, 1, 2], [0, 1, 2, 3, 4]])
def test_every_row_needs_its_id(ids):
    with pytest.raises(InputError, match=f"3 tokens into {len(ids)} rows"):
        dataclasses.replace(make_token_scores(ROWS), sample_id=np.array(ids, dtype=np.int64))


@pytest.mark.parametrize("name", ["position", "token", "reference"])
@pytest.mark.parametrize("length", [0, 2, 4])
def test_lists_of_another_length_are_refused_and_named(name, length):
    with pytest.raises(InputError, match=rf"^'{name}' has {length} values for 3 tokens\.$"):
        dataclasses.replace(make_token_scores(ROWS), **{name: np.zeros(length, dtype=KINDS[name])})


def test_base_of_another_length_is_refused():
    with pytest.raises(InputError, match="do not cut 2 tokens"):
        dataclasses.replace(make_token_scores(ROWS), base=np.zeros(2, dtype=np.float32))


# ---- what cannot be read


@pytest.mark.parametrize("name", ["", "nowhere", "nowhere.arrow"])
def test_missing_file_is_named(tmp_path, name):
    assert_refused(tmp_path / name, r"No token scores at .*Pass the folder or the file")


def test_a_folder_under_the_name_of_the_file_is_refused(tmp_path):
    (tmp_path / TOKEN_SCORES_FILE).mkdir()
    assert_refused(tmp_path, "No token scores")


def test_truncated_file_is_refused_wherever_it_is_cut(tmp_path):
    path = make_token_scores(ROWS).save(tmp_path)
    whole = path.read_bytes()
    for length in {0, 1, 6, 8, len(whole) - 1, *range(0, len(whole), 37)}:
        path.write_bytes(whole[:length])
        assert_refused(path, r"truncated.*Make it again")


@pytest.mark.parametrize("rows", [ROWS, *(pytest.param(rows, marks=pytest.mark.slow) for rows in ([], [[]]))])
def test_a_changed_byte_is_noticed_wherever_it_counts(tmp_path, rows):
    scores = make_token_scores(rows)
    path = scores.save(tmp_path)
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert_same(TokenScores.load(path), scores)  # nothing is read there
        except InputError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ends", [b"", b"ARROW1"])
def test_random_bytes_are_refused(tmp_path, seed, ends):
    path = tmp_path / TOKEN_SCORES_FILE
    path.write_bytes(ends + random.Random(seed).randbytes(1000) + ends)
    assert_refused(path, "not an Arrow file")


@pytest.mark.parametrize("metadata", [None, {"resofilter_scores": "{}"}])
def test_an_arrow_file_of_another_program_is_refused(tmp_path, metadata):
    path = write(pa.table({"base": [1.0]}), tmp_path / "theirs.arrow", metadata)
    assert_refused(path, "holds no token scores written by resofilter")


@pytest.mark.parametrize("column", ["sample_id", *ALWAYS])
def test_a_missing_column_is_refused(tmp_path, column):
    table, metadata = table_of(make_token_scores(ROWS), tmp_path)
    path = write(table.drop_columns([column]), tmp_path / "other.arrow", metadata)
    assert_refused(path, r"written by another version\. Make them again")


@pytest.mark.parametrize("column", [*ALWAYS, "reference"])
@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 2, 3, 4]),
        pa.array([["a", "b"], [], ["c"], []]),
        pa.array([[1], [], [2], []]),  # another length
        pa.array([[1, None], [], [2], []]),
    ],
    ids=["not lists", "text", "too few", "nulls"],
)
def test_a_column_of_something_else_is_refused(tmp_path, column, values):
    table, metadata = table_of(make_token_scores(ROWS), tmp_path)
    table = table.set_column(table.column_names.index(column), column, values)
    assert_refused(write(table, tmp_path / "other.arrow", metadata), "written by another version")


@pytest.mark.parametrize("text", ["", "{", "5", "{}", '{"model": "m", "trust": null, "unknown": 1}'])
def test_a_provenance_of_another_version_is_refused(tmp_path, text):
    table, _ = table_of(make_token_scores(ROWS), tmp_path)
    assert_refused(write(table, tmp_path / "other.arrow", {KEY: text}), "written by another version")


def test_a_provenance_that_is_not_text_is_refused(tmp_path):
    table, _ = table_of(make_token_scores(ROWS), tmp_path)
    assert_refused(write(table, tmp_path / "other.arrow", {KEY: b"\xff"}), "[Mm]ake (it|them) again")


# ---- what cannot be written


@pytest.mark.parametrize("interruption", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["open", "write", "rename"])
@pytest.mark.parametrize("earlier", [True, False])
def test_an_interrupted_save_changes_no_file(tmp_path, monkeypatch, interruption, step, earlier):
    path = tmp_path / TOKEN_SCORES_FILE
    if earlier:
        make_token_scores(ROWS).save(tmp_path)
    before = path.read_bytes() if earlier else None
    new_file, temporary = pa.ipc.new_file, []

    class HalfAFile:
        def __init__(self, sink, schema):
            if step == "open":
                raise interruption
            self.writer = new_file(sink, schema)

        def __enter__(self):
            return self

        def write_batch(self, batch):
            self.writer.write_batch(batch)
            temporary.extend(set(files_in(tmp_path)) - {path.name})
            raise interruption

        def __exit__(self, *_):
            self.writer.close()

    def no_rename(old: Path, new: Path) -> None:
        temporary.append(Path(old).name)
        raise interruption

    monkeypatch.setattr(*((os, "replace", no_rename) if step == "rename" else (pa.ipc, "new_file", HalfAFile)))
    with pytest.raises(type(interruption)):
        make_token_scores([[(7.0, 1.0)]]).save(tmp_path)

    assert len(temporary) == (step != "open")  # one was beside the target
    assert files_in(tmp_path) == ([path.name] if earlier else [])
    assert (path.read_bytes() if earlier else None) == before


@pytest.mark.parametrize("below", ["", "new/folder", "mine.arrow"])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, below):
    blocking = tmp_path / "taken"
    blocking.write_text("mine")
    with pytest.raises(InputError, match="is a file, not a folder") as refused:
        make_token_scores(ROWS).save(blocking / below)
    assert f"'{blocking}'" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert blocking.read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_refused():
    with pytest.raises(InputError, match="Nothing can be written to '/proc'") as refused:
        make_token_scores(ROWS).save("/proc/resofilter/x")
    assert "\n" not in str(refused.value)
