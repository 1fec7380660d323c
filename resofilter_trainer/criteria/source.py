"""A function's code as text, to notice when it changes. Knows functions, not what they compute."""

from __future__ import annotations

import functools
import inspect
import textwrap
from types import CodeType, FunctionType
from typing import Any


def code_of(function: Any) -> str:
    """The code of anything that can be called, the same in every process and run.

    A function is its source; without a source its bytecode, and without both its name. A lambda is its bytecode, as its
    source is the whole line. An instance is its class, without its attributes. Plain values and functions in a partial,
    a closure or the defaults count; other functions that the code calls do not.
    """
    return _callable(function, ())


def _callable(function: Any, callers: tuple[int, ...]) -> str:
    if id(function) in callers:
        return "recursion"
    callers = (*callers, id(function))
    if isinstance(function, functools.partial):
        texts = _callable(function.func, callers), _value(function.args, callers), _value(function.keywords, callers)
        return f"partial {' '.join(texts)}"
    if inspect.ismethod(function):
        return f"{_callable(function.__self__, callers)} {_callable(function.__func__, callers)}"
    function = inspect.unwrap(function)
    if isinstance(function, FunctionType):
        return _function(function, callers)
    if inspect.isclass(function):
        return _class(function, callers)
    kind = type(function)
    caller = next((base for base in kind.__mro__ if "__call__" in vars(base)), kind)
    return " ".join([_name(function), *(_class(each, callers) for each in dict.fromkeys((kind, caller)))])


def _function(function: FunctionType, callers: tuple[int, ...]) -> str:
    code = None if function.__name__ == "<lambda>" else _source(function)
    if code is None:
        code = _instructions(function.__code__)
    return f"{code} {_value((function.__defaults__, function.__kwdefaults__, _closure(function)), callers)}"


def _class(kind: type, callers: tuple[int, ...]) -> str:
    source = _source(kind)
    if source is None:
        functions = [each for _, each in sorted(vars(kind).items()) if isinstance(each, FunctionType)]
        source = " ".join([_name(kind), *(_callable(each, callers) for each in functions)])
    return source


def _source(code: Any) -> str | None:
    """None for code that was typed at a prompt, made by `exec` or compiled from another language."""
    try:
        return textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError):
        return None


def _instructions(code: CodeType) -> str:
    constants = [_instructions(each) if isinstance(each, CodeType) else _value(each, ()) for each in code.co_consts]
    return f"{code.co_name} {code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _closure(function: FunctionType) -> dict[str, Any]:
    values = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # empty: the name has no value yet
            continue
    return values


def _value(value: Any, callers: tuple[int, ...]) -> str:
    """A plain value as it is written, a function as its code, anything else as its type."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if id(value) in callers:
        return "recursion"
    inner = (*callers, id(value))
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(each, inner) for each in value)}]"
    if isinstance(value, set | frozenset):
        return f"[{', '.join(sorted(_value(each, inner) for each in value))}]"
    if isinstance(value, functools.partial) or inspect.isroutine(value):
        return _callable(value, callers)
    return _name(type(value))


def _name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__} {getattr(value, '__name__', '')}"  # numpy's have a __name__ only
