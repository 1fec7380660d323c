"""Files that are written and read piece by piece: as those that are written at once, and damage is noticed."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resofilter_trainer.config import InputError
from resofilter_trainer.io import pieces
from resofilter_trainer.io.files import load_parquet, save_parquet
from resofilter_trainer.io.pieces import TableFile, ahead, writing_pieces
from resofilter_trainer.io.table_digest import DIGEST, ColumnDigests

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64()),
        pa.field("score", pa.float64(), metadata={"direction": "largest"}),
        pa.field("keep", pa.bool_()),
        pa.field("reason", pa.string()),
    ]
)
TABLE = pa.table(
    {
        "sample_id": range(7),
        "score": [0.1, None, -0.0, 1e300, None, 5e-324, 2.0],
        "keep": [True, False, True, None, False, True, False],
        "reason": [None, "é", "", None, "empty", "é", None],
    },
    schema=SCHEMA,
)


def written(path: Path, ends: tuple[int, ...] = (3, 3, 7), name: str = "mine") -> Path:
    with writing_pieces(path, SCHEMA) as writer:
        for start, end in zip((0, *ends), ends, strict=False):
            writer.write(TABLE.slice(start, end - start))
        writer.end({name: "{}"})
    return path


@pytest.fixture(autouse=True)
def two_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(pieces, "ROWS", 2)


def test_what_is_written_in_pieces_is_read_at_once_and_in_pieces(tmp_path):
    path = written(tmp_path / "a.parquet")
    table, metadata = load_parquet(path, "mine", "rows")
    assert metadata == "{}"
    assert table.equals(TABLE)
    assert table.schema.equals(SCHEMA.with_metadata(table.schema.metadata), check_metadata=True)
    file = TableFile.open(path, "mine", "rows")
    assert (file.rows, file.metadata, file.by_column) == (7, "{}", True)
    found = list(file.pieces(["reason", "score"]))
    assert max(map(len, found)) <= 2
    assert pa.concat_tables(found).equals(TABLE.select(["reason", "score"]))
    with ahead(file.pieces()) as tables:
        assert pa.concat_tables(tables).equals(TABLE)


def test_what_is_written_at_once_is_read_in_pieces(tmp_path):
    file = TableFile.open(save_parquet(TABLE, tmp_path / "a.parquet", {"mine": "{}"}), "mine", "rows")
    assert not file.by_column
    assert pa.concat_tables(file.pieces(["score"])).equals(TABLE.select(["score"]))


def test_the_bytes_do_not_depend_on_the_pieces_where_row_groups_are_the_same(tmp_path):
    one, other = written(tmp_path / "a.parquet", (2, 4, 7)), written(tmp_path / "b.parquet", (2, 4, 6, 7))
    digests = [pq.read_schema(each).metadata[DIGEST] for each in (one, other)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("column", TABLE.column_names)
def test_another_value_in_any_column_is_noticed(column, tmp_path):
    schema = pq.read_schema(written(tmp_path / "a.parquet"))
    values = TABLE[column].to_pylist()
    table = TABLE.set_column(TABLE.column_names.index(column), column, [[*values[:-1], values[-2]]])
    digests = ColumnDigests([column])
    digests.add(table)
    with pytest.raises(pa.ArrowInvalid, match="not what was written"):
        digests.check(schema, 7)
    right = ColumnDigests([column])
    right.add(TABLE)
    right.check(schema, 7)
    for other, rows in ((schema, 8), (schema.with_metadata({**schema.metadata, b"mine": b"[]"}), 7)):
        with pytest.raises(pa.ArrowInvalid, match="not what was written"):
            right.check(other, rows)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = written(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="holds no scores written by resofilter"):
        TableFile.open(path, "other", "scores")
    with pytest.raises(InputError, match="No rows at"):
        TableFile.open(tmp_path / "none.parquet", "mine", "rows")
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[: len(whole) // 2], b"x"):
        path.write_bytes(damaged)
        for read in (in_pieces, at_once):
            with pytest.raises(InputError, match="cannot be read"):
                read(path)


def in_pieces(path: Path) -> pa.Table:
    return pa.concat_tables(TableFile.open(path, "mine", "rows").pieces())


def at_once(path: Path) -> pa.Table:
    return load_parquet(path, "mine", "rows")[0]


def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path):
    path = written(tmp_path / "a.parquet", (7,))
    whole = path.read_bytes()
    refused = 0
    for place in range(3, len(whole), 29):
        path.write_bytes(bytes([*whole[:place], whole[place] ^ 1, *whole[place + 1 :]]))
        for read in (in_pieces, at_once):
            try:
                assert read(path).equals(TABLE), place
            except InputError:
                refused += 1
    assert refused > 20


def test_nothing_is_left_of_a_file_that_was_not_ended(tmp_path):
    with pytest.raises(pa.ArrowException), writing_pieces(tmp_path / "a.parquet", SCHEMA) as writer:
        writer.write(TABLE.set_column(1, "score", [["x"] * 7]))
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_thread_ahead_is_raised():
    def tables():
        yield 1
        raise InputError("damaged")

    with ahead(tables()) as source:
        assert next(source) == 1
        with pytest.raises(InputError, match="damaged"):
            next(source)
