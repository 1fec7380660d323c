"""Checks of settings. Each returns the value in its proper type, or raises an InputError that says what is wrong.

Knows values, not what they are for. NumPy numbers count as numbers, bools do not.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

from .errors import InputError

T = TypeVar("T")


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """A whole number from `least` to `most`, both included."""
    sound = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not sound or (least is not None and value < least) or (most is not None and value > most):
        raise InputError(f"{name} must be a whole number{_bounds(least, most)}, got {value!r}.")
    return int(value)


def number(
    name: str, value: Any, *, above: float | None = None, least: float | None = None, most: float | None = None
) -> float:
    """A finite number greater than `above`, at least `least` and at most `most`."""
    sound = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not sound
        or (above is not None and value <= above)
        or (least is not None and value < least)
        or (most is not None and value > most)
    ):
        raise InputError(f"{name} must be a finite number{_bounds(least, most, above)}, got {value!r}.")
    return float(value)


def share(name: str, value: Any, what: str = "rows") -> float:
    """The share of something to keep, above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) <= 1:
        raise InputError(f"{name} is the share of the {what} to keep, above 0 and at most 1, got {value!r}.")
    return float(value)


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], what: str) -> None:
    """Raise InputError unless `value` is an instance of one of `kinds`, which the message calls `what`."""
    if not isinstance(value, kinds):
        shown = f", got {value!r}" if isinstance(value, str | int | float | None) else f", got a {type(value).__name__}"
        raise InputError(f"{name} must be {what}{shown}.")


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise InputError unless `value` is one of `allowed`."""
    if value not in allowed:
        close = nearest(value, [each for each in allowed if isinstance(each, str)])
        hint = f" Did you mean {close!r}?" if close else ""
        raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.{hint}")


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known name that was probably meant by a mistyped or shortened one; None if none is like it."""
    if not isinstance(word, str) or not word:
        return None
    names = {each.lower(): each for each in known}
    longer = [each for each in names if each.startswith(word.lower())]
    close = longer if len(longer) == 1 else difflib.get_close_matches(word.lower(), names, n=1)
    return names[close[0]] if close else None


def check_keywords(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise InputError for a keyword that is not known, with the nearest one that is."""
    for name in given:
        if name not in known:
            close = nearest(name, known)
            meant = f"Did you mean {close}=?" if close else f"There are: {', '.join(known)}."
            raise InputError(f"There is no argument {name}=. {meant}")


def with_known_keywords(made: T) -> T:
    """A function or class whose unknown keywords are answered with the nearest known one (InputError)."""
    function: Any = cast(Any, made).__init__ if isinstance(made, type) else made
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    known = [each.name for each in parameters if each.kind in by_name and each.name != "self"]

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        check_keywords(keywords, known)
        return function(*args, **keywords)

    if not isinstance(made, type):
        return cast(T, checked)
    cast(Any, made).__init__ = checked
    return made


def at_most_one(**settings: object) -> str | None:
    """The name of the one setting that is not None, or None if all are. Raises InputError if more than one is set."""
    given = [name for name, value in settings.items() if value is not None]
    if len(given) > 1:
        *first, last = settings
        names = f"{'=, '.join(first)}= and {last}="
        raise InputError(f"Pass one of {names}, got {' and '.join(f'{each}=' for each in given)}.")
    return given[0] if given else None


def _bounds(least: float | None, most: float | None, above: float | None = None) -> str:
    """` above 0`, ` of at least 1 and at most 10`."""
    lower = "" if above is None else f" above {above:.15g}"
    lower += "" if least is None else f" of at least {least:.15g}"
    upper = "" if most is None else f" {'and' if lower else 'of'} at most {most:.15g}"
    return lower + upper
