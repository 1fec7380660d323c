"""A command in several processes of this machine. Knows torchrun's command line, not what the command does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from .config import InputError


def is_launched() -> bool:
    """Whether this process is one of several, or of one, that a launcher started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_in_processes(arguments: Sequence[str], processes: int) -> int:
    """Run `resofilter` with these arguments in so many processes, and wait.

    Each has one thread, as torchrun gives it, unless `OMP_NUM_THREADS` says otherwise: sums over more threads differ in
    their last digits. For several machines use `accelerate launch -m resofilter_trainer.cli`, or torchrun itself.

    Returns:
        The exit code: 0, or not where any process failed; the others are stopped then.

    Raises:
        InputError: the number of processes is below 1.
    """
    if processes < 1:
        raise InputError(f"--num_processes must be at least 1, got {processes}.")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
    done = subprocess.run([*torchrun, "-m", "resofilter_trainer.cli", *arguments], env=environment)
    return done.returncode
