"""The errors that tell users what to change. Knows nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping


class InputError(ValueError):
    """Something that the user passed cannot work. The message is one line: what, why, and what to do.

    The commands print it and exit with code 2. Any other exception is a bug in this package.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(message.splitlines()))  # names and other libraries' messages may have several lines


class NothingError(InputError):
    """No row can be scored or trained on.

    Attributes:
        reasons: why each cannot, by its position in the dataset, as far as that is known.
    """

    def __init__(self, message: str = "", reasons: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = dict(reasons or {})


class NotFiniteError(InputError):
    """A loss, gradient or score is NaN or infinite: the weights are broken."""


class VersionError(InputError, ImportError):
    """A library is missing, or older than what is asked of it."""


class ScoreWarning(UserWarning):
    """Scores are to be taken with care; the message says why, and what helps."""


def together(*checks: Callable[[], object]) -> None:
    """Run checks that do not depend on each other, so that the faults of one call are told at once.

    Args:
        checks: functions that raise InputError.

    Raises:
        InputError: one of them failed, whose error it is; or several, with all their messages.
    """
    errors: list[InputError] = []
    for check in checks:
        try:
            check()
        except InputError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InputError(" ".join(dict.fromkeys(map(str, errors)))) from errors[0]
