"""A program of several processes, started as a user would start it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def torchrun(module: str, *arguments: object, processes: int = 2) -> str:
    """Run `helpers.<module>` in several processes; returns what they print. All of them end with the launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, "-m", f"helpers.{module}", *map(str, arguments)]
    done = subprocess.run(command, timeout=1200, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
