"""The processes of one pass: which takes the next unit, which still works, which is lost. Knows torch.distributed.

    take, take, take ... -> finished -> wait until all have finished -> continue together

A process that fails sends its message, and the others stop with it. A process that sends no sign of life for too long
counts as lost, and the others stop too, because they would wait for it forever.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

from ..config import InputError
from ..data.files import first_line
from ..data.together import alone

PAUSE, LONGEST_PAUSE = 0.01, 0.2  # seconds between two checks whether all have finished
CHECKS = 10  # for signs of life, within the timeout
_passes = itertools.count()  # every process runs the same passes in the same order, but for those that it runs alone
_around: list[Team] = []  # the team that this process has left for work of its own, if any


class Team:
    """This process among those of one pass. A context manager: an error that leaves it is sent to the others.

    Args:
        timeout: seconds without a sign of life after which a process counts as lost.
        values: a `torch.distributed.Store`; by default torch's own, or none where there is a single process.
        rank, processes: the number of this process, and how many there are; by default those of the run.
    """

    def __init__(
        self, timeout: float, values: Any = None, rank: int | None = None, processes: int | None = None
    ) -> None:
        state = PartialState()
        self.rank = state.process_index if rank is None else rank
        self.processes = state.num_processes if processes is None else processes
        self._timeout = timeout
        self._values = values
        if values is None and self.processes > 1:
            store = dist.distributed_c10d._get_default_store()
            self._values = dist.PrefixStore(f"resofilter-{next(_passes)}", store)
        self._around = _around[-1] if _around and self._values is None else None
        self._taken = itertools.count()

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, LostError) and self._values is not None:
            text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(LostError):
                self._ask("set", "failed", f"{self.rank} {text}")

    def take(self) -> int:
        """Take the next of 0, 1, 2, ... that no process has taken."""
        self.beat()
        return next(self._taken) if self._values is None else self._ask("add", "taken", 1) - 1

    def beat(self) -> None:
        """Send a sign of life. Raises LostError where another process has failed."""
        if self._values is not None:
            self._ask("add", f"beat-{self.rank}", 1)
            self._check_failed()
        elif self._around is not None:
            self._around.beat()

    @property
    def writers(self) -> int:
        """How many processes write results: also those that measure apart from this one."""
        return self.processes if self._around is None else self._around.processes

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Within it, this process runs passes of its own, as if it were the only one; they send this team's beats."""
        _around.append(self)
        try:
            with alone():
                yield
        finally:
            _around.pop()

    def wait(self) -> None:
        """Wait until every process has finished. Raises LostError where one has failed or is silent for too long."""
        if self._values is None:
            return
        self._ask("set", f"finished-{self.rank}", "")
        self._ask("add", "finished", 1)
        heard = {rank: (-1, time.monotonic()) for rank in range(self.processes)}
        checked, pause = time.monotonic(), PAUSE
        while self._ask("add", "finished", 0) < self.processes:
            self._check_failed()
            if time.monotonic() - checked >= self._timeout / CHECKS:  # each check is a request for every process
                checked = time.monotonic()
                self._check_silent(heard)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _check_silent(self, heard: dict[int, tuple[int, float]]) -> None:
        """Check for signs of life of the processes that have not finished, and note when there was one."""
        for rank, (beats, since) in heard.items():
            if self._ask("check", [f"finished-{rank}"]):
                heard[rank] = beats, time.monotonic()
                continue
            now = self._ask("add", f"beat-{rank}", 0)
            heard[rank] = (beats, since) if now == beats else (now, time.monotonic())
            if time.monotonic() - heard[rank][1] > self._timeout:
                raise LostError(
                    f"Process {rank} of {self.processes} has given no sign of life for {self._timeout:g} s, and the "
                    "pass stops. The results so far are in the output folder, if there is one: stop the other "
                    "processes, and start the run again to resume."
                )

    def _check_failed(self) -> None:
        if self._ask("check", ["failed"]):
            rank, _, text = self._ask("get", "failed").decode().partition(" ")
            if int(rank) != self.rank:
                raise LostError(f"Process {rank} of {self.processes} has failed: {text}")

    def _ask(self, request: str, *arguments: Any) -> Any:
        """One request to the shared store. Raises LostError where the process that serves it is gone."""
        try:
            return getattr(self._values, request)(*arguments)
        except RuntimeError as error:  # torch's DistError is one
            raise LostError(
                f"The process that coordinates the others is gone ({first_line(error)}), and the pass stops. The "
                "results so far are in the output folder, if there is one: start the run again to resume."
            ) from error


def beat_for_team() -> None:
    """Send a sign of life to the team that this process has left for work of its own, if any."""
    if _around:
        _around[-1].beat()


class LostError(InputError):
    """Another process of the pass has failed or is silent."""
