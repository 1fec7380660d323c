"""Work that the processes of a run share before a pass. Knows processes and errors, not what the work is.

An error of one process is raised in all of them, so that none waits for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..config import InputError

Unit = TypeVar("Unit")
Result = TypeVar("Result")


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
