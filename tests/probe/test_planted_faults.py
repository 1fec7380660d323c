"""Every kind of fault: what it changes and what it leaves, where it is possible, and that seed and row decide it."""

from __future__ import annotations

import re
from collections import Counter
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resofilter_trainer.config import InputError
from resofilter_trainer.data.endings import ending_of
from resofilter_trainer.probe import texts
from resofilter_trainer.probe.examples import Example
from resofilter_trainer.probe.faults import FAULTS, plant
from resofilter_trainer.probe.own_fault import load_fault, own_fault

GSM8K = "Janet sells 16 - 3 = <<16-3=13>>13 eggs.\nShe makes 13 * 2 = $<<13*2=26>>26 a day.\n#### 26"
PIECES = [
    *("She has ", "12", "1,050", " = ", "<<16-3=13>>13", "$18.50", ". ", "\n", "\r\n", "#### 7", "x2", "-5", ".5"),
    *("שלום ", "مرحبا ", "٤٢", "é", "e\u0301", "\U0001f469\u200d\U0001f467 ", "答案是", "个。", "```py\n"),
    *("a[1,2]", "007", "The answer is 4.", "\\boxed{3/4}", "3/4"),
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
SEEDS = st.integers(0, 2**32)
OF_TEXT = {
    "number": texts.middle_number,
    "number_carried": texts.carried_number,
    "final_number": texts.final_number,
    "cut": texts.cut,
    "shuffled": texts.shuffled,
    "boilerplate": texts.with_boilerplate,
}


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pair(answer: str, prompt: str = "How many?\n", row: int = 0) -> Example:
    return Example(row, {"prompt": prompt, "completion": answer}, prompt, answer, "completion")


def chat(*texts_: str, row: int = 0) -> Example:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts_)]
    return Example(row, {"messages": messages}, "\n\n".join(texts_[:-1]), texts_[-1], "messages")


def outcomes(change, text: str) -> set[str | None]:
    return {change(text, random(seed)) for seed in range(200)}


# ---- what holds of every text


@pytest.mark.parametrize("kind", OF_TEXT)
@given(text=TEXTS, seed=SEEDS)
def test_a_changed_text_is_another_one_and_the_same_for_a_seed(kind, text, seed):
    changed = OF_TEXT[kind](text, random(seed))
    assert changed == OF_TEXT[kind](text, random(seed))
    if changed is not None and text.strip():
        assert changed != text
        assert changed.strip()
        changed.encode()  # no half of a character


@given(text=TEXTS, seed=SEEDS)
@example(text="10000000000000000000000000000", seed=294953)  # more digits than decimals are rounded to
def test_numbers_alone_change_and_keep_their_form(text, seed):
    for kind in ("number", "number_carried", "final_number"):
        changed = OF_TEXT[kind](text, random(seed))
        if changed is not None:
            assert len(changed) == len(text)
            assert [letter for letter in changed if not letter.isdecimal()] == [x for x in text if not x.isdecimal()]
            assert ending_of(text) != ending_of(changed) if kind == "final_number" else True
            assert ending_of(text) == ending_of(changed) if kind == "number" else True


@given(text=TEXTS, seed=SEEDS)
def test_a_cut_text_is_a_beginning_of_the_text(text, seed):
    short = texts.cut(text, random(seed))
    if short is not None:
        assert text.startswith(short)
        assert short == short.rstrip()
        assert text[len(short) :].strip()
        if len(text.split()) >= texts.LEAST_WORDS:
            assert 0.4 <= len(short.split()) / len(text.split()) <= 0.8
            assert text[len(short)].isspace()


@given(text=TEXTS, seed=SEEDS)
def test_a_shuffled_text_has_the_same_pieces(text, seed):
    changed = texts.shuffled(text, random(seed))
    if changed is not None:
        assert Counter(changed) == Counter(text)


@given(text=TEXTS, share=st.sampled_from([1 / 3, 2 / 3]))
def test_a_prefix_and_the_rest_are_not_blank(text, share):
    first = texts.prefix(text, share)
    if first is not None:
        assert text.startswith(first)
        assert first.strip()
        assert first == first.rstrip()
        assert text[len(first) :].strip()


# ---- numbers


