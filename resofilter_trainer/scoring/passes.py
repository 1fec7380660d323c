"""Batches measured by all processes together, with the results saved on the way. Knows processes and the store.

    batches -> chunks -> each process measures what it takes -> parts in the store -> the main process reads them all
                                                                                  -> every process gets all results

The results of a batch depend on its rows alone: not on the process that measures it, not on the batches before it, and
not on interruptions.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch.distributed as dist
import xxhash
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..config import InputError
from ..data.together import from_main as from_main
from ..data.together import table_from_main
from ..io.files import folder_lock
from ..io.store import UNIT, Store
from .distribution import guided_chunks
from .groups import as_groups_are_free
from .team import PAUSE, Team

LOST_SHARE = 1 / 50  # of the time so far that a kill may cost, within these bounds
LEAST_LOST, MOST_LOST = 1.0, 60.0  # seconds; the first is multiplied by the number of processes
MOST_UNSAVED = 1 << 26  # bytes of results in memory
GATHERED = 600.0  # seconds after which the main process merges the small parts of all processes
SEEN = ".seen-"  # begins the name of a file by which all processes see that they share a folder
APPEARS = 5.0  # seconds until it is missed


@dataclass(frozen=True)
class Parts:
    """Where a pass saves its results as it goes, so that an interrupted one resumes.

    Attributes:
        folder: a folder for the parts of this pass alone.
        what: what is measured, for error messages.
        made_of: everything that the results depend on except the batches, as plain values by name.
    """

    folder: Path
    what: str
    made_of: Mapping[str, Any]

    def store(self, sample_ids: np.ndarray, batches: Sequence[np.ndarray]) -> Store:
        """The store for these batches of these rows, and for no others."""
        digest = xxhash.xxh3_128()
        for array in (sample_ids, *batches):
            digest.update(np.int64(len(array)).tobytes() + np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return Store(self.folder, self.what, {**self.made_of, "batches": digest.hexdigest()})


MeasureBatch = Callable[[int], Mapping[str, Any]]  # a batch's number to columns with one value for each of its rows


def measure_batches(
    batches: Sequence[np.ndarray],
    costs: np.ndarray,
    measure: MeasureBatch,
    args: TrainingArguments,
    label: str,
    store: Store | None = None,
    group: dist.ProcessGroup | None = None,
) -> pa.Table:
    """Measure every batch once.

    Args:
        batches: (B,) the rows of each batch.
        costs: (B,) the cost of each batch, in tokens.
        measure: a function from a batch's number to columns with one value for each of its rows.
        args: whether to show a progress bar, and after how many seconds of silence a process counts as lost
            (`ddp_timeout`).
        label: the text of the progress bar.
        store: where to save the results, and where to find those of an interrupted pass.
        group: the processes that must measure the same number of batches, at the same time; by default each its own.

    Returns:
        In every process, one entry for each row, batch after batch; the column `unit` holds the number of its batch.

    Raises:
        InputError: `measure` raises it, here or in another process; a process is lost; or the store holds something
            else.
    """
    done = np.empty(0, dtype=np.int64) if store is None else open_store(store)
    todo = np.setdiff1d(np.arange(len(batches)), done)
    team = Team(args.ddp_timeout)
    results = _Results(store, writers=team.writers)
    with team, _bar(label, len(todo), len(done), args) as bar, results:
        shares = (
            _as_free(todo, costs[todo], team) if group is None else as_groups_are_free(todo, costs[todo], team, group)
        )
        for at, number, counts in shares:
            columns = measure(number)
            if counts:
                results.add(number, pa.table({UNIT: np.full(len(batches[number]), number), **columns}))
            bar.update(at - bar.n)
            team.beat()
        results.save()
        team.wait()
        bar.update(len(todo) - bar.n)
    table = results.of_all_processes()
    if table.num_rows != sum(map(len, batches)):
        raise InputError(_not_shared(store, table.num_rows, sum(map(len, batches))))
    return table


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Lock a folder against other runs; without a folder, do nothing. Every process waits for the main one's lock.

    Raises:
        InputError: another run writes to it, nothing can be written there, or it is not the same for every process.
    """
    with contextlib.ExitStack() as stack:
        if folder is not None:
            path = Path(folder)
            from_main(lambda: stack.enter_context(folder_lock(path)))
            _check_seen_by_all(path)
        yield


