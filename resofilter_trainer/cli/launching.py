"""A command in several processes on this machine. Knows torchrun's command line, not what the command does."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..config import InputError, whole_number

LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher tells its processes


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def say_stage(number: int, total: int, what: str) -> None:
    """Say on stderr, in the main process, what is done now: `2 of 2: scoring 2,000 rows`."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{number} of {total}: {what}", file=sys.stderr, flush=True)


def check_environment() -> None:
    """Raise InputError if the environment promises several processes, and lacks what a launcher tells each of them."""
    size, local = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_RANK", "-1")
    promises = size != "1" or local != "-1"
    missing = [name for name in LAUNCHED if name not in os.environ]
    if promises and (missing or not size.isdigit() or not local.isdigit()):
        there = ", ".join(f"{name}={os.environ[name]}" for name in LAUNCHED if name in os.environ)
        lacks = f" and no {', '.join(missing)}" if missing else ""
        raise InputError(
            f"The environment has {there}{lacks}, as no launcher does. Unset them for one process, or use "
            "--num_processes, torchrun or accelerate launch for several."
        )


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
    # after "--", torchrun does not take `--signals` for an abbreviation of an option of its own
    command = [*torchrun, "-m", "--", "resofilter_trainer.cli", *arguments]
    os.execve(sys.executable, command, environment)  # so that a signal to this process reaches the launcher
