"""What a launcher says in the environment of each of its processes."""

from __future__ import annotations

import os


def launched_here() -> int:
    """The number of processes that were launched on this machine; 1 where nobody says it."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(int(told), 1) if told.isdecimal() else 1
