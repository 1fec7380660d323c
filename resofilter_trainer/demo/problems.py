"""Word problems with worked answers, of which a known share is wrong. Makes text; knows no model.

    Tom has 47 apples. Tom buys 25 more. Tom gives Ann 18. How many apples does Tom have?
    47+25=72. 72-18=54. #### 54

A wrong row is fluent and well formed, and wrong in one of three ways:

    wrong_step        one result is wrong, and the later steps continue from it    47+25=71. 71-18=53. #### 53
    wrong_final       the steps are right, and the final answer is wrong           47+25=72. 72-18=54. #### 57
    other_question    the right answer to another question                         30+12=42. #### 42
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from ..config import number, whole_number

Kind = Literal["clean", "wrong_step", "wrong_final", "other_question"]

NAMES = ("Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens")
GAINS = ("buys {n} more", "finds {n} more", "gets {n} from {friend}")
LOSSES = ("gives {friend} {n}", "loses {n}", "sells {n}")
STEPS = (2, 3, 4)
SLIPS = tuple(slip for slip in range(-10, 11) if slip)


@dataclass(frozen=True)
class Problem:
    """One row.

    Attributes:
        prompt: the story and its question, with a line break at the end.
        completion: the steps, then `#### N`; right or wrong, according to `kind`.
        answer: the right answer to the prompt, also in a wrong row.
        kind: "clean", or the way in which the completion is wrong.
    """

    prompt: str
    completion: str
    answer: int
    kind: Kind


@dataclass(frozen=True)
class Story:
    """A question and its arithmetic: the amount at the start, and the change that each sentence makes."""

    prompt: str
    start: int
    changes: tuple[int, ...]

    @property
    def amounts(self) -> list[int]:
        """The amounts at the start and after each change."""
        return list(accumulate(self.changes, initial=self.start))


def make_problems(
    num_rows: int, wrong_share: float = 0.0, seed: int = 0, exclude: Collection[str] = ()
) -> list[Problem]:
    """Generate rows in random order, `round(wrong_share * num_rows)` of them wrong, as many of each kind.

    No prompt occurs twice.

    Args:
        num_rows: the number of rows.
        wrong_share: the share of rows with a wrong completion, between 0 and 1.
        seed: the random seed.
        exclude: prompts that must not occur, such as those of the training rows.

    Raises:
        InputError: `num_rows` or `wrong_share` is out of its range.
    """
    num_rows = whole_number("num_rows", num_rows, least=0)
    wrong_share = number("wrong_share", wrong_share, least=0, most=1)
    rng = random.Random(seed)
    seen = set(exclude)
    problems = []
    for kind in _shuffled_kinds(num_rows, wrong_share, rng):
        story = _tell(rng)
        while story.prompt in seen:
            story = _tell(rng)
        seen.add(story.prompt)
        problems.append(Problem(story.prompt, COMPLETIONS[kind](story, rng), story.amounts[-1], kind))
    return problems


def _shuffled_kinds(num_rows: int, wrong_share: float, rng: random.Random) -> list[Kind]:
    wrong_kinds = get_args(Kind)[1:]
    num_wrong = round(wrong_share * num_rows)
    kinds = [wrong_kinds[i % len(wrong_kinds)] for i in range(num_wrong)] + ["clean"] * (num_rows - num_wrong)
    rng.shuffle(kinds)
    return kinds


def _tell(rng: random.Random) -> Story:
    owner, friend = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    start = amount = rng.randint(2, 99)
    sentences, changes = [f"{owner} has {start} {thing}."], []
    for _ in range(rng.choice(STEPS)):
        change = _change(amount, rng)
        amount += change
        changes.append(change)
        phrase = rng.choice(GAINS if change > 0 else LOSSES).format(n=abs(change), friend=friend)
        sentences.append(f"{owner} {phrase}.")
    sentences.append(f"How many {thing} does {owner} have?")
    return Story(" ".join(sentences) + "\n", start, tuple(changes))


def _change(amount: int, rng: random.Random) -> int:
    """A gain or a loss of 2 to 99, after which the amount is between 0 and 199."""
    gains = range(2, min(99, 199 - amount) + 1)
    losses = range(2, min(99, amount) + 1)
    if gains and losses:
        return rng.choice(gains) if rng.random() < 0.5 else -rng.choice(losses)
    return rng.choice(gains) if gains else -rng.choice(losses)


def _clean(story: Story, rng: random.Random) -> str:
    return _completion(story.amounts, story.changes)


def _wrong_step(story: Story, rng: random.Random) -> str:
    """From a random step onwards, every amount is wrong by the same slip, and none is below 0."""
    amounts = story.amounts
    first = rng.randrange(1, len(amounts))
    slip = rng.choice([slip for slip in SLIPS if min(amounts[first:]) + slip >= 0])
    slipped = amounts[:first] + [amount + slip for amount in amounts[first:]]
    return _completion(slipped, story.changes)


def _wrong_final(story: Story, rng: random.Random) -> str:
    answer = story.amounts[-1]
    return _completion(story.amounts, story.changes, rng.choice([answer + s for s in SLIPS if answer + s >= 0]))


def _other_question(story: Story, rng: random.Random) -> str:
    other = _tell(rng)
    while other.amounts[-1] == story.amounts[-1]:
        other = _tell(rng)
    return _completion(other.amounts, other.changes)


def _completion(amounts: list[int], changes: tuple[int, ...], final: int | None = None) -> str:
    """`47+25=72. 72-18=54. #### 54`; each step starts from the result of the step before."""
    steps = [f"{left}{change:+d}={right}." for left, change, right in zip(amounts, changes, amounts[1:], strict=False)]
    return " ".join([*steps, f"#### {amounts[-1] if final is None else final}"])


COMPLETIONS = {
    "clean": _clean,
    "wrong_step": _wrong_step,
    "wrong_final": _wrong_final,
    "other_question": _other_question,
}
