"""Which rows are drawn, and how a user's labels are read."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from helpers.probes import QUESTIONS
from helpers.scoring import COLUMNS, arguments

from resofilter_trainer import InputError
from resofilter_trainer.probe.drawing import draw, kinds_of
from resofilter_trainer.probe.faults import FAULTS
from resofilter_trainer.probe.labels import labels_of


def test_rows_are_drawn_at_random_and_planted_rows_follow_them():
    dataset = Dataset.from_list(QUESTIONS)
    drawn = draw(dataset, arguments(), 25, kinds_of("cut, exchanged", []), 12, None, 0, **COLUMNS)
    rows = [each.row for each in drawn.examples]
    assert rows == sorted(set(rows))
    assert len(rows) == 25
    assert rows != [each.row for each in draw(dataset, arguments(), 25, {}, 12, None, 1, **COLUMNS).examples]
    together = drawn.together()
    assert len(together) == 25 + 24
    assert together[0]["completion"] == QUESTIONS[rows[0]]["answer"]
    assert [each.kind for each in drawn.planted] == ["exchanged"] * 12 + ["cut"] * 12
    assert together[25]["completion"] == drawn.planted[0].values["completion"]
    assert {each.row for each in drawn.planted} <= set(rows)


def test_messages_are_drawn_as_they_are():
    chats = [[{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
             for row in QUESTIONS]  # fmt: skip
    drawn = draw(Dataset.from_dict({"messages": chats}), arguments(), 40, kinds_of(["cut"], []), 12, None, 0)
    together = drawn.together()
    assert [row["messages"] for row in together.select(range(40))] == chats
    assert together[40]["messages"][0]["content"] == chats[drawn.planted[0].row][0]["content"]


def test_half_of_labelled_rows_are_wrong_where_there_are_enough():
    dataset = Dataset.from_list([{**row, "bad": place < 30} for place, row in enumerate(QUESTIONS * 3)])
    drawn = draw(dataset, arguments(), 40, {}, 10, "bad", 0, **COLUMNS)
    assert (len(drawn.wrong), drawn.wrong.sum(), len(drawn.right)) == (40, 20, 20)
    assert [each.row < 30 for each in drawn.examples] == drawn.wrong.tolist()
    all_of_them = draw(dataset, arguments(), 115, {}, 10, "bad", 0, **COLUMNS)
    assert (len(all_of_them.examples), all_of_them.wrong.sum()) == (115, 30)


def test_repeated_prompts_are_not_drawn_where_asked():
    dataset = Dataset.from_list(QUESTIONS * 2)
    drawn = draw(dataset, arguments(), 80, {}, 10, None, 0, drop_duplicates=True, **COLUMNS)
    assert [each.row for each in drawn.examples] == list(range(40))


def test_the_digest_tells_rows_labels_and_faults_apart():
    dataset = Dataset.from_list([{**row, "bad": place < 20} for place, row in enumerate(QUESTIONS)])
    cut = kinds_of("cut", [])
    found = [
        draw(dataset, arguments(), 40, cut, 10, None, 0, **COLUMNS),
        draw(dataset, arguments(), 40, cut, 11, None, 0, **COLUMNS),
        draw(dataset, arguments(), 39, cut, 10, None, 0, **COLUMNS),
        draw(dataset, arguments(), 40, cut, 10, "bad", 0, **COLUMNS),
        draw(dataset, arguments(), 40, cut, 10, None, 0, separator=" ", **COLUMNS),
    ]
    assert len({each.digest() for each in found}) == 5
    assert draw(dataset, arguments(), 40, cut, 10, None, 0, **COLUMNS).digest() == found[0].digest()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([True, False], [True, False]),
        ([1, 0], [True, False]),
        ([1.0, 0.0], [True, False]),
        (["Wrong", " right "], [True, False]),
        (["incorrect", "correct"], [True, False]),
        (["True", "0"], [True, False]),
    ],
)
def test_labels_in_any_form(values, expected):
    assert labels_of(Dataset.from_dict({"bad": values}), "bad").tolist() == expected


@pytest.mark.parametrize("value", [2, "maybe", None, 0.5, ""])
def test_a_value_that_is_no_label_names_its_row(value):
    values = [type(value)(1) if isinstance(value, int | float) else "1", value]
    with pytest.raises(InputError, match=r"Row 1: wrong_column 'bad' has .* Each row needs true or false, 1 or 0"):
        labels_of(Dataset.from_dict({"bad": values}), "bad")


def test_kinds_by_name_and_of_ones_own():
    assert list(kinds_of("all", [])) == list(FAULTS)
    assert list(kinds_of(["number", "cut"], [])) == ["number", "cut"]
    assert kinds_of(None, []) == {}

    def cut(row):
        return row

    with pytest.raises(InputError, match="a kind of fault named 'cut' already"):
        kinds_of(None, [cut])
    with pytest.raises(InputError, match="faults must be a list of functions"):
        kinds_of(None, cut)


def test_faults_are_as_many_as_all_kinds_can_afford():
    dataset = Dataset.from_list(QUESTIONS * 10)
    drawn = draw(dataset, arguments(), 400, kinds_of("cut", []), None, None, 0, **COLUMNS)
    assert len(drawn.planted) == 60
    many = draw(dataset, arguments(), 400, kinds_of("all", []), None, None, 0, **COLUMNS)
    counts = np.unique([each.kind for each in many.planted], return_counts=True)[1]
    assert set(counts.tolist()) == {32}
