"""What the values of a JSON file are, so that Arrow stores them unchanged. Knows Python's values and datasets' types.

Text stays text, a whole number stays whole, and null and a missing key are None. Values that no Arrow type holds:

- a column of plain values of several kinds (18 beside 3.5 or "about 18") is read as text, as it is written;
- objects whose keys differ, or which have such values, and plain values beside objects or lists, are stored as JSON
  (`datasets.Json`), and read as what they are.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Json, List, Value

from .exact_json import as_json

WRITTEN, UNFIT, MIXED, JSON = "as written", "unfit", "mixed", "json"  # kinds that no Python type names
Kind = Any  # None, a type, (int, smallest, largest), (list, kind), (dict, kinds by key), or one of these


class Decimal(float):
    """A decimal that knows how it is written."""

    text: str

    def __new__(cls, text: str) -> Decimal:
        """The number that a text says."""
        made = super().__new__(cls, text)
        made.text = text
        return made


def kind_of(values: Iterable[Any]) -> Kind:
    """The kind that holds all values of one place of the rows; None if all are None."""
    present = [value for value in values if value is not None]
    kinds = set(map(type, present))
    if len(kinds) > 1:
        return JSON if kinds == {dict, list} else MIXED if kinds & {dict, list} else UNFIT
    if not kinds:
        return None
    kind = kinds.pop()
    if kind is int:
        return (int, min(present), max(present))
    if kind is list:
        return _list(kind_of(itertools.chain.from_iterable(present)))
    if kind is dict:
        keys = present[0].keys()
        if not keys or any(each.keys() != keys for each in present):
            return JSON
        return _dict({key: kind_of([each[key] for each in present]) for key in keys})
    return kind


def together(one: Kind, other: Kind) -> Kind:
    """The kind that holds the values of both kinds."""
    if one is None or other is None or one == other:
        return other if one is None else one
    if isinstance(one, tuple) and isinstance(other, tuple) and one[0] is other[0]:
        if one[0] is int:
            return (int, min(one[1], other[1]), max(one[2], other[2]))
        if one[0] is list:
            return _list(together(one[1], other[1]))
        if one[1].keys() == other[1].keys():
            return _dict({key: together(one[1][key], other[1][key]) for key in one[1]})
    nested = {_is_nested(one), _is_nested(other)}
    return MIXED if len(nested) > 1 or MIXED in (one, other) else JSON if True in nested else UNFIT


def of_column(kind: Kind) -> Kind:
    """The kind of a column when all rows are known: text, or JSON beside objects or lists, where no type holds all."""
    kind = _settled(kind)
    return WRITTEN if kind == UNFIT else JSON if kind == MIXED else kind


def _settled(kind: Kind) -> Kind:
    """The kind, UNFIT for whole numbers beyond 64 bits."""
    if not isinstance(kind, tuple):
        return kind
    if kind[0] is list:
        return _list(_settled(kind[1]))
    if kind[0] is dict:
        return _dict({key: _settled(each) for key, each in kind[1].items()})
    return kind if kind[1] >= -(2**63) and kind[2] < (2**63 if kind[1] < 0 else 2**64) else UNFIT


def feature_of(kind: Kind) -> Any:
    """The type that `datasets` stores a kind as."""
    if isinstance(kind, tuple):
        if kind[0] is int:
            return Value("int64" if kind[2] < 2**63 else "uint64")
        if kind[0] is list:
            return List(feature_of(kind[1]))
        return {key: feature_of(each) for key, each in kind[1].items()}
    named = {None: "null", str: "string", WRITTEN: "string", bool: "bool", float: "float64"}
    return Json() if kind == JSON else Value(named[kind])


def stored(kind: Kind, values: Sequence[Any]) -> list[Any]:
    """Values of a kind as Arrow stores them: JSON, and plain values of several kinds, as text."""
    if kind == WRITTEN:
        return [value if value is None else _written(value) for value in values]
    if kind == JSON:
        return [value if value is None else as_json(value) for value in values]
    if not _has_json(kind):
        return list(values)
    if kind[0] is list:
        return [value if value is None else stored(kind[1], value) for value in values]
    places = [row for row, value in enumerate(values) if value is not None]
    rows: list[Any] = [value if value is None else {} for value in values]
    for key, each in kind[1].items():
        for row, value in zip(places, stored(each, [values[row][key] for row in places]), strict=True):
            rows[row][key] = value
    return rows


def _written(value: Any) -> str:
    """A plain value as JSON writes it; text as it is."""
    if isinstance(value, str):
        return value
    return value.text if isinstance(value, Decimal) else json.dumps(value)


def _list(items: Kind) -> Kind:
    return JSON if items in (UNFIT, MIXED) else (list, items)


def _dict(fields: dict[str, Kind]) -> Kind:
    return JSON if any(each in (UNFIT, MIXED) for each in fields.values()) else (dict, fields)


def _is_nested(kind: Kind) -> bool:
    return kind == JSON or (isinstance(kind, tuple) and kind[0] is not int)


def _has_json(kind: Kind) -> bool:
    if not isinstance(kind, tuple) or kind[0] is int:
        return bool(kind == JSON)
    return _has_json(kind[1]) if kind[0] is list else any(map(_has_json, kind[1].values()))
