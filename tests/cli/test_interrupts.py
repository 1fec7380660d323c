"""Ctrl-C at any moment: one line, exit code 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from resofilter_trainer.cli.interrupts import interruptible

pytestmark = pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="Ctrl-C is ignored here, as in a shell's background jobs"
)
CODE = """
import builtins, os, signal, sys
imported = builtins.__import__
def slow(name, *more, **others):
    if name.split(".")[0] == {name!r}:
        builtins.__import__ = imported
        {what}
    return imported(name, *more, **others)
builtins.__import__ = slow
from resofilter_trainer.cli import main
main(["score", "--model", "m", "--dataset", "d", "--output", "o"])
"""
KILL = "os.kill(os.getpid(), signal.SIGINT)"
AS_IMPORT_ERROR = f"""try:
            {KILL}
        except KeyboardInterrupt:
            raise ImportError("a library that says something else")"""


@pytest.mark.parametrize("what", [KILL, AS_IMPORT_ERROR], ids=["plain", "as ImportError"])
@pytest.mark.parametrize(("name", "program"), [("entry", "resofilter"), ("torch", "resofilter score")])
def test_an_interrupted_import_is_one_line(name, program, what, tmp_path):
    """Of the command's own modules, and of what the command imports when it runs."""
    code = CODE.format(name=name, what=what)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{program}: interrupted\n")


def test_an_interrupt_that_a_finalizer_swallows_is_not_printed(capsys):
    class Swallows:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    with interruptible("x"):
        Swallows()
    assert capsys.readouterr().err == ""


def test_only_interrupts_are_turned_into_a_line(capsys):
    with pytest.raises(KeyError), interruptible("x"):
        raise KeyError("a bug")
    with pytest.raises(SystemExit) as stopped, interruptible("x"):
        raise SystemExit(2)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ""


def test_the_handler_is_that_of_before_afterwards():
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with pytest.raises(SystemExit) as stopped, interruptible("x"), interruptible("y"):
        os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.code == 130
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before
