"""Ctrl-C as one line and an exit code. Knows signals, no command; imports nothing that takes time."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_seen: list[int] = []  # the interrupts since the outermost `interruptible` began


@contextlib.contextmanager
def interruptible(program: str) -> Iterator[None]:
    """Turn an interrupt into one line on stderr and exit code 130, whatever another library made of it.

    An interrupt inside an import may end as an ImportError, or be printed and forgotten.
    """
    unraisable = sys.unraisablehook
    replaced = _is_default()
    if replaced:
        signal.signal(signal.SIGINT, _note)
        sys.unraisablehook = lambda what: None if what.exc_type is KeyboardInterrupt else unraisable(what)
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if not _seen and not isinstance(error, KeyboardInterrupt):
            raise
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = unraisable
            _seen.clear()


def _note(number: int, frame: Any) -> None:
    _seen.append(number)
    raise KeyboardInterrupt


def _is_default() -> bool:
    """Whether an interrupt of this process raises KeyboardInterrupt, and this thread may change that."""
    here = threading.current_thread() is threading.main_thread()
    return here and signal.getsignal(signal.SIGINT) is signal.default_int_handler
