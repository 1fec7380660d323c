"""Compares what saved results were made from with what is asked for now. Knows plain values by name.

Scores, parts of a pass, stages, checkpoints and comparisons are resumed or reused only if they were made from the same
model, rows and settings. All of them use this comparison and its wording.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from ..config import InputError

HASH = re.compile("[0-9a-f]{16,}")
SHOWN = 80  # characters of a value in a message
BUILT_IN_SOURCE = "built_in_source"  # a hash of the code of a criterion of this package
OF_ALL_ROWS = "of_all_rows"  # that the score of a row depends on all rows
# Names that earlier files lack. Where one side lacks them they count as equal: the package's version is compared, too.
ADDED = frozenset({BUILT_IN_SOURCE, OF_ALL_ROWS})


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as read from a JSON file: lists for tuples and sets, text for types that JSON lacks."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(values), default=_plain))
    return plain


def differences(there: Mapping[str, Any], here: Mapping[str, Any], names: Collection[str] | None = None) -> list[str]:
    """The values that differ, as `name (there / here)`, in alphabetical order. A missing value counts as None.

    Args:
        there: what the saved results were made from.
        here: what is asked for now.
        names: the names to compare, by default those of both sides.
    """
    mine, theirs = as_json(here), as_json(there)
    compared = sorted({*mine, *theirs} if names is None else names)
    return [
        f"{name} ({_short(theirs.get(name))} / {_short(mine.get(name))})"
        for name in compared
        if theirs.get(name) != mine.get(name) and not (name in ADDED and not (name in theirs and name in mine))
    ]


def refuse_differences(found: Collection[str], what: str, remedy: str) -> None:
    """Raise InputError if there are differences.

    Args:
        found: the differences.
        what: the place and its content, for the message: `'scores/' holds scores`.
        remedy: a sentence that says what to do.
    """
    if found:
        raise InputError(f"{what} made from something else: they differ in {'; '.join(found)} (there / here). {remedy}")


def check_made_from(
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    what: str,
    remedy: str,
    names: Collection[str] | None = None,
) -> None:
    """Raise InputError if saved results were made from other values than those asked for now.

    Args:
        there, here, names: as for `differences`.
        what, remedy: as for `refuse_differences`.
    """
    refuse_differences(differences(there, here, names), what, remedy)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _short(value: Any) -> str:
    """The value as text; the first characters are enough for a hash."""
    text = str(value)
    return text[:8] if HASH.fullmatch(text) else text[:SHOWN]
