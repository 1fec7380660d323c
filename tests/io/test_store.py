"""Parts are complete or absent: a line that was added is read once, whichever process reads, writes or dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.stores import MADE_OF, filled, measured, new

from resofilter_trainer.config import InputError
from resofilter_trainer.io import store
from resofilter_trainer.io.store import MANIFEST, MANY, PART, part_paths, read_manifest


def copied(path: Path) -> Path:
    """The file under the name that fits its bytes."""
    target = path.with_name(f"part-{0:010d}-{store._digest(path)}.parquet")
    return path.rename(target)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def in_child(work: Callable[[], object]) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    return child.exitcode


# ---- added and read


def test_what_was_added_is_there_when_the_store_is_opened_again(tmp_path):
    made = new(tmp_path)
    assert made.done().tolist() == []
    assert made.lines().num_rows == 0
    for units in ([7, 8], [0], [3, 1]):
        made.append(measured(units))
        assert set(units) <= set(made.done().tolist())
    again = new(tmp_path)
    assert again.done().tolist() == [0, 1, 3, 7, 8]
    assert again.done().dtype == np.int64
    assert again.lines().equals(measured([0, 1, 3, 7, 8]))
    assert read_manifest(again.folder) == MADE_OF


def test_lines_of_a_unit_keep_their_order(tmp_path):
    made = new(tmp_path)
    values = np.random.default_rng(0).permutation(5000)
    made.append(pa.table({"unit": np.repeat(np.arange(9, -1, -1), 500), "value": values}))
    found = made.lines()
    assert found["unit"].to_pylist() == np.repeat(np.arange(10), 500).tolist()
    assert found["value"].to_numpy().tolist() == values.reshape(10, 500)[::-1].ravel().tolist()


def test_nothing_to_add_makes_no_part(tmp_path):
    made = new(tmp_path)
    made.append(measured([]))
    assert part_paths(made.folder) == []


def test_a_unit_in_two_parts_counts_once(tmp_path):
    made = new(tmp_path)
    for units in ([0, 1], [1, 2], [2, 0, 5], [1]):
        made.append(measured(units))
    assert made.lines().equals(measured([0, 1, 2, 5]))
    made.append(measured([5]))
    assert made.done().tolist() == [0, 1, 2, 5]


def test_merged_parts_hold_the_same_lines(tmp_path):
    made = filled(tmp_path, 9)
    before = made.lines()
    made.compact()
    assert len(part_paths(made.folder)) == 1
    assert made.lines().equals(before)
    made.compact()
    assert made.lines().equals(before)
    made.append(measured([100]))
    assert made.done().tolist() == [*range(18), 100]


@pytest.mark.parametrize(("parts", "left"), [(MANY, MANY), (MANY + 1, 1)])
def test_many_parts_are_merged_when_the_store_is_opened(parts, left, tmp_path):
    before = filled(tmp_path, parts).lines()
    again = new(tmp_path)
    assert len(part_paths(again.folder)) == left
    assert again.lines().equals(before)


def test_several_processes_add_parts(tmp_path):
    made = new(tmp_path)

    def add(first: int) -> None:
        for unit in range(first, 60, 3):
            made.append(measured([unit]))

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=add, args=(first,)) for first in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert made.lines().equals(measured(range(60)))


def test_a_reader_never_sees_less_than_before_nor_anything_twice(tmp_path):
    made, errors, ended = new(tmp_path), [], threading.Event()

    def write() -> None:
        try:
            for unit in range(90):
                made.append(measured([unit]))
                if unit % 7 == 6:
                    made.compact()
        except Exception as error:
            errors.append(error)
        finally:
            ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    last = 0
    while not ended.is_set():
        found = made.done()
        assert found.tolist() == list(range(len(found)))
        assert len(found) >= last
        last = len(found)
        lines = made.lines()
        assert lines.num_rows >= 3 * last
        assert not lines.num_rows or lines.equals(measured(range(lines.num_rows // 3)))
    writer.join(60)
    assert errors == []
    assert made.done().tolist() == list(range(90))


# ---- killed


@pytest.mark.parametrize("removed", [0, 1, 3])
def test_a_kill_while_parts_are_merged_loses_and_doubles_nothing(removed, tmp_path, monkeypatch):
    made = filled(tmp_path, 6)
    before = made.lines()
    real, count = Path.unlink, [0]

    def die(self: Path, missing_ok: bool = False) -> None:
        if PART.fullmatch(self.name):
            if count[0] == removed:
                os._exit(9)
            count[0] += 1
        real(self, missing_ok=missing_ok)

    def work() -> None:
        monkeypatch.setattr(Path, "unlink", die)
        made.compact()

    assert in_child(work) == 9
    assert len(part_paths(made.folder)) == 7 - removed
    assert made.lines().equals(before)
    assert made.done().tolist() == list(range(12))
    monkeypatch.setattr(store, "MANY", 2)
    again = new(tmp_path)  # merges them again, into a part of the same name
    assert len(part_paths(again.folder)) == 1
    assert again.lines().equals(before)


def test_the_temporary_file_of_a_killed_writer_is_not_read_and_is_removed(tmp_path, monkeypatch):
    made = filled(tmp_path, 2)

    def work() -> None:
        monkeypatch.setattr(os, "replace", lambda *paths: os._exit(9))
        made.append(measured([50]))

    assert in_child(work) == 9
    left = [path.name for path in made.folder.iterdir() if path.name.startswith(".writing-")]
    assert len(left) == 1
    assert made.done().tolist() == [0, 1, 2, 3]
    again = new(tmp_path)
    assert not (again.folder / left[0]).exists()
    assert again.lines().equals(measured(range(4)))


def test_after_a_kill_while_the_manifest_is_written_the_store_is_new(tmp_path, monkeypatch):
    def work() -> None:
        monkeypatch.setattr(os, "replace", lambda *paths: os._exit(9))
        new(tmp_path)

    assert in_child(work) == 9
    assert not (tmp_path / "parts" / MANIFEST).exists()
    assert new(tmp_path).done().tolist() == []


# ---- refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weights": "fedcba98765432100123"}, "weights (01234567 / fedcba98)"),
        ({"max_length": 64}, "max_length (None / 64)"),
        ({"rows": 41, "columns": ["a"]}, "columns (['a', 'b'] / ['a']); rows (40 / 41)"),
        ({"batches": "x"}, "batches (None / x)"),
        ({"several\nlines": "a\nb"}, "several lines (None / a b)"),
    ],
)
def test_a_store_made_from_something_else_is_refused_with_the_difference(changes, named, tmp_path):
    before = filled(tmp_path, 2)
    names = {path: path.read_bytes() for path in before.folder.iterdir()}
    text = refusal(lambda: new(tmp_path, **changes))
    assert f"they differ in {named} (there / here)" in text
    assert str(before.folder) in text
    assert text.endswith("Choose another output, or remove that folder.")
    assert {path: path.read_bytes() for path in before.folder.iterdir()} == names


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b'"text"', b"{}", b'{"format": 1}', b'{"format": 1, "made_of": [["rows", 40]]}',
     b'{"format": 1, "made_of": null}', b"\xff\xfe\x00", b"[" * 100_000, b"9" * 10_000],
)  # fmt: skip
def test_a_damaged_manifest_is_refused(content, tmp_path):
    made = filled(tmp_path, 1)
    (made.folder / MANIFEST).write_bytes(content)
    text = refusal(made.open)
    assert f"'{made.folder / MANIFEST}' is damaged" in text
    assert text.endswith(f"Remove '{made.folder}': its rows are measured again.")


def test_a_manifest_of_another_version_is_refused(tmp_path):
    made = filled(tmp_path, 1)
    (made.folder / MANIFEST).write_text(json.dumps({"format": 2, "made_of": MADE_OF}))
    assert "was written by another version. Remove" in refusal(made.open)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    made = filled(tmp_path, 1)
    (made.folder / f"part-{5:010d}-{'0' * 32}.parquet").mkdir()
    assert "is not a part of a pass" in refusal(made.lines)
    (made.folder / MANIFEST).unlink()
    (made.folder / MANIFEST).mkdir()
    assert "is damaged" in refusal(made.open)


def test_a_broken_link_is_refused_and_not_waited_for(tmp_path):
    made = filled(tmp_path, 1)
    (made.folder / f"part-{5:010d}-{'0' * 32}.parquet").symlink_to(tmp_path / "nowhere")
    assert "is a broken link. Remove it." in refusal(made.lines)


def test_parts_without_a_manifest_are_refused(tmp_path):
    made = filled(tmp_path, 1)
    (made.folder / MANIFEST).unlink()
    assert f"'{made.folder}' holds parts and no manifest.json" in refusal(made.open)
    assert "no pass was started there" in refusal(lambda: read_manifest(made.folder))
    assert len(part_paths(made.folder)) == 1


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "parts").write_text("mine")
    assert "is a file, not a folder" in refusal(lambda: new(tmp_path))
    assert (tmp_path / "parts").read_text() == "mine"


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "emptied": lambda whole, chance: b"",
    "truncated": lambda whole, chance: whole[: chance.randrange(len(whole))],
    "longer": lambda whole, chance: whole + b"\0",
    "flipped": lambda whole, chance: flipped(whole, chance.randrange(len(whole)), 1 << chance.randrange(8)),
}


def flipped(whole: bytes, at: int, mask: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_noticed_and_named(damage, tmp_path):
    made, chance = filled(tmp_path, 3), random.Random(0)
    path = part_paths(made.folder)[1]
    whole = path.read_bytes()
    for _ in range(40):
        path.write_bytes(DAMAGES[damage](whole, chance))
        for call in (made.done, made.lines, made.compact):
            text = refusal(call)
            assert f"'{path}' is damaged" in text
            assert text.endswith("Remove it, and its rows are measured again.")
    path.unlink()
    assert made.done().tolist() == [0, 1, 4, 5]


def test_a_renamed_part_is_refused_or_not_seen(tmp_path):
    made = filled(tmp_path, 2)
    path = part_paths(made.folder)[0]
    path = path.rename(path.with_name(f"part-{0:010d}-{'0' * 32}.parquet"))
    assert "is damaged" in refusal(made.lines)
    path = path.rename(path.with_name("part-of-mine.parquet"))
    assert made.done().tolist() == [2, 3]
    copied(path)
    assert made.done().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"other": [1, 2]}),
        pa.table({"unit": [1.0, 2.0]}),
        pa.table({"unit": ["0", "1"]}),
        pa.table({"unit": pa.array([0, None], pa.int64())}),
        pa.table([pa.array([0]), pa.array([1])], ["unit", "unit"]),
        None,
    ],
)
def test_a_foreign_file_under_a_name_that_fits_it_is_refused(table, tmp_path):
    made = filled(tmp_path, 1)
    path = made.folder / "foreign"
    if table is None:
        path.write_text("no Parquet")
    else:
        pq.write_table(table, path)
    path = copied(path)
    for call in (made.done, made.lines):
        text = refusal(call)
        assert f"'{path}' is not a part of a pass" in text
        assert text.endswith("Remove it.")


def test_a_column_whose_name_is_not_text_is_refused(tmp_path):
    made = filled(tmp_path, 1)
    path = made.folder / "foreign"
    pq.write_table(pa.table({"unit": [0], "abcd": [1]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"abcd", b"ab\x8dd"))
    path = copied(path)
    assert f"'{path}' is not a part of a pass" in refusal(made.lines)


def test_parts_with_other_columns_do_not_belong_together(tmp_path):
    made = filled(tmp_path, 1)
    made.append(pa.table({"unit": [9], "value": ["text"]}))
    assert "do not belong together. Remove the folder" in refusal(made.lines)
