"""The errors that tell a user what to change. Knows nothing else."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user passed cannot work; the message is one line: what, why, what to do.

    The commands print it and exit with 2. Anything else that escapes is a bug of ours.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(message.splitlines()))  # a name or another's message may have several


class NothingError(InputError):
    """None of the rows can be scored or trained on."""


class NotFiniteError(InputError):
    """A loss, a gradient or a score is no number: the weights are not sound."""