@given(number=st.from_regex(r"\A(?:[1-9]\d{0,2}(?:,\d{3}){0,2}|\d{1,4})(?:\.\d{1,3})?\Z"), seed=SEEDS)
def test_another_number_is_plausible(number, seed):
    other = texts.another_number(number, random(seed))
    assert re.sub(r"\d", "0", other) == re.sub(r"\d", "0", number)
    before, after = (Decimal(each.replace(",", "")) for each in (number, other))
    assert after not in (before, 0)
    assert not re.match(r"0\d", other) or number[0] == "0"


def test_digits_stay_in_their_script():
    assert re.fullmatch("[\u0660-\u0669]{2}", texts.another_number("٤٢", random()))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("16 - 3 = <<16-3=13>>13 eggs", ["16", "3", "13"]),
        ("$1,050.00, 2.5% and .5", ["1,050.00", "2.5", ".5"]),
        ("x2, 2nd, 1.2.3, 12:30, [1,2], 3,5 and v10 are none", []),
        ("共18个", ["18"]),
        ("9*2=$<<9*2=18>>18.", ["9", "2", "18"]),
    ],
)
def test_numbers_that_a_reader_sees(text, numbers):
    assert [found.text for found in texts.numbers_of(text)] == numbers


def test_a_number_in_the_middle_changes_alone():
    found = outcomes(texts.middle_number, GSM8K)
    assert None not in found
    assert all(each.endswith("#### 26") for each in found)
    results = {each for each in found if "<<16-3=13>>13" not in each}
    assert results  # a result and the annotation that repeats it are one number
    for each in results:
        inside, seen = re.search(r"<<16-3=(\d+)>>(\d+) eggs", each).groups()
        assert inside == seen
        assert each.replace(f"{inside}>>{seen}", "13>>13") == GSM8K  # what follows is as it was
    assert any("16 - 3" not in each for each in found)


def test_a_carried_number_changes_wherever_it_is_written_later():
    found = outcomes(texts.carried_number, GSM8K)
    for each in found:
        numbers = dict(zip(re.findall(r"\d+", GSM8K), re.findall(r"\d+", each), strict=True))
        changed = {old for old, new in numbers.items() if old != new}
        assert changed in ({"13"}, {"26"})  # the numbers that a reader sees again; other steps stay as they are
    ends = {each.rsplit("#### ", 1)[1] for each in found}
    assert len(ends) > 1  # of the second result, the final answer follows
    assert any(re.search(r"=(\d\d)>>\1 eggs\.\nShe makes \1 \* 2 = \$<<\1\*2=26>>26", each) for each in found)


def test_numbers_are_followed_in_their_own_form():
    for each in outcomes(texts.carried_number, "It is 1,050 now. So 1050 in all, 3 times.\n#### 1,050"):
        found = re.fullmatch(r"It is (\S+) now. So (\S+) in all, 3 times.\n#### (\S+)", each)
        first, second, third = found.groups()
        assert second == third.replace(",", "") != "1050"
        assert first in ("1,050", third)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (GSM8K, r"(?s).*<<13\*2=26>>26 a day\.\n#### \d\d"),
        ("so 3 * 4 = 12. The answer is 12 (see 3).", r"so 3 \* 4 = 12\. The answer is \d\d \(see 3\)\."),
        (r"Thus \boxed{14}, from 3.", r"Thus \\boxed\{\d\d\}, from 3\."),
        (
            "She pays $1,050.50 in 2 parts for 5+3=<<5+3=8>>8 cards",
            r"She pays \$1,050\.50 in 2 .*<<5\+3=(\d)>>\1 cards",
        ),
        ("7", r"\d"),
    ],
)
def test_the_final_number_changes_alone(text, pattern):
    for each in outcomes(texts.final_number, text):
        assert re.fullmatch(pattern, each)
        assert ending_of(each) != ending_of(text)


@pytest.mark.parametrize(
    "text", ["", "Paris.", "As 3 was given, the answer is (B).", "no number at all in here, really"]
)
def test_no_final_number(text):
    assert texts.final_number(text, random()) is None


def test_numbers_before_an_end_that_is_none():
    assert re.fullmatch(
        r"As \d was given, the answer is \(B\)\.", texts.middle_number("As 3 was given, the answer is (B).", random())
    )


# ---- words, sentences, lines


def test_shares_that_are_cut():
    found = {len(each.split()) for each in outcomes(texts.cut, "one two three four five six seven eight nine ten")}
    assert found == {4, 5, 6, 7, 8}


def test_a_text_without_spaces_is_cut_between_letters():
    found = outcomes(texts.cut, "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往")
    assert {len(each) for each in found} == set(range(8, 17))
    assert not any(each.endswith("e") for each in outcomes(texts.cut, "e\u0301" * 20))  # a mark stays with its letter


