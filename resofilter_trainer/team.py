"""The processes of one pass: who takes the next piece, who is still at work, who is lost. Knows torch.distributed.

    take, take, take ... -> finished -> wait until all have -> go on together

A process that fails says so, and the others stop with its message. One that says nothing for too long is given up: the
others stop too, as it may hold what they would wait for.
"""

from __future__ import annotations

import itertools
import time
from types import TracebackType
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

from .config import InputError

PAUSE = 0.02  # seconds between two looks at the others
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
            self._values.set("failed", f"{self.rank} {text}")

    def take(self) -> int:
        """The next of 0, 1, 2, ... that no process has taken."""
        self.beat()
        return next(self._taken) if self._values is None else self._values.add("taken", 1) - 1

    def beat(self) -> None:
        """A sign of life. Raises LostError where another process has failed."""
        if self._values is not None:
            self._values.add(f"beat-{self.rank}", 1)
            self._check_failed()

    def wait(self) -> None:
        """Until every process has come this far. Raises LostError where one has failed, or is silent for too long."""
        if self._values is None:
            return
        self._values.set(f"finished-{self.rank}", "")
        heard = {rank: (-1, time.monotonic()) for rank in range(self.processes)}
        while True:
            self._check_failed()
            waiting = [rank for rank in heard if not self._values.check([f"finished-{rank}"])]
            if not waiting:
                return
            now = time.monotonic()
            for rank in waiting:
                beats = self._values.add(f"beat-{rank}", 0)
                heard[rank] = heard[rank] if heard[rank][0] == beats else (beats, now)
            silent = [rank for rank in waiting if now - heard[rank][1] > self._timeout]
            if silent:
                raise LostError(
                    f"Process {silent[0]} of {self.processes} has given no sign of life for {self._timeout:g} s: the "
                    "pass is given up. What is done is kept where there is an output folder; stop what is left of the "
                    "run, and start it again."
                )
            time.sleep(PAUSE)

    def _check_failed(self) -> None:
        assert self._values is not None
        if self._values.check(["failed"]):
            rank, _, text = self._values.get("failed").decode().partition(" ")
            if int(rank) != self.rank:
                raise LostError(f"Process {rank} of {self.processes} has failed: {text}")


class LostError(InputError):
    """Another process of the pass has failed or is silent."""
