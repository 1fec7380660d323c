"""Values as JSON text that `datasets.Json` reads back unchanged. Knows Python's values and datasets' types.

`Json` writes decimals with ten digits, takes text that looks like JSON for what it says ("007" for 7), and reads some
decimals with an error in the last digit: -0.7 as -0.7000000000000001, but -0.700000e0 as -0.7.
"""

from __future__ import annotations

import decimal
import json
from collections.abc import Iterator
from typing import Any

from datasets import Json, LargeList, List

from ..config import InputError
from ..config.compatibility import has

READ = Json().decode_example
DIGITS = 18  # that are read as a whole number before the point is set


def encoded(feature: Any, value: Any) -> Any:
    """A value for `datasets` to store as this feature: what becomes JSON, as text.

    Raises:
        InputError: `datasets` cannot read it back.
    """
    if value is None and isinstance(feature, Json) and not has("null among JSON"):
        return "null"
    if value is None or not has_json(feature):
        return value
    if isinstance(feature, Json):
        return as_json(value)
    if isinstance(feature, dict):
        return {name: encoded(each, value.get(name)) for name, each in feature.items()}
    return [encoded(feature.feature, each) for each in value]


def has_json(feature: Any) -> bool:
    """Whether a feature holds JSON at any depth."""
    if isinstance(feature, dict):
        return any(map(has_json, feature.values()))
    return isinstance(feature, Json) or (isinstance(feature, List | LargeList) and has_json(feature.feature))


def as_json(value: Any) -> str:
    """JSON text of a value. Raises InputError where `datasets` cannot read it back."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InputError("NaN and infinity are no JSON: write null.") from error
    return text if _is_read_as(text, value) else _spelt(value)


def _is_read_as(text: str, value: Any) -> bool:
    try:
        return bool(READ(text) == value)
    except UnicodeEncodeError:  # half a character, which is no text
        raise
    except ValueError:  # a number of too many digits
        return False


def _spelt(value: Any) -> str:
    """JSON text in which every decimal is written so that it is read unchanged."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_json(key)}: {_spelt(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_spelt, value)) + "]"
    texts = _spellings(value) if isinstance(value, float) else [json.dumps(value, ensure_ascii=False)]
    found = next((text for text in texts if _is_read_as(text, value)), None)
    if found is None:
        why = "needs more than 64 bits" if isinstance(value, int) else "cannot be stored unchanged"
        raise InputError(f"{value} {why}: write it as text.")
    return found


def _spellings(value: float) -> Iterator[str]:
    """The ways to write a decimal: as Python does; with more zeros, and with the point at any place."""
    yield float.__repr__(value)
    sign, digits, exponent = decimal.Decimal(float.__repr__(value)).as_tuple()
    for zeros in range(DIGITS + 1 - len(digits)):
        text = "".join(map(str, digits)) + "0" * zeros
        for point in range(len(text) + 1):
            power = int(exponent) - zeros + len(text) - point
            yield f"{'-' if sign else ''}{text[:point] or 0}.{text[point:] or 0}e{power}"