@pytest.mark.parametrize("text", ["", "Paris.", "one two three four"])
def test_too_short_to_cut(text):
    assert texts.cut(text, random()) is None


def test_lines_or_sentences_out_of_order():
    lines = outcomes(texts.shuffled, "a = 1\r\n\r\nb = 2\r\n    c = 3")
    assert len(lines) == 5
    assert {tuple(sorted(each.split("\r\n"))) for each in lines} == {("", "    c = 3", "a = 1", "b = 2")}
    assert outcomes(texts.shuffled, "One! Two?  3.5 is three.") >= {
        "Two? One!  3.5 is three.",
        "3.5 is three. One!  Two?",
    }
    assert len(outcomes(texts.shuffled, "一。二。三。")) == 5
    assert texts.shuffled("One. Two.", random()) is None
    assert texts.shuffled("a\na\na", random()) is None


def test_boilerplate_is_put_between_lines_and_the_text_stays():
    found = outcomes(texts.with_boilerplate, "first line\nsecond line\n")
    assert {sentence for sentence in texts.BOILERPLATE for each in found if sentence in each} == set(texts.BOILERPLATE)
    for each in found:
        assert [line for line in each.splitlines() if line not in texts.BOILERPLATE] == ["first line", "second line"]
    places = {
        each.splitlines().index(line) for each in found for line in each.splitlines() if line in texts.BOILERPLATE
    }
    assert places == {0, 1, 2}


# ---- rows


def test_an_answer_is_exchanged_for_one_of_like_length_to_another_prompt():
    examples = [pair(f"answer {'x' * length}", f"prompt {length}", row) for row, length in enumerate(range(0, 300, 10))]
    same_prompt = [pair("another one of the length", "prompt 10", 30), pair("Answer  xxxxxxxxxx", "prompt 31", 31)]
    found = FAULTS["exchanged"]
    given = {found.plant(examples[1], [*examples, *same_prompt], random(seed))["completion"] for seed in range(100)}
    assert given == {examples[2].answer}  # not of its prompt, not its own words, not more than twice as long or short
    longer = {found.plant(examples[20], examples, random(seed))["completion"] for seed in range(200)}
    assert longer == {examples[row].answer for row in (18, 19, 21, 22, 17)}
    assert found.plant(examples[1], [examples[1]], random()) is None


def test_turns_of_a_chat():
    talk = chat("Hi", "Hello.", "2 + 2?", "4", "And 3?", "7")
    given = {FAULTS["other_turn"].plant(talk, [], random(seed))["messages"][-1]["content"] for seed in range(50)}
    assert given == {"Hello.", "4"}
    left = [FAULTS["lost_turn"].plant(talk, [], random(seed))["messages"] for seed in range(50)]
    said = {tuple(each["content"] for each in messages) for messages in left}
    assert said == {("2 + 2?", "4", "And 3?", "7"), ("Hi", "Hello.", "And 3?", "7")}
    for kind in ("other_turn", "lost_turn"):
        assert FAULTS[kind].plant(chat("Hi", "Hello."), [], random()) is None
        assert FAULTS[kind].plant(pair("Hello."), [], random()) is None
    assert FAULTS["other_turn"].plant(chat("Hi", "Yes.", "Really?", "yes."), [], random()) is None


def test_the_prompt_as_the_answer():
    repeat = FAULTS["repeated_prompt"].plant
    assert repeat(pair(" 4", "2 + 2?\n"), [], random()) == {"prompt": "2 + 2?\n", "completion": " 2 + 2?"}
    assert repeat(chat("Hi", "Hello.", "2 + 2?", "4"), [], random())["messages"][-1]["content"] == "2 + 2?"
    assert repeat(Example(0, {"text": "a"}, "", "a", "text"), [], random()) is None
    assert repeat(pair("how many?"), [], random()) is None


# ---- planting


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    rows = [
        f"She has {n} + 5 = <<{n}+5={n + 5}>>{n + 5} now.\nLater too.\nSo it is {n + 5}.\n#### {n + 5}"
        for n in range(20, 60)
    ]
    return [pair(answer, f"How many has she with {row}?\n", row) for row, answer in enumerate(rows)]


