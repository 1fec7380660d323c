"""What is wrong with one text, and what is not: numbers, code, lists and short answers end in many ways."""

from __future__ import annotations

import pytest

from resofilter_trainer.data.text_faults import (
    break_of,
    damage_of,
    echo_of,
    ends_openly,
    loop_of,
    loose_end,
    refusal_of,
    script_of,
)

LONG = "First we count the apples on the table, and then"

SOUND = [
    "18",
    "Paris",
    "The capital of France is Paris.",
    "She has 3 + 4 = 7 apples, so the answer for the whole week is\n#### 49",
    "Each of them pays 12 dollars, and so the sum of all is 36",
    "The price for all of the seats together is $1,050.00",
    "We add the two numbers and find \\boxed{\\frac{1}{2}}",
    "We add the two numbers, as was asked, and find the answer: 12 \\text{ cm}",
    "Here is the code that you have asked for:\n```python\nprint('a')\n```",
    "Here is a list of what you need:\n- apples\n- pears\n- a large bowl and a knife",
    "These are the steps to take at home:\n1. Wash the rice\n2. Boil the water and add salt",
    "| name of the town | number of people |\n|---|---|\n| Ulm | 126,000 people |",
    "He said to all of us, \u201cwe will be there tomorrow at noon.\u201d",
    "(This is all that is known about the matter today.)",
    "\u3053\u308c\u306f\u7b54\u3048\u3067\u3059\u3002",
    "What a wonderful day it was for all of us! \U0001f389",
    "def add(a, b):\n    total = a + b\n    return total",
    "You will find it with the others at https://example.org/a/b/c",
    "Use ```one line``` of code here, and then go on as you did before.",
    "~~~\n``` inside of another kind of fence, which is text\n~~~\nAnd so it ends, as it has to.",
]


@pytest.mark.parametrize("answer", SOUND)
def test_what_is_sound_is_not_cut(answer):
    assert break_of(answer) is None
    assert loose_end(answer) is None


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("Look:\n```python\nprint(1)", "ends inside a ``` block"),
        ("````\n```\na", "ends inside a ``` block"),
        ("So it is \\boxed{\\frac{1}{2}", "ends inside \\boxed{"),
        (f"{LONG} the", "ends in the middle, with 'the'"),
        (f"{LONG} the pears,", "ends in the middle, with 'pears,'"),
        (f"{LONG} we add (", "ends in the middle, with '('"),
        (
            "These are the steps to take at home:\n1. Wash the rice\n2. Boil it\n3.",
            "ends with the empty list item '3.'",
        ),
    ],
)
def test_what_breaks_off_is_cut_whatever_the_others_do(answer, says):
    assert break_of(answer) == says


def test_an_end_without_a_full_stop_is_only_loose():
    answer = "First we count the apples on the table, then the pea"
    assert break_of(answer) is None
    assert loose_end(answer) == "ends without a full stop, with 'pea'"
    assert ends_openly("the pea")
    assert loose_end("the pea") is None


@pytest.mark.parametrize(
    ("prompt", "answer", "says"),
    [
        ("say it once more", "say it once more", "is its prompt again"),
        ("hello", "hello", None),
        ("hello", "hello there, how are you?", None),
        ("one two three four five six seven eight?", "one two three four five six seven eight? Nine.", "begins with"),
        ("", "", None),
    ],
)
def test_an_echo_is_told_from_an_answer(prompt, answer, says):
    found = echo_of(prompt, answer)
    assert found is None if says is None else str(found).startswith(says)


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI language model, I have no feelings.",
        "I'm sorry, but I can't do this.",
        "I\u2019m sorry, but as an AI, I have no access.",
        "I cannot assist with that request.",
        "I am an AI and was trained on text.",
    ],
)
def test_a_refusal_is_found(answer):
    assert str(refusal_of(answer)).startswith("refuses as a model does: '")


@pytest.mark.parametrize(
    "answer",
    [
        "I cannot swim, and so I stay at home.",
        "She is sorry that she cannot come.",
        "Air is a model of a gas.",
        "The main parts are as follows.",
        "x" * 400 + " as an AI language model",
    ],
)
def test_what_people_write_is_no_refusal(answer):
    assert refusal_of(answer) is None


@pytest.mark.parametrize(
    "text", ["Caf\u00c3\u00a9", "it\u00e2\u20ac\u2122s", "a\ufffdb", "10\u00c2\u00b0", "a\x00b", "a\x85b"]
)
def test_wrongly_decoded_text_is_found(text):
    assert damage_of(text) is not None


@pytest.mark.parametrize(
    "text", ["Caf\u00e9", "N\u00c3O", "\u00c2ge", "it\u2019s 10\u00b0", "a\tb\r\nc", "\u20ac5", "\u0439\u043e\u0433"]
)
def test_rightly_decoded_text_is_not(text):
    assert damage_of(text) is None


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("so it is " * 9, "ends with 'so it is' 9 times"),
        (
            "He goes on.\n" + "The same line again.\n" * 6,
            "has the line 'The same line again.' 5 times and more in a row",
        ),
        ("no no no no no no", None),
        ("1 0 " * 30, None),
        ("}\n" * 20, None),
        ("one two three " * 3 + "end", None),
    ],
)
def test_a_loop_is_told_from_what_repeats_itself(answer, says):
    assert loop_of(answer) == says


def test_the_script_is_that_of_most_letters():
    assert script_of("The word \u043c\u0438\u0440 is Russian") == "LATIN"
    assert script_of("\u043c\u0438\u0440 is \u043c\u0438\u0440\u043d\u044b\u0439") == "CYRILLIC"
    assert script_of("\u3053\u308c\u306f\u7b54\u3048") == script_of("\u7b54\u7b54\u7b54\u7b54") == "East Asian"
    assert script_of("12 + 3 = 15 m") is None
