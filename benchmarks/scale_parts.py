"""The parts of many processes: how many files, how many writes and bytes, and how long a start takes to read them.

    python benchmarks/scale.py parts

Three things, none of which runs a model. A day of 1,024 processes is counted: sizes and a clock, no files, with the
library's own rules of when to write and what to merge. The same for some minutes with files, written by the library as
in a pass, for a clock that is set forward. And the folder of an interrupted pass is read, with a part for every write
and with merged ones.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from resofilter_trainer.io.store import UNIT, Store, parts_to_merge
from resofilter_trainer.scoring import passes

MINUTE, HOUR = 60.0, 3600.0
ROWS_PER_UNIT = 16
A_MINUTE = 12_000  # bytes that a process measures in a minute, with 100 million rows in 5.6 hours on 1,024 devices
BEFORE = 1 / 50, 1.0, 300.0  # a write of each process came after this share of the time, within these seconds


def parts(processes: int, hours: float, minutes: int, files: int) -> None:
    print(f"{processes:,} processes and {hours:g} h, counted\n")
    print("| | before | now |\n|---|---|---|")
    before, now = counted_before(processes, hours), counted(processes, hours)
    for name, value in now.items():
        print(f"| {name} | {before.get(name, '')} | {value:,} |")
    print(f"\n{processes:,} processes and {minutes} minutes, with files\n\n| | |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, number in with_files(Path(folder), processes, minutes).items():
            print(f"| {name} | {number:,} |", flush=True)
    print(f"\n{files:,} parts of {A_MINUTE // 1000} kB\n\n| | files | MB | done, s | all lines, s |")
    print("|---" * 5 + "|")
    with tempfile.TemporaryDirectory() as folder:
        opened(Path(folder), files)


# ---- counted


class Sizes:
    """The sizes of the parts in a folder, by their numbers."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}
        self.written = self.made = 0

    def append_and_merge(self, added: int, own: Iterable[int]) -> list[int]:
        """As `Store.append_and_merge`, with numbers for files."""
        found = sorted((self.of[number], number) for number in own if number in self.of)
        count = parts_to_merge(added, [size for size, _ in found])
        total = added + sum(self.of.pop(number) for _, number in found[:count])
        self.made += 1
        self.of[self.made] = total
        self.written += total
        return [*(number for _, number in found[count:]), self.made]


def counted(processes: int, hours: float, a_minute: int = A_MINUTE) -> dict[str, int]:
    """Files, writes and bytes of a pass whose processes measure without a pause and write when `passes` does."""
    folder, most, gathered, saved, now = Sizes(), 0, 0.0, 0.0, 0.0
    own: list[list[int]] = [[] for _ in range(processes)]
    while now < hours * HOUR:
        now += passes._interval(now, processes)
        for process in reversed(range(processes)):  # the main process is the last one of each round
            if process == 0 and now - gathered >= passes.GATHERED:
                own[0], gathered = [*folder.of], now
            own[process] = folder.append_and_merge(int(a_minute * (now - saved) / MINUTE), own[process])
            most = max(most, len(folder.of))
        saved = now
    written, made = folder.written, folder.made
    return {
        "writes of all processes": made,
        "MB written": written // 10**6,
        "most files at a time": most,
        "files at the end": len(compacted(folder)),
        "MB of results": sum(folder.of.values()) // 10**6,
    }


def compacted(folder: Sizes) -> list[int]:
    """The sizes of the parts after `Store.tidy`."""
    from resofilter_trainer.io.store import LARGE, MANY

    sizes = sorted(folder.of.values())
    if len(sizes) <= MANY:
        return sizes
    found = [0]
    for size in sizes:
        if found[-1] + size > LARGE:
            found.append(0)
        found[-1] += size
    return found


def counted_before(processes: int, hours: float) -> dict[str, str]:
    """What there was before: a part for each write, which stayed."""
    share, least, most = BEFORE
    now, writes = 0.0, 0
    while now < hours * HOUR:
        now += min(max(now * share, least), most)
        writes += 1
    names = "writes of all processes", "most files at a time", "files at the end"
    return dict.fromkeys(names, f"{processes * writes:,}")


# ---- with files


@dataclass(frozen=True)
class CountingStore(Store):
    """A store that remembers the sizes of what it has written."""

    written: list[int] = field(default_factory=list)

    def append(self, lines: pa.Table) -> Path | None:
        """Add a part, as `Store` does."""
        part = super().append(lines)
        if part is not None:
            self.written.append(part.stat().st_size)
        return part


def with_files(folder: Path, processes: int, minutes: int, units: int = 22) -> dict[str, float]:
    """The processes of a pass, one after the other in each minute, with the library's own writing and merging."""
    now = [0.0]
    stores = [CountingStore(folder / "parts", "scores", {"weights": "0" * 32}) for _ in range(processes)]
    stores[0].open()
    each = [passes._Results(store, lambda: now[0], processes, store is stores[0]) for store in stores]
    most, gathering, unit, begun = 0, 0.0, 0, 0.0
    for _ in range(minutes):
        now[0] += MINUTE
        for process in reversed(range(processes)):  # the main process is the last one
            if process == 0:
                most = max(most, len(stores[0].paths()))
            begun = time.perf_counter()
            each[process].add(unit, lines_of(unit, units))
            unit += units
        gathering = max(gathering, time.perf_counter() - begun)
    for results in each:
        results.save()
    left, sizes = len(stores[0].paths()), [size for store in stores for size in store.written]
    writes = max(len(store.written) for store in stores)
    stores[0].compact_if_many()
    lines = stores[0].lines()
    assert lines.equals(lines_of(0, unit).select(lines.column_names))
    return {
        "most writes of a process": writes,
        "MB written": round(sum(sizes) / 1e6),
        "most files at a time": most,
        "files when all have ended": left,
        "and after the main process has merged them": len(stores[0].paths()),
        "longest write of the main process, s": round(gathering, 1),
    }


def lines_of(first: int, units: int) -> pa.Table:
    """Results of some units, which depend on the unit and the row alone."""
    unit = np.repeat(np.arange(first, first + units), ROWS_PER_UNIT)
    row = np.arange(first * ROWS_PER_UNIT, (first + units) * ROWS_PER_UNIT)
    numbers = {name: np.sin(row + place) for place, name in enumerate(("loss", "layer_29", "layer_30", "layer_31"))}
    return pa.table({UNIT: unit, **numbers, "num_tokens": row % 500})


# ---- opened


def opened(folder: Path, files: int) -> None:
    """Print how long it takes to read the folder of an interrupted pass, before and after its parts are merged."""
    store = Store(folder / "parts", "scores", {"weights": "0" * 32})
    store.open()
    for number in range(files):
        store.append(lines_of(22 * number, 22))
    show("a part for every write", store)
    begun = time.perf_counter()
    store.compact()
    seconds = time.perf_counter() - begun
    show(f"merged, in {seconds:.1f} s", store)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(store.folder)


def show(what: str, store: Store) -> None:
    seconds = []
    for read in (store.done, store.lines):
        begun = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - begun)
    size = sum(path.stat().st_size for path in store.paths()) / 1e6
    print(f"| {what} | {len(store.paths()):,} | {size:.0f} | {seconds[0]:.2f} | {seconds[1]:.2f} |", flush=True)
