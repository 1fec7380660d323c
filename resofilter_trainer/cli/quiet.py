"""What other libraries say to programmers, which the users of a command need not read. Imports none of them."""

from __future__ import annotations

import logging

SPEAKING = ("bitsandbytes",)  # it misses a package as soon as it is imported


def silence_libraries() -> None:
    """Silence the notes of other libraries, best before they are imported; their errors are still shown."""
    for name in SPEAKING:
        logging.getLogger(name).setLevel(logging.ERROR)
