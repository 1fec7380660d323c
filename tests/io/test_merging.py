"""Parts that are merged as they are written: few files, no line lost or read twice, whoever merges, reads or dies."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.stores import filled, measured, new

from resofilter_trainer.config import InputError
from resofilter_trainer.io import store
from resofilter_trainer.io.store import Store, part_paths, parts_to_merge

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """A part of a unit has 1.1 kB here, one of ten 1.4, so that some parts are left and some grow."""
    monkeypatch.setattr(store, "GROWS", 1400)
    monkeypatch.setattr(store, "LARGE", 4000)


# ---- how many files


@pytest.mark.parametrize("most", [1, 100, 10_000])
def test_what_is_left_doubles_from_part_to_part(most):
    chance, sizes, written = random.Random(most), list[int](), 0
    store.GROWS, store.LARGE, total = 1000, 1 << 30, 0
    for _ in range(3000):
        added = chance.randint(1, most)
        count = parts_to_merge(added, sizes)
        total += added
        sizes = sorted([*sizes[count:], added + sum(sizes[:count])])
        written += sizes[0]
        assert all(large > 2 * small for small, large in itertools.pairwise(sizes))
    assert sum(sizes) == total
    assert len(sizes) <= 2 + total.bit_length() - store.GROWS.bit_length()
    assert written <= 3000 * store.GROWS + 2 * total * len(f"{total:b}")


def test_no_part_is_made_larger_than_the_limit():
    assert parts_to_merge(10, [1300, 1300, 1300, 1300]) == 3
    assert parts_to_merge(9000, [1300]) == 0
    assert parts_to_merge(10, [1500]) == 0
    assert parts_to_merge(800, [1500, 1900]) == 1


def test_a_part_takes_the_place_of_small_ones_and_holds_their_lines(tmp_path):
    made, own = new(tmp_path), list[Path]()
    for unit in range(25):
        own = made.append_and_merge(measured([unit]), own)
        assert sorted(own) == made.paths()
        assert made.lines().equals(measured(range(unit + 1)))
    assert 1 < len(own) < 5
    assert made.append_and_merge(measured([]), []) == []


def test_parts_are_merged_to_few_of_a_limited_size(tmp_path):
    before = filled(tmp_path, 9).lines()
    made = new(tmp_path)
    made.compact()
    assert 2 < len(made.paths()) < 9
    assert made.lines().equals(before)
    for path in made.paths():
        assert path.stat().st_size < 4000


def test_a_part_that_another_process_has_merged_is_not_missed(tmp_path):
    made, other = new(tmp_path), new(tmp_path)
    own = made.append_and_merge(measured([0]), [])
    other.append_and_merge(measured([1]), other.paths())
    assert not own[0].exists()
    own = made.append_and_merge(measured([2]), own)
    assert len(own) == 1
    assert pq.read_table(own[0])["unit"].to_pylist() == [2] * 3
    assert made.lines().equals(measured(range(3)))


def test_two_processes_that_merge_the_same_part_at_the_same_time_count_its_lines_once(tmp_path, monkeypatch):
    made, other = new(tmp_path), new(tmp_path)
    own, real = made.append_and_merge(measured([0, 1]), []), store._read

    def meanwhile(path: Path, columns: list[str] | None):
        table = real(path, columns)
        monkeypatch.setattr(store, "_read", real)
        made.append_and_merge(measured([2]), own)
        return table

    monkeypatch.setattr(store, "_read", meanwhile)
    other.append_and_merge(measured([3]), other.paths())
    units = [unit for path in made.paths() for unit in set(pq.read_table(path)["unit"].to_pylist())]
    assert sorted(units) == [0, 0, 1, 1, 2, 3]
    assert made.lines().equals(measured(range(4)))
    made.compact()
    assert len(made.paths()) == 1
    assert made.lines().equals(measured(range(4)))


def test_a_damaged_part_is_named_when_it_is_merged(tmp_path):
    made = filled(tmp_path, 1)
    (path,) = made.paths()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=f"'{path}' is damaged: its bytes are not those that were written. Remove it"):
        made.append_and_merge(measured([7]), [path])
    assert made.paths() == [path]


# ---- killed


def killed_at(number: int, work: Callable[[], object]) -> int | None:
    """The exit code of a process that dies at its `number`-th access to the disk, if it has so many."""

    def run() -> None:
        count = [0]

        def dying(real: Callable) -> Callable:
            def call(*args, **options):
                count[0] += 1
                if count[0] == number:
                    os._exit(9)
                return real(*args, **options)

            return call

        os.replace, os.fsync = dying(os.replace), dying(os.fsync)
        Path.unlink, pq.write_table = dying(Path.unlink), dying(pq.write_table)
        work()
        os._exit(0)

    child = FORK.Process(target=run)
    child.start()
    child.join(60)
    return child.exitcode


@pytest.mark.parametrize("what", ["added", "merged"])
def test_a_kill_at_any_access_to_the_disk_loses_and_doubles_nothing(what, tmp_path):
    for number in range(1, 40):
        made = filled(tmp_path / str(number), 3, units=1)
        work = (
            made.compact if what == "merged" else lambda made=made: made.append_and_merge(measured([3]), made.paths())
        )
        code = killed_at(number, work)
        assert made.lines().equals(measured(range(3 if what == "merged" else made.done().max() + 1)))
        assert made.done()[:3].tolist() == [0, 1, 2]
        again = new(tmp_path / str(number))
        again.append_and_merge(measured([4]), again.paths())
        assert {0, 1, 2, 4} <= {*again.done().tolist()} <= {0, 1, 2, 3, 4}
        again.compact()
        assert len(again.paths()) < 3
        if code == 0:
            break
    assert 5 < number < 40
    assert made.done().max() == 4


def adding(made: Store, units: range) -> None:
    """What a process does that is not the main one."""
    own, done = list[Path](), {*made.done().tolist()}
    for unit in units:
        if unit not in done:
            own = made.append_and_merge(measured([unit]), own)
            time.sleep(0.01)


@pytest.mark.parametrize("kills", [3, pytest.param(15, marks=pytest.mark.slow)])
def test_killed_processes_that_add_and_merge_lose_nothing(kills, tmp_path):
    """Two processes add units while a third merges all parts; one of them is killed, and all start again."""
    made, chance, saved = new(tmp_path), random.Random(kills), set[int]()
    for _ in range(kills):
        new(tmp_path)  # which removes what killed processes left
        shares = [range(rank, 20_000, 2) for rank in range(2)]
        children = [FORK.Process(target=adding, args=(made, share), daemon=True) for share in shares]
        children.append(FORK.Process(target=merging, args=(made,), daemon=True))
        for child in children:
            child.start()
        until = time.monotonic() + 60
        while len(made.done()) < len(saved) + 4 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        victim = chance.choice(children)
        os.kill(victim.pid or 0, signal.SIGKILL)
        time.sleep(0.05)
        for child in children:
            child.kill()
            child.join(60)
        found = made.done().tolist()
        assert saved <= {*found}
        assert len(found) == len({*found})
        assert made.lines().equals(measured(found))
        saved |= {*found}
    assert len(saved) >= 4 * kills
    made.compact()
    assert made.done().tolist() == sorted(saved)
    total = sum(path.stat().st_size for path in part_paths(made.folder))
    assert len(part_paths(made.folder)) <= 2 * total / store.LARGE + 1


def merging(made: Store) -> None:
    """What the main process does from time to time, without a pause."""
    while True:
        made.compact()
        time.sleep(0.01)
