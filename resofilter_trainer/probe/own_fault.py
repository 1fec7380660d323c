"""A user's own corruption of rows as a kind of fault. Knows functions, not what they do."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..config import InputError, nearest
from ..data.files import first_line
from .examples import Example
from .faults import Fault

Corruption = Callable[[dict[str, Any]], Mapping[str, Any] | None]


def own_fault(function: Corruption) -> Fault:
    """A kind of fault from a function that gets a copy of a row and returns it with a fault.

    Args:
        function: a function from a row under TRL's names, such as `prompt` and `completion` or `messages`, to the row
            with a fault, of the same columns; or to None where the row does not allow it.

    Raises:
        InputError: by the kind's `plant`, with the row: the function fails, or returns something else.
    """
    if not callable(function):
        raise InputError(f"A function from a row to a row is needed, got a {type(function).__name__}.")
    name = getattr(function, "__name__", type(function).__name__)

    def plant(example: Example, others: Sequence[Example], rng: np.random.Generator) -> dict[str, Any] | None:
        try:
            made = function(copy.deepcopy(example.values))
        except Exception as error:  # it is the user's
            raise InputError(
                f"Row {example.row}: {name} fails with {type(error).__name__}: {first_line(error)}. Let it return None "
                "for a row that it cannot change."
            ) from error
        if made is None:
            return None
        why = _why_not(made, example.values)
        if why:
            raise InputError(f"Row {example.row}: {name} returns {why}.")
        return dict(made)

    return Fault(plant, f"what {name} does", f"what {name} changes")


def load_fault(place: str) -> tuple[str, Fault]:
    """A user's fault from `path/to/file.py:function` or `module:function`, and its name.

    Raises:
        InputError: there is no such file, module or function, or its code fails.
    """
    source, colon, name = place.rpartition(":")
    if not colon or not source or not name:
        raise InputError(f"A fault is a function, file.py:function or module:function, got {place!r}.")
    module = _module(source)
    function = getattr(module, name, None)
    if not callable(function):
        names = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        close = nearest(name, names)
        hint = f" Did you mean {close!r}?" if close else f" It has: {', '.join(names) or 'no function'}."
        raise InputError(f"There is no function {name!r} in {source}.{hint}")
    return name, own_fault(function)


def _module(source: str) -> ModuleType:
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        raise InputError(f"There is no file {source}.")
    try:
        return _module_of_file(Path(source)) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:  # whatever the user's code does when it is imported
        hint = "" if is_file else " Of a file, pass path/to/file.py:function."
        why = f"{type(error).__name__}: {first_line(error)}".rstrip(".")
        raise InputError(f"{source} cannot be imported: {why}.{hint}") from error


def _module_of_file(path: Path) -> ModuleType:
    name = f"fault_{path.stem}"  # not the name of another module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def _why_not(made: Any, row: Mapping[str, Any]) -> str:
    """Why a result is no row with a fault; empty if it is one."""
    if not isinstance(made, Mapping):
        return f"a {type(made).__name__}, not a row: return a dict, or None for a row that it cannot change"
    if set(made) != set(row):
        return (
            f"the columns {', '.join(map(str, made)) or 'none'}, and the row has {', '.join(row)}: return all of them"
        )
    if made == row:
        return "the row as it was: return None for a row that it cannot change"
    for column, value in row.items():
        if value is not None and not isinstance(made[column], type(value)):
            return f"a {type(made[column]).__name__} in column '{column}', which holds a {type(value).__name__}"
    return ""
