"""Batches taken through a measurement, by all processes together, and kept on the way. Knows processes and the store.

    batches -> chunks -> each process measures what it takes -> parts in the store -> every process gets all lines

What is measured of a batch depends on its rows alone: neither on who measures it, nor on what was measured before, nor
on interruptions. So the lines do not either.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..config import InputError
from ..io.files import folder_lock
from ..io.store import UNIT, Store
from .distribution import guided_chunks, rounds
from .team import Team

LOST_SHARE = 1 / 50  # of the work done that a kill may cost, within these bounds
LEAST_LOST, MOST_LOST = 1.0, 300.0  # seconds


@dataclass(frozen=True)
class Parts:
    """Where a pass keeps what it has done, so that it goes on there after an interruption.

    Attributes:
        folder: for its parts alone.
        what: is measured, for people.
        made_of: all that it depends on but the batches, as plain values by name.
    """

    folder: Path
    what: str
    made_of: Mapping[str, Any]

    def store(self, sample_ids: np.ndarray, batches: Sequence[np.ndarray]) -> Store:
        """For these batches of these rows and no others."""
        digest = xxhash.xxh3_128()
        for array in (sample_ids, *batches):
            digest.update(np.int64(len(array)).tobytes() + np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return Store(self.folder, self.what, {**self.made_of, "batches": digest.hexdigest()})


MeasureBatch = Callable[[int], Mapping[str, Any]]  # a batch's number to columns with a value for each of its rows


def measure_batches(
    batches: Sequence[np.ndarray],
    costs: np.ndarray,
    measure: MeasureBatch,
    args: TrainingArguments,
    label: str,
    store: Store | None = None,
    in_step: bool = False,
) -> pa.Table:
    """Measure every batch once.

    Args:
        batches: (B,) the rows of each.
        costs: (B,) of each, in tokens.
        measure: gives, of the batch with a number, columns with a value for each of its rows.
        args: whether a progress bar is shown, and after how many seconds of silence a process counts as lost
            (`ddp_timeout`).
        label: what the progress bar says.
        store: where to keep what is done, and to find what was done before.
        in_step: every process must measure as many batches, at the same time.

    Returns:
        A line for every row, batch after batch, and in a column `unit` the number of its batch; in every process.

    Raises:
        InputError: whatever `measure` raises, here or in another process; a process is lost, or the store is of
            something else.
    """
    done = np.empty(0, dtype=np.int64) if store is None else open_store(store)
    todo = np.setdiff1d(np.arange(len(batches)), done)
    kept = _Kept(store)
    with Team(args.ddp_timeout) as team, _bar(label, len(todo), len(done), args) as bar, kept:
        shares = _in_step(todo, costs[todo], team) if in_step else _as_free(todo, costs[todo], team)
        for at, number, counts in shares:
            columns = measure(number)
            if counts:
                kept.add(number, pa.table({UNIT: np.full(len(batches[number]), number), **columns}))
            bar.update(at - bar.n)
            team.beat()
        kept.save()
        team.wait()
        bar.update(len(todo) - bar.n)
    lines = kept.of_all_processes()
    if lines.num_rows != sum(map(len, batches)):
        raise InputError(_not_shared(store, lines.num_rows, sum(map(len, batches))))
    return lines


def from_main(work: Callable[[], Any]) -> Any:
    """What `work` gives in the main process, in every process; or its InputError, so that none waits."""
    found: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            found = [work(), None]
        except InputError as error:
            found = [None, str(error)]
    value, refused = broadcast_object_list(found)
    if refused is not None:
        raise InputError(refused)
    return value


@contextlib.contextmanager
def held(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Hold a folder, if there is one, against other runs; no process goes on before the main one holds it.

    Raises:
        InputError: another run writes to it, or nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        if folder is not None:
            path = Path(folder)
            from_main(lambda: stack.enter_context(folder_lock(path)))
        yield


def open_store(store: Store) -> np.ndarray:
    """The units that a store has; every process gets what the main one sees."""

    def done() -> np.ndarray:
        store.open()
        return store.done()

    found: np.ndarray = from_main(done)
    return found


def _as_free(todo: np.ndarray, costs: np.ndarray, team: Team) -> Iterator[tuple[int, int, bool]]:
    """How many batches were given out before, and those that this process takes, which all count."""
    chunks = guided_chunks(costs, team.processes)
    while (taken := team.take()) < len(chunks):
        for place in range(chunks[taken].start, chunks[taken].stop):
            yield place, int(todo[place]), True


def _in_step(todo: np.ndarray, costs: np.ndarray, team: Team) -> Iterator[tuple[int, int, bool]]:
    """The same, for processes that keep in step: a batch in each round, the last of which may not count."""
    for number, places in enumerate(rounds(costs, team.processes)):
        mine = places[team.rank]
        yield number * team.processes, int(todo[mine]), not (places[: team.rank] == mine).any()


class _Kept:
    """What this process has measured; written to the store every now and then, and when it is left."""

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._fresh: list[tuple[int, pa.Table]] = []
        self._begun = self._saved = time.monotonic()

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *error: Any) -> None:
        self.save()

    def add(self, number: int, lines: pa.Table) -> None:
        """The lines of a batch."""
        self._fresh.append((number, lines))
        now = time.monotonic()
        if self._store is not None and now - self._saved >= _interval(now - self._begun):
            self.save()
            self._saved = now

    def save(self) -> None:
        """Leave what is not in the store yet there."""
        if self._store is not None and self._fresh:
            self._store.append(pa.concat_tables([lines for _, lines in self._fresh]))
            self._fresh = []

    def of_all_processes(self) -> pa.Table:
        """Everything, by units: from the store, or from each other."""
        state = PartialState()
        if self._store is not None:
            state.wait_for_everyone()
            lines = self._store.lines()
            state.wait_for_everyone()  # before any goes on and removes it
            return lines
        found = gather_object(self._fresh) if state.num_processes > 1 else self._fresh
        return pa.concat_tables([lines for _, lines in sorted(found, key=lambda each: each[0])])


def _interval(elapsed: float) -> float:
    """Seconds between two parts: so that a kill costs little, and parts stay few."""
    return min(max(elapsed * LOST_SHARE, LEAST_LOST), MOST_LOST)


def _bar(label: str, todo: int, done: int, args: TrainingArguments) -> Any:
    hidden = args.disable_tqdm or not PartialState().is_main_process
    text = f"{label} ({done} done before)" if done else label
    return tqdm(total=todo, desc=text, unit="batch", disable=hidden)


def _not_shared(store: Store | None, found: int, rows: int) -> str:
    place = "" if store is None else f" in '{store.folder}'"
    return (
        f"There are {found} lines of {rows}{place} after all processes have ended: do all of them see the same folder? "
        "An output folder must lie where every machine of the run can read and write it."
    )