def test_as_many_as_asked_for_are_planted_of_every_kind_that_the_rows_allow(examples):
    planted, left_out = plant(examples, FAULTS, 12, seed=0)
    kinds = Counter(each.kind for each in planted)
    assert kinds == dict.fromkeys(set(FAULTS) - {"other_turn", "lost_turn"}, 12)
    assert left_out == {
        "other_turn": "no row has another answer earlier in the chat",
        "lost_turn": "no row has an earlier question with its answer",
    }
    for each in planted:
        assert each.faulty
        assert each.stratum == ""
        assert each.values != examples[each.row].values
        assert each.values["prompt"] == examples[each.row].prompt
        assert len({other.row for other in planted if other.kind == each.kind}) == 12
    assert planted == plant(examples, FAULTS, 12, seed=0)[0]
    assert planted != plant(examples, FAULTS, 12, seed=1)[0]


def test_what_is_done_to_a_row_does_not_depend_on_the_others(examples):
    kinds = {kind: FAULTS[kind] for kind in OF_TEXT}
    everything, few = (plant(examples[:rows], kinds, count, seed=0)[0] for rows, count in ((40, 40), (20, 10)))
    assert len(few) == 10 * len(kinds)
    assert all(each in everything for each in few)


def test_a_kind_that_few_rows_allow_is_left_out_with_the_reason(examples):
    some = [*examples[:3], *(pair("Just words.", f"Why {row}?", row) for row in range(3, 20))]
    planted, left_out = plant(some, {"final_number": FAULTS["final_number"]}, 12, seed=0)
    assert planted == []
    assert left_out == {"final_number": "only 3 of 20 rows have a number at the answer's end"}
    assert len(plant(some, {"final_number": FAULTS["final_number"]}, 3, seed=0)[0]) == 3


# ---- a user's own


def shout(row):
    return {**row, "completion": row["completion"].upper()} if row["completion"] != "4" else None


def test_a_users_own_fault():
    fault = own_fault(shout)
    assert fault.plant(pair("four"), [], random()) == {"prompt": "How many?\n", "completion": "FOUR"}
    assert fault.plant(pair("4"), [], random()) is None
    assert fault.stands_for == "what shout does"


def changed_in_place(row):
    row["completion"] += "!"
    return row


def test_a_function_may_change_the_row_it_gets():
    example = pair("four")
    assert own_fault(changed_in_place).plant(example, [], random())["completion"] == "four!"
    assert example.values["completion"] == "four"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda row: row["answer"], r"^Row 7: <lambda> fails with KeyError: 'answer'. Let it return None"),
        (
            lambda row: {"completion": "5"},
            r"^Row 7: <lambda> returns the columns completion, and the row has prompt, comp",
        ),
        (lambda row: dict(row), r"^Row 7: <lambda> returns the row as it was: return None"),
        (lambda row: "5", r"^Row 7: <lambda> returns a str, not a row"),
        (
            lambda row: {**row, "completion": 5},
            r"^Row 7: <lambda> returns a int in column 'completion', which holds a str",
        ),
    ],
)
def test_what_a_users_fault_may_not_do(function, message):
    with pytest.raises(InputError, match=message):
        own_fault(function).plant(pair("four", row=7), [], random())


def test_something_that_cannot_be_called():
    with pytest.raises(InputError, match="A function from a row to a row is needed, got a str"):
        own_fault("shout")


def test_a_fault_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def shout(row):\n    return {**row, 'completion': row['completion'].upper()}\n")
    name, fault = load_fault(f"{file}:shout")
    assert name == "shout"
    assert fault.plant(pair("four"), [], random())["completion"] == "FOUR"
    assert load_fault("copy:copy")[0] == "copy"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("mine.py", "A fault is a function, file.py:function or module:function, got 'mine.py'"),
        ("there/is/none.py:f", "There is no file there/is/none.py"),
        (
            "no_such_module:f",
            "no_such_module cannot be imported: ModuleNotFoundError: No module named 'no_such_module'. Of",
        ),
        ("{folder}/mine.py:shuot", r"There is no function 'shuot' in .*mine.py. Did you mean 'shout'\?"),
        ("{folder}/broken.py:f", "broken.py cannot be imported: ZeroDivisionError: division by zero.$"),
        ("{folder}/leaving.py:f", "leaving.py cannot be imported: SystemExit: 3.$"),
    ],
)
def test_faults_that_cannot_be_loaded(place, message, tmp_path):
    (tmp_path / "mine.py").write_text("def shout(row):\n    return row\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(InputError, match=message):
        load_fault(place.format(folder=tmp_path))