def _check_seen_by_all(folder: Path) -> None:
    """Raise InputError, in every process, where one does not see what the main process writes to a folder."""
    state = PartialState()
    if state.num_processes == 1:
        return

    def written() -> str:
        for left in folder.glob(f"{SEEN}*"):
            left.unlink()
        with tempfile.NamedTemporaryFile(prefix=SEEN, dir=folder, delete=False) as note:
            return Path(note.name).name

    note = folder / from_main(written)
    sees: list[bool] = gather_object([_appears(note)])
    if state.is_main_process:
        note.unlink()
    if not all(sees):
        raise InputError(
            f"Process {sees.index(False)} of {len(sees)} does not see what process 0 writes to '{folder}'. Every "
            "machine of the run must be able to read and write the output folder: pass the path of a shared one."
        )


def _appears(path: Path) -> bool:
    """Whether a file is there, or appears within seconds, as it may on a network's disk."""
    until = time.monotonic() + APPEARS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(PAUSE)
    return True


def open_store(store: Store) -> np.ndarray:
    """Open a store; in every process, the units that the main process finds in it."""

    def done() -> np.ndarray:
        store.open()
        return store.done()

    found: np.ndarray = from_main(done)
    return found


def _as_free(todo: np.ndarray, costs: np.ndarray, team: Team) -> Iterator[tuple[int, int, bool]]:
    """Each batch that this process takes: how many were handed out before it, its number, and True: it counts."""
    chunks = guided_chunks(costs, team.processes)
    while (taken := team.take()) < len(chunks):
        for place in range(chunks[taken].start, chunks[taken].stop):
            yield place, int(todo[place]), True


class _Results:
    """What this process has measured; saved to the store at intervals, and on leaving the context.

    Each save is one write: a part with the new results and those of earlier small parts, in whose place it is. These
    are the process's own; in the main process, from time to time, those of all processes.

    Args:
        store: where to save the results; None to keep them in memory.
        clock: a function that gives the time in seconds.
        processes, is_main: how many processes there are, and whether this is the main one; by default those of the run.
        writers: how many processes write at the same time; by default `processes`.
    """

    def __init__(
        self,
        store: Store | None,
        clock: Callable[[], float] = time.monotonic,
        processes: int | None = None,
        is_main: bool | None = None,
        writers: int | None = None,
    ) -> None:
        state = PartialState()
        self._store, self._clock = store, clock
        self._processes = state.num_processes if processes is None else processes
        self._is_main = state.is_main_process if is_main is None else is_main
        self._writers = self._processes if writers is None else writers
        self._unsaved: list[tuple[int, pa.Table]] = []
        self._bytes = 0
        self._own: list[Path] = []  # the parts that a save may merge
        self._begun = self._saved = self._gathered = clock()

    def __enter__(self) -> _Results:
        return self

    def __exit__(self, *error: Any) -> None:
        self.save()

    def add(self, number: int, results: pa.Table) -> None:
        """Add the results of a batch."""
        self._unsaved.append((number, results))
        self._bytes += results.nbytes
        now = self._clock()
        late = now - self._saved >= _interval(now - self._begun, self._writers)
        if self._store is not None and (late or self._bytes >= MOST_UNSAVED):
            if self._is_main and now - self._gathered >= GATHERED:
                self._own, self._gathered = self._store.paths(), now
            self.save()
            self._saved = now

    def save(self) -> None:
        """Write what is not yet in the store."""
        if self._store is not None and self._unsaved:
            lines = pa.concat_tables([results for _, results in self._unsaved])
            self._own = self._store.append_and_merge(lines, self._own)
            self._unsaved, self._bytes = [], 0

    def of_all_processes(self) -> pa.Table:
        """All results, ordered by unit: from the store, which the main process reads, or else from each process."""
        if self._store is not None:
            return table_from_main(self._whole)
        found = gather_object(self._unsaved) if self._processes > 1 else self._unsaved
        return pa.concat_tables([results for _, results in sorted(found, key=lambda each: each[0])])

    def _whole(self) -> pa.Table:
        assert self._store is not None, "otherwise nothing is read"
        self._store.compact_if_many()
        return self._store.lines()


def _interval(elapsed: float, processes: int) -> float:
    """Seconds between two writes of a process: short, so that a kill costs little, and long enough for the file system.

    All processes together write once a second at most, or, if there are more than 60, each of them once a minute.
    """
    return min(max(elapsed * LOST_SHARE, LEAST_LOST * processes), MOST_LOST)


def _bar(label: str, todo: int, done: int, args: TrainingArguments) -> Any:
    hidden = args.disable_tqdm or not PartialState().is_main_process
    text = f"{label} ({done} done before)" if done else label
    return tqdm(total=todo, desc=text, unit="batch", disable=hidden)


def _not_shared(store: Store | None, found: int, rows: int) -> str:
    place = "" if store is None else f" in '{store.folder}'"
    return (
        f"There are results of {found} of {rows} rows{place} after all processes have finished. Do all of them see the "
        "same folder? Every machine of the run must be able to read and write the output folder."
    )
