"""The commands of `resofilter`. Knows arguments and files; the other packages do the work."""

from __future__ import annotations

from collections.abc import Sequence

from .interrupts import interruptible


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Invalid input ends it with one line and exit code 2, an interrupt with exit code 130."""
    with interruptible("resofilter"):  # also while Python is still importing
        from .entry import main as run

        run(argv)
