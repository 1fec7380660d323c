"""A setting is returned in its proper type, or refused in one line."""

from __future__ import annotations

import math

import numpy as np
import pytest
from datasets import Dataset

from resofilter_trainer import (
    ColumnMapping,
    InputError,
    ResonanceCallback,
    ResonanceConfig,
    TokenCleaning,
    score_dataset,
)
from resofilter_trainer.config import at_most_one, number, one_of, share, whole_number


def test_values_are_returned_in_python_types():
    assert type(whole_number("n", np.int64(3), least=1)) is int
    assert type(number("lr", 1, above=0)) is float
    assert type(share("keep", np.float32(0.5))) is float


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: whole_number("n", 0, least=1), "n must be a whole number of at least 1, got 0."),
        (lambda: whole_number("n", True), "n must be a whole number, got True."),
        (lambda: whole_number("n", 2.0), "n must be a whole number, got 2.0."),
        (lambda: whole_number("n", 11, 1, 10), "n must be a whole number of at least 1 and at most 10, got 11."),
        (lambda: number("lr", 0, above=0), "lr must be a finite number above 0, got 0."),
        (lambda: number("lr", math.nan), "lr must be a finite number, got nan."),
        (lambda: number("lr", math.inf, least=0), "lr must be a finite number of at least 0, got inf."),
        (lambda: number("lr", "1"), "lr must be a finite number, got '1'."),
        (lambda: number("x", 2, most=1), "x must be a finite number of at most 1, got 2."),
        (lambda: share("keep", 0), "keep is the share of the rows to keep, above 0 and at most 1, got 0."),
        (lambda: share("keep", True), "keep is the share of the rows to keep, above 0 and at most 1, got True."),
        (lambda: share("k", 2, "tokens"), "k is the share of the tokens to keep, above 0 and at most 1, got 2."),
        (lambda: one_of("norm", "l1", ("l2",)), "norm must be one of 'l2', got 'l1'."),
        (lambda: at_most_one(a=1, b=None, c=2), "Pass one of a=, b= and c=, got a= and c=."),
    ],
)
def test_a_bad_value_is_refused_in_one_line(call, said):
    with pytest.raises(InputError) as refused:
        call()
    assert str(refused.value) == said


def test_the_one_setting_that_is_given():
    assert at_most_one(a=None, b=0) == "b"
    assert at_most_one(a=None, b=None) is None


@pytest.mark.parametrize(
    ("make", "wrong", "meant"),
    [
        (ResonanceConfig, "updat", "update="),
        (ResonanceConfig, "learning_rate", "There are: n_layers, update"),
        (ColumnMapping, "prompt", "prompt_column="),
        (TokenCleaning, "refrence", "reference="),
        (ResonanceCallback, "keeep", "keep="),
        (ResonanceCallback, "n_layer", "n_layers="),
    ],
)
def test_an_unknown_keyword_is_answered_with_the_nearest(make, wrong, meant):
    with pytest.raises(InputError, match=f"no argument {wrong}=.*{meant}"):
        make(**{wrong: 1})


def test_an_unknown_option_of_the_rows_is_answered_with_the_nearest(tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    for wrong, meant in (("drop_duplicate", "drop_duplicates="), ("completion_colum", "completion_column=")):
        with pytest.raises(InputError, match=f"no argument {wrong}=. Did you mean {meant}"):
            score_dataset("no model is loaded", rows, **{wrong: True})
