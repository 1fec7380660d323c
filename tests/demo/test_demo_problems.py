"""Clean rows are right, wrong rows are wrong as their kind says, and the same seed gives the same rows."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from resofilter_trainer.config import InputError
from resofilter_trainer.demo.problems import Problem, make_problems
from resofilter_trainer.evaluation.metrics.final_answer import final_answer

CHANGES = re.compile(r"(buys|finds|gets|gives|loses|sells) (?:[A-Z][a-z]+ )?(\d+)")
STEPS = re.compile(r"(\d+)([+-])(\d+)=(\d+)\.")


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return make_problems(1000, wrong_share=0.4, seed=3)


def of_kind(problems: list[Problem], kind: str) -> list[Problem]:
    return [problem for problem in problems if problem.kind == kind]


def amounts_told(prompt: str) -> list[int]:
    """The amount at the start and after each sentence, read from the story."""
    amounts = [int(re.search(r"has (\d+)", prompt).group(1))]
    for verb, amount in CHANGES.findall(prompt):
        amounts.append(amounts[-1] + int(amount) * (1 if verb in ("buys", "finds", "gets") else -1))
    return amounts


def amounts_worked(completion: str) -> list[int]:
    steps = STEPS.findall(completion)
    return [int(steps[0][0])] + [int(result) for *_, result in steps]


def steps_are_right(completion: str) -> bool:
    return all(int(left) + int(sign + right) == int(result) for left, sign, right, result in STEPS.findall(completion))


def test_answer_is_true_in_every_row(problems):
    assert all(amounts_told(problem.prompt)[-1] == problem.answer >= 0 for problem in problems)


def test_clean_rows_are_right(problems):
    for problem in of_kind(problems, "clean"):
        assert amounts_worked(problem.completion) == amounts_told(problem.prompt)
        assert steps_are_right(problem.completion)
        assert final_answer(problem.completion) == problem.answer


def test_every_wrong_row_ends_in_a_wrong_answer(problems):
    for problem in problems:
        assert (final_answer(problem.completion) == problem.answer) == (problem.kind == "clean")


def test_wrong_step_has_one_false_step_and_continues_from_it(problems):
    for problem in of_kind(problems, "wrong_step"):
        steps = STEPS.findall(problem.completion)
        false = [int(left) + int(sign + right) != int(result) for left, sign, right, result in steps]
        assert sum(false) == 1
        assert all(before[3] == after[0] for before, after in itertools.pairwise(steps))
        assert final_answer(problem.completion) == int(steps[-1][3])


def test_wrong_final_has_right_steps(problems):
    for problem in of_kind(problems, "wrong_final"):
        assert amounts_worked(problem.completion) == amounts_told(problem.prompt)
        assert steps_are_right(problem.completion)


def test_other_question_is_right_for_another_story(problems):
    for problem in of_kind(problems, "other_question"):
        assert amounts_worked(problem.completion) != amounts_told(problem.prompt)
        assert steps_are_right(problem.completion)
        assert final_answer(problem.completion) == amounts_worked(problem.completion)[-1]


@pytest.mark.parametrize(("num_rows", "wrong_share"), [(0, 0.4), (1, 1.0), (7, 0.4), (100, 0.0), (301, 0.37)])
def test_share_is_exact_and_kinds_are_even(num_rows, wrong_share):
    kinds = Counter(problem.kind for problem in make_problems(num_rows, wrong_share, seed=0))
    clean = kinds.pop("clean", 0)
    assert clean == num_rows - round(wrong_share * num_rows)
    assert sum(kinds.values()) == num_rows - clean
    counts = [kinds[kind] for kind in ("wrong_step", "wrong_final", "other_question")]
    assert max(counts) - min(counts) <= 1


def test_same_seed_same_rows_other_seed_other_rows(problems):
    assert make_problems(1000, wrong_share=0.4, seed=3) == problems
    assert make_problems(1000, wrong_share=0.4, seed=4) != problems


def test_wrong_rows_are_spread_over_the_set(problems):
    first_half = [problem.kind != "clean" for problem in problems[:500]]
    assert 150 < sum(first_half) < 250


def test_no_prompt_occurs_twice_or_is_excluded(problems):
    prompts = {problem.prompt for problem in problems}
    assert len(prompts) == len(problems)
    held_out = make_problems(1000, wrong_share=0.4, seed=3, exclude=prompts)
    assert prompts.isdisjoint(problem.prompt for problem in held_out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rows": -1}, "num_rows must be a whole number of at least 0, got -1"),
        (
            {"num_rows": 5, "wrong_share": 1.2},
            "wrong_share must be a finite number of at least 0 and at most 1, got 1.2",
        ),
        (
            {"num_rows": 5, "wrong_share": -0.1},
            "wrong_share must be a finite number of at least 0 and at most 1, got -0.1",
        ),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_problems(**arguments)


@pytest.mark.parametrize(
    ("completion", "answer"), [("1+2=3. #### 3", 3), ("#### 3 #### 14", 14), ("1+2=3.", None), ("", None)]
)
def test_final_answer(completion, answer):
    assert final_answer(completion) == answer


def test_no_held_out_problem_is_one_that_the_base_was_trained_on() -> None:
    # recipes/pretrain_demo_base.py: 1,750 batches of 32, drawn 3,200 at a time from the seeds after its own
    trained_on = {problem.prompt for draw in range(1, 19) for problem in make_problems(3200, seed=1_000_000_000 + draw)}
    for seed in range(5):
        held_out = make_problems(400, seed=1_000_000 + seed)
        assert not trained_on & {problem.prompt for problem in held_out}
