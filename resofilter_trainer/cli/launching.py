"""A command in several processes on this machine. Knows torchrun's command line, not what the command does."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..config import whole_number


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_in_processes(arguments: Sequence[str], processes: int) -> None:
    """Replace this process by torchrun, which runs `resofilter` in several processes. Does not return.

    Each process has one thread, torchrun's default, unless `OMP_NUM_THREADS` is set: sums over more threads differ in
    their last digits. If a process fails, the others are stopped and the exit code is not 0. For several machines, use
    `accelerate launch -m resofilter_trainer.cli`, or torchrun.

    Args:
        arguments: the arguments of the command line.
        processes: the number of processes.

    Raises:
        InputError: the number of processes is below 1.
    """
    whole_number("--num_processes", processes, least=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
    command = [*torchrun, "-m", "resofilter_trainer.cli", *arguments]
    os.execve(sys.executable, command, environment)  # so that a signal to this process reaches the launcher
