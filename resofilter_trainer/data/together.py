"""Work that the processes of a run share before a pass. Knows processes and errors, not what the work is.

An error of one process is raised in all of them, so that none waits for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

from ..config import InputError

SENT = 1 << 26  # bytes of a table that are sent at a time
Unit = TypeVar("Unit")
Result = TypeVar("Result")

ONE_PROCESS = {
    "distributed_type": DistributedType.NO,
    "num_processes": 1,
    "process_index": 0,
    "local_process_index": 0,
}


def from_main(work: Callable[[], Result]) -> Result:
    """The result of `work` in the main process, in every process.

    Raises:
        InputError: `work` raises it or, where there are several processes, another error.
    """
    found: list[Any] = [None, None]
    cause = None
    if PartialState().is_main_process:
        try:
            found = [work(), None]
        except Exception as error:  # the other processes have to hear of any
            if PartialState().num_processes == 1:
                raise
            found, cause = [None, told(error)], error
    value, refused = broadcast_object_list(found)
    if refused is not None:
        raise InputError(refused) from cause
    result: Result = value
    return result


def table_from_main(read: Callable[[], pa.Table]) -> pa.Table:
    """The table that `read` gives in the main process, in every process; sent in pieces of about 64 MB.

    Raises:
        InputError: as for `from_main`.
    """
    if PartialState().num_processes == 1:
        return read()
    table = pa.table({})

    def size() -> tuple[int, int]:
        nonlocal table
        table = read()
        return table.num_rows, max(1, SENT * table.num_rows // max(1, table.nbytes))

    def piece(start: int) -> bytes:
        sink = pa.BufferOutputStream()  # of the piece alone: a pickled slice may have the bytes of the whole
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(start, step))
        return sink.getvalue().to_pybytes()

    rows, step = from_main(size)
    pieces = [from_main(partial(piece, start)) for start in range(0, max(1, rows), step)]
    if PartialState().is_main_process:
        return table
    return pa.concat_tables([pa.ipc.open_stream(each).read_all() for each in pieces])


def shared_out(units: Sequence[Unit], work: Callable[[Unit], Result]) -> list[Result]:
    """The result of `work` for every unit, in every process; each process does every n-th.

    Args:
        units: the same in every process, in the same order.
        work: a function whose results can be pickled.

    Raises:
        InputError: `work` raises it or another error, here or in another process; of several, that of the first unit.
    """
    state = PartialState()
    found: list[tuple[int, Any, str | None]] = []
    for number in range(state.process_index, len(units), state.num_processes):
        try:
            found.append((number, work(units[number]), None))
        except Exception as error:  # the other processes have to hear of any
            if state.num_processes == 1:
                raise
            found.append((number, None, told(error)))
            break
    whole = sorted(gather_object(found) if state.num_processes > 1 else found, key=lambda each: each[0])
    for _, _, refused in whole:
        if refused is not None:
            raise InputError(refused)
    return [value for _, value, _ in whole]


def told(error: Exception) -> str:
    """An error in words, for other processes."""
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def seen_by_all(path: Path) -> bool:
    """Whether every process sees a file."""
    return all(gather_object([path.exists()]))


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Accelerate's barriers do nothing here, for work of which each process does another part, or none."""
    waits = PartialState.wait_for_everyone
    PartialState.wait_for_everyone = lambda self: None
    try:
        yield
    finally:
        PartialState.wait_for_everyone = waits


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """For Accelerate, and for all that asks it, this process is the only one here: each does other work, on its device.

    Model and arguments must have their device already: arguments that are made here would take the first one.
    """
    own = {name: getattr(PartialState(), name) for name in ONE_PROCESS}
    shared = [PartialState()._shared_state, AcceleratorState._shared_state]
    before = [{name: values.get(name, own[name]) for name in ONE_PROCESS} for values in shared]
    for values in shared:
        values.update(ONE_PROCESS if values else {})
    try:
        yield
    finally:
        for values, earlier in zip(shared, before, strict=True):
            values.update(earlier if values else {})
