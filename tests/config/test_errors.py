"""The faults of one call are told at once."""

from __future__ import annotations

import pytest

from resofilter_trainer.config import InputError, NothingError, together


def fail(error: Exception) -> None:
    raise error


def test_checks_that_all_pass():
    together(lambda: 1, lambda: None)


def test_one_error_stays_what_it_is():
    error = NothingError("Nothing.", {3: "empty"})
    with pytest.raises(NothingError) as raised:
        together(lambda: None, lambda: fail(error))
    assert raised.value is error


def test_several_errors_are_one_line_without_repeats():
    errors = [InputError("No model."), InputError("No column."), InputError("No model.")]
    with pytest.raises(InputError) as raised:
        together(*(lambda each=each: fail(each) for each in errors))
    assert str(raised.value) == "No model. No column."


def test_a_bug_is_no_fault_of_the_call():
    with pytest.raises(KeyError):
        together(lambda: fail(InputError("No model.")), lambda: fail(KeyError("bug")))
