"""What something was made from is compared by name, and a difference is named in one line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resofilter_trainer.config import InputError
from resofilter_trainer.io.made_from import SHOWN, as_json, check_made_from, differences, refuse_differences

HASH, OTHER_HASH = "0123456789abcdef" * 2, "fedcba9876543210" * 2
WHAT, REMEDY = "'out' holds scores", "Choose another output."
plain = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)


# ---- differences


@pytest.mark.parametrize(
    ("there", "here", "found"),
    [
        ({"rows": 40}, {"rows": 41}, ["rows (40 / 41)"]),
        ({"b": 1, "a": 1, "same": 0}, {"b": 2, "a": 2, "same": 0}, ["a (1 / 2)", "b (1 / 2)"]),
        ({}, {"new": 1}, ["new (None / 1)"]),
        ({"old": 1}, {}, ["old (1 / None)"]),
        ({"weights": HASH}, {"weights": OTHER_HASH}, ["weights (01234567 / fedcba98)"]),
        ({"weights": HASH}, {}, ["weights (01234567 / None)"]),
        ({"name": "0123456789abcde"}, {"name": "x"}, ["name (0123456789abcde / x)"]),  # too short for a hash
        ({"text": "x" * 200}, {"text": "z"}, [f"text ({'x' * SHOWN} / z)"]),
        ({"a": 1}, {"a": True}, []),  # as in Python
        ({"a": "1"}, {"a": 1}, ["a (1 / 1)"]),
    ],
)
def test_differences_are_named_in_alphabetical_order(there, here, found):
    assert differences(there, here) == found


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"columns": ["a", "b"]}, {"columns": ("a", "b")}),
        ({"modules": ["k", "q"]}, {"modules": {"q", "k"}}),
        ({"modules": ["k", "q"]}, {"modules": frozenset({"q", "k"})}),
        ({"settings": {"rate": 0.5, "sizes": [1, 2]}}, {"settings": {"sizes": (1, 2), "rate": 0.5}}),
        ({}, {"group_by": None}),
        ({"group_by": None}, {}),
    ],
)
def test_values_that_a_json_file_gives_back_as_others_do_not_differ(there, here):
    assert differences(there, here) == []
    assert differences(here, there) == []


@given(st.dictionaries(st.text(max_size=3), plain, max_size=4))
def test_values_do_not_differ_from_themselves_read_from_a_file(values):
    assert differences(json.loads(json.dumps(as_json(values))), values) == []


def test_values_that_json_does_not_have_are_compared_as_text():
    assert as_json({"place": complex(1, 2), "sizes": {3, 1, 2}}) == {"place": "(1+2j)", "sizes": [1, 2, 3]}
    assert differences({"place": "(1+2j)"}, {"place": complex(1, 2)}) == []


def test_only_the_given_names_are_compared():
    there, here = {"rows": 1, "seed": 1, "lr": 1}, {"rows": 2, "seed": 2, "lr": 1}
    assert differences(there, here, names=["seed", "lr"]) == ["seed (1 / 2)"]
    assert differences(there, here, names=[]) == []
    assert differences({}, here, names=["rows", "unknown"]) == ["rows (None / 2)"]


# ---- refused


def test_the_refusal_names_place_differences_and_remedy():
    with pytest.raises(InputError) as refused:
        check_made_from({"rows": 40, "weights": HASH}, {"rows": 41, "weights": OTHER_HASH}, WHAT, REMEDY)
    assert str(refused.value) == (
        "'out' holds scores made from something else: they differ in rows (40 / 41); weights (01234567 / fedcba98) "
        "(there / here). Choose another output."
    )


def test_a_refusal_is_one_line():
    with pytest.raises(InputError, match="two lines") as refused:
        check_made_from({"name": "two\nlines"}, {}, WHAT, REMEDY)
    assert "\n" not in str(refused.value)


def test_nothing_is_refused_where_nothing_differs():
    refuse_differences([], WHAT, REMEDY)
    check_made_from({"columns": ["a"]}, {"columns": ("a",)}, WHAT, REMEDY)
    check_made_from({"rows": 1, "seed": 1}, {"rows": 2, "seed": 1}, WHAT, REMEDY, names=["seed"])
