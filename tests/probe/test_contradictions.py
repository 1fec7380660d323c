"""Rows that other answers to the same prompt contradict."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from datasets import Dataset
from trl import SFTConfig

from resofilter_trainer.probe.contradictions import contradicted, whole_prompts
from resofilter_trainer.probe.drawing import draw
from resofilter_trainer.probe.examples import Example
from resofilter_trainer.probe.faults import FAULTS
from resofilter_trainer.probe.findings import CONTRADICTED, WRITER, Rows, comparisons, records_of

ARGS = SFTConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False)


def examples(*answers: tuple[str, str]) -> list[Example]:
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in answers]
    return [Example(n, row, row["prompt"], row["completion"], "completion") for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("4 4 5", [0, 0, 1]),
        ("4 5 6", [-1, -1, -1]),  # no end is more frequent
        ("4 4 5 5", [-1, -1, -1, -1]),
        ("4 4 5 6", [0, 0, 1, 1]),
        ("4 4 5 6 7", [-1, -1, -1, -1, -1]),  # fewer than half agree
        ("4 4", [-1, -1]),  # two answers say nothing of each other
        ("4 4.0 $4", [0, 0, 0]),
    ],
)
def test_the_most_frequent_end_of_a_prompt_is_what_the_others_are_told_by(ends, expected):
    rows = examples(*(("What is 2 + 2?", f"{n}. The answer is {end}.") for n, end in enumerate(ends.split())))
    assert contradicted(rows).tolist() == expected


def test_answers_without_an_end_or_a_prompt_say_nothing():
    text = "It is a long story, and in the end nobody could say anything about it"
    rows = examples(("Q", "is 4"), ("Q", text), ("Q", "it is 4"), ("Q", "is 5"), *[("", "is 4")] * 3)
    assert contradicted(rows).tolist() == [0, -1, 0, 1, -1, -1, -1]


def test_equal_answers_count_once():
    assert contradicted(examples(("Q", "is 9"), ("Q", "is 9"), ("Q", "is 5"))).tolist() == [-1, -1, -1]
    rows = examples(("Q", "is 9"), ("Q", "is 9"), ("Q", "it is 9"), ("Q", "is 5"))
    assert contradicted(rows).tolist() == [0, 0, 0, 1]


def test_prose_says_nothing():
    tips = ["Sleep 8 hours, and walk.", "Eat well. Do it for 6 months or more.", "1. Rest.\n2. Eat.\n3. Move about."]
    assert contradicted(examples(*(("Give three tips", each) for each in tips))).tolist() == [-1, -1, -1]


def test_prompts_are_drawn_with_all_their_rows():
    order = np.array([5, 0, 3, 1, 4, 2])
    assert whole_prompts(order, {2: 0, 4: 0}, 4, 8).tolist() == [5, 0, 4, 2]
    assert whole_prompts(order, {2: 0, 4: 0}, 6, 2).tolist() == [5, 0, 4, 3, 1, 2]  # more of a prompt come last
    assert whole_prompts(order, {}, 3, 8).tolist() == [5, 0, 3]


def test_rows_that_others_contradict_are_compared_with_those_they_agree_with():
    """In the drawn rows, too: they are no right rows to plant faults in."""
    answers = [
        {"prompt": f"How many are {n} and {n}?", "completion": f"{way} of {n} and {n}. The answer is {end}."}
        for n in range(12)
        for way, end in (("Sum", 2 * n), ("The whole", 2 * n), ("Both", 2 * n + 1))
    ]
    drawn = draw(Dataset.from_list(answers), ARGS, 30, {"cut": FAULTS["cut"]}, 5, None, seed=1)
    assert len(drawn.examples) == 30
    assert drawn.contradicted.tolist() == [0, 0, 1] * 10
    assert [each.row % 3 for each in drawn.right] == [0, 1] * 10
    assert {each.row % 3 for each in drawn.planted} <= {0, 1}

    told = np.array([0, 0, 1] * 10)
    empty = np.full(30, "")
    rows = Rows(
        signals={"a": told + np.arange(30) / 1000}, directions={"a": "largest"}, lengths=np.full(30, 9.0), kind=empty,
        faulty=np.zeros(30, bool), stratum=empty, source=np.arange(30), prompt=np.arange(30) // 3, contradicted=told,
    )  # fmt: skip
    assert rows.right.tolist() == np.flatnonzero(told == 0).tolist()
    compared, left_out, _ = comparisons(rows)
    assert ([each.kind for each in compared], left_out) == ([CONTRADICTED], {})
    record = records_of(rows, compared)[0]
    assert (record["auroc"], record["faulty"], record["compared"], record["against"]) == (1.0, 10, 20, "rows")
    assert record["against"] != WRITER
    assert record["auroc_within_prompt"] == 1.0
    few = dataclasses.replace(rows, contradicted=np.where(np.arange(30) < 27, told, -1))  # nine are contradicted
    assert comparisons(few)[0] == []
