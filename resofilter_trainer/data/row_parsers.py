"""Rows from the text of CSV and JSON files, or one line that says what is wrong. Knows Python's values, no dataset."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..config import InputError

LONGEST_CELL = 2**31 - 1
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}

Rows = Iterator[tuple[int, Any]]  # each with the number of its last line


def csv_rows(text: Iterable[str], origin: str, names: Sequence[str] | None, options: Mapping[str, Any]) -> Rows:
    """The header of a CSV file and its rows, each a list of texts; blank lines are skipped.

    Args:
        text: the lines, with their ends.
        origin: the file's name, for messages.
        names: the header, where the file has none.
        options: of Python's csv: `delimiter` and others.

    Raises:
        InputError: the header is not usable, a row has more or fewer cells, a quote is not closed, or this is no text.
    """
    limit = csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(text, strict=True, **options)
    lines = ((reader.line_num, cells) for cells in reader if cells)
    row = -1
    try:
        header = list(names) if names else next(lines, (0, None))[1]
        if header is None:
            raise InputError(f"The dataset '{origin}' has no rows.")
        _check_header(header, origin, options.get("delimiter", ","))
        yield 0, header
        for row, (line, cells) in enumerate(lines):
            if len(cells) != len(header):
                raise _refusal(
                    origin,
                    f"row {row} (line {line}) has {len(cells)} cells and the header {len(header)}. Put a cell that "
                    "contains a separator, a quote or a line break in double quotes.",
                )
            yield line, cells
    except csv.Error as error:
        where = f"row {row + 1} (line {reader.line_num})"
        raise _refusal(origin, f"{where}: {error}. Double a quote inside a quoted cell.") from error
    except UnicodeDecodeError as error:
        raise _no_text(origin, error) from error
    finally:
        csv.field_size_limit(limit)


def json_rows(text: Any, origin: str, loads: Callable[[str], Any], key: str | None = None) -> Rows:
    """The rows of a JSON file: one object a line, a list of objects, or one object (of columns, if all are lists).

    Args:
        text: the open file.
        origin: its name, for messages.
        loads: makes Python's values of JSON.
        key: where the rows are in a file that is one object.

    Raises:
        InputError: this is no JSON, or a row is no object.
    """
    line = 1
    try:
        lines = ((line, each) for line, each in enumerate(text, 1) if each.strip())
        start, first = next(lines, (0, ""))
        if key is not None or first.lstrip().startswith("["):
            whole = loads(first + text.read())
            if key is not None:
                whole = whole.get(key) if isinstance(whole, dict) else None
            yield from _listed(whole)
        elif first:
            try:
                loads(first)
            except ValueError:  # an object of several lines, or an error that this repeats
                yield from _object(loads(first + text.read()))
                return
            for line, each in itertools.chain([(start, first)], lines):
                yield line, _row(loads(each))
    except UnicodeDecodeError as error:
        raise _no_text(origin, error) from error
    except InputError as error:
        raise _refusal(origin, f"line {line}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise _refusal(origin, f"it is no JSON from line {line} on: {error}.") from error


def _listed(rows: Any) -> Rows:
    """The rows of a list; texts are rows of their own."""
    if not isinstance(rows, list):
        raise InputError("there is no list of rows.")
    if rows and all(isinstance(each, str) for each in rows):
        rows = [{"text": each} for each in rows]
    for number, each in enumerate(rows):
        if not isinstance(each, dict):
            raise InputError(f"row {number} must be an object, got {type(each).__name__}.")
        yield number, each


def _object(whole: Any) -> Rows:
    """The rows of a file that is one object of several lines: columns, if all its values are lists; else one row."""
    whole = _row(whole)
    if whole and all(isinstance(each, list) for each in whole.values()):
        if len({len(each) for each in whole.values()}) > 1:
            raise InputError("its columns have different lengths: write an object for each row.")
        names = list(whole)
        yield from ((1, dict(zip(names, values, strict=True))) for values in zip(*whole.values(), strict=True))
    else:
        yield 1, whole


def _row(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise InputError(f"a row must be an object, got {type(found).__name__}.")
    return found


def _check_header(header: Sequence[str], origin: str, separator: str) -> None:
    """Raise InputError for columns of the same or no name, and where another separator was meant."""
    twice = next((name for name in header if list(header).count(name) > 1), None)
    if twice is not None:
        raise _refusal(origin, f"two columns are named '{twice}': rename one.")
    other = next((sign for sign in SEPARATORS if sign != separator and sign in header[0]), None)
    if len(header) == 1 and other is not None:
        raise _refusal(
            origin,
            f"its only column is {header[0]!r}, so it seems to be separated by {SEPARATORS[other]}. Separate cells by "
            "commas in a .csv file, by tabs in a .tsv file.",
        )


def _no_text(origin: str, error: UnicodeDecodeError) -> InputError:
    return _refusal(origin, f"it is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.")


def _refusal(origin: str, why: str) -> InputError:
    return InputError(f"The dataset '{origin}' cannot be loaded: {why}")
