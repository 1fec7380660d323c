"""A command in several processes of this machine. Knows torchrun's command line, not what the command does."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..config import InputError


def is_launched() -> bool:
    """Whether this process is one of several, or of one, that a launcher started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_in_processes(arguments: Sequence[str], processes: int) -> None:
    """Become torchrun, and run `resofilter` with these arguments in so many processes; does not return.

    Each has one thread, as torchrun gives it, unless `OMP_NUM_THREADS` says otherwise: sums over more threads differ in
    their last digits. The exit code is not 0 where any process failed; the others are stopped then. For several
    machines use `accelerate launch -m resofilter_trainer.cli`, or torchrun itself.

    Raises:
        InputError: the number of processes is below 1.
    """
    if processes < 1:
        raise InputError(f"--num_processes must be at least 1, got {processes}.")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
    command = [*torchrun, "-m", "resofilter_trainer.cli", *arguments]
    os.execve(sys.executable, command, environment)  # so that whoever stops this process stops the launcher
