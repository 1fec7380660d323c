"""The processes of one pass: who takes the next piece, who is still at work, who is lost. Knows torch.distributed.

    take, take, take ... -> finished -> wait until all have -> go on together

A process that fails says so, and the others stop with its message. One that says nothing for too long is given up: the
others stop too, as it may hold what they would wait for.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from types import TracebackType
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

from ..config import InputError
from ..data.rows import first_line

PAUSE, LONGEST_PAUSE = 0.01, 0.2  # seconds between two looks whether all have finished
LOOKS = 10  # for signs of life, in the time of the timeout
_passes = itertools.count()  # every process makes the same passes in the same order


class Team:
    """This process among those of one pass. A context manager: on leaving it by an error, the others learn of it.

    Args:
        timeout: seconds without a sign of life, after which a process counts as lost.
        values: a `torch.distributed.Store`; by default torch's own, and nothing where there is one process.
        rank, processes: which of how many; by default this one's.
    """

    def __init__(
        self, timeout: float, values: Any = None, rank: int | None = None, processes: int | None = None
    ) -> None:
        state = PartialState()
        self.rank = state.process_index if rank is None else rank
        self.processes = state.num_processes if processes is None else processes
        self._timeout = timeout
        self._values = values
        number = next(_passes)
        if values is None and self.processes > 1:
            self._values = dist.PrefixStore(f"resofilter-{number}", dist.distributed_c10d._get_default_store())
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
        """The next of 0, 1, 2, ... that no process has taken."""
        self.beat()
        return next(self._taken) if self._values is None else self._ask("add", "taken", 1) - 1

    def beat(self) -> None:
        """A sign of life. Raises LostError where another process has failed."""
        if self._values is not None:
            self._ask("add", f"beat-{self.rank}", 1)
            self._check_failed()

    def wait(self) -> None:
        """Until every process has come this far. Raises LostError where one has failed, or is silent for too long."""
        if self._values is None:
            return
        self._ask("set", f"finished-{self.rank}", "")
        self._ask("add", "finished", 1)
        heard = {rank: (-1, time.monotonic()) for rank in range(self.processes)}
        looked, pause = time.monotonic(), PAUSE
        while self._ask("add", "finished", 0) < self.processes:
            self._check_failed()
            if time.monotonic() - looked >= self._timeout / LOOKS:  # a request for every process
                looked = time.monotonic()
                self._check_silent(heard)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _check_silent(self, heard: dict[int, tuple[int, float]]) -> None:
        """Look for a sign of life of those that have not finished, and note when there was one."""
        for rank, (beats, since) in heard.items():
            if self._ask("check", [f"finished-{rank}"]):
                heard[rank] = beats, time.monotonic()
                continue
            now = self._ask("add", f"beat-{rank}", 0)
            heard[rank] = (beats, since) if now == beats else (now, time.monotonic())
            if time.monotonic() - heard[rank][1] > self._timeout:
                raise LostError(
                    f"Process {rank} of {self.processes} has given no sign of life for {self._timeout:g} s: the pass "
                    "is given up. What is done is kept where there is an output folder; stop what is left of the run, "
                    "and start it again."
                )

    def _check_failed(self) -> None:
        if self._ask("check", ["failed"]):
            rank, _, text = self._ask("get", "failed").decode().partition(" ")
            if int(rank) != self.rank:
                raise LostError(f"Process {rank} of {self.processes} has failed: {text}")

    def _ask(self, request: str, *arguments: Any) -> Any:
        """One request to what the processes tell each other by; the process that keeps it may be gone."""
        try:
            return getattr(self._values, request)(*arguments)
        except RuntimeError as error:  # torch's DistError is one
            raise LostError(
                f"The process that keeps the others together is gone ({first_line(error)}): the pass is given up. What "
                "is done is kept where there is an output folder; start the run again."
            ) from error


class LostError(InputError):
    """Another process of the pass has failed or is silent."""
