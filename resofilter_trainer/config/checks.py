"""Checks of what a user passed, each with one message. Knows values, not what they are for."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from .errors import InputError


def token_share(keep: Any) -> float:
    """A share of tokens. Raises InputError unless it is a number above 0 and at most 1."""
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real) or not 0 < float(keep) <= 1:
        raise InputError(f"keep_tokens is the share of tokens that stays, above 0 and at most 1, got {keep}.")
    return float(keep)


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise InputError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
