"""What something on a disk was made from, compared with what is asked for now. Knows plain values by name.

Scores, parts of a pass, stages, checkpoints and comparisons are only resumed or reused where they were made from the
same model, rows and settings. The comparison and its wording are here, once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from ..config import InputError

HASH = re.compile("[0-9a-f]{16,}")
SHOWN = 80  # characters of a value


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as a JSON file gives them back: lists for tuples and sets, text for what JSON does not have."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(values), default=_plain))
    return plain


def differences(there: Mapping[str, Any], here: Mapping[str, Any], names: Collection[str] | None = None) -> list[str]:
    """What differs, as `name (there / here)`, by name in alphabetical order; empty where nothing does.

    Args:
        there: what something was made from.
        here: what is asked for now.
        names: the names to compare; by default all of both sides.
    """
    mine, theirs = as_json(here), as_json(there)
    compared = sorted({*mine, *theirs} if names is None else names)
    return [
        f"{name} ({_short(theirs.get(name))} / {_short(mine.get(name))})"
        for name in compared
        if theirs.get(name) != mine.get(name)
    ]


def refuse_differences(found: Collection[str], what: str, remedy: str) -> None:
    """Raise InputError where something differs.

    Args:
        found: the differences.
        what: the place and what it holds, for people: `'scores/' holds scores`.
        remedy: what to do, a sentence.
    """
    if found:
        raise InputError(f"{what} made from something else, they differ in {'; '.join(found)} (there / here). {remedy}")


def check_made_from(
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    what: str,
    remedy: str,
    names: Collection[str] | None = None,
) -> None:
    """Raise InputError where something was made from other values than it is asked for now.

    Args:
        there, here, names: as for `differences`.
        what, remedy: as for `refuse_differences`.
    """
    refuse_differences(differences(there, here, names), what, remedy)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _short(value: Any) -> str:
    """A hash is recognised by its beginning."""
    text = str(value)
    return text[:8] if HASH.fullmatch(text) else text[:SHOWN]
