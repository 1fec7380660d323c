"""Word problems with worked answers, a known share of them wrong. Knows nothing of models: makes text.

    Tom has 47 apples. Tom buys 25 more. Tom gives Ann 18. How many apples does Tom have?
    47+25=72. 72-18=54. #### 54

A wrong row is fluent and well formed, and wrong in one of three ways:

    wrong_step        one result slips, and the steps after it go on from there     47+25=71. 71-18=53. #### 53
    wrong_final       the steps are right, the final answer is not                  47+25=72. 72-18=54. #### 57
    other_question    the right answer, to another question                         30+12=42. #### 42
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from ..config import InputError

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
        prompt: story and question; ends in a line break.
        completion: worked steps, then `#### N`. In a wrong row these are the wrong ones.
        answer: the true answer of the prompt, also where the completion is wrong.
        kind: "clean", or how the completion is wrong.
    """

    prompt: str
    completion: str
    answer: int
    kind: Kind


@dataclass(frozen=True)
class Story:
    """A question and the arithmetic behind it: what there is at first, and by how much each sentence changes it."""

    prompt: str
    start: int
    changes: tuple[int, ...]

    @property
    def amounts(self) -> list[int]:
        """How many there are at first and after each change."""
        return list(accumulate(self.changes, initial=self.start))


def make_problems(
    num_rows: int, wrong_share: float = 0.0, seed: int = 0, exclude: Collection[str] = ()
) -> list[Problem]:
    """Rows in random order, `round(wrong_share * num_rows)` of them wrong, the three kinds in equal parts.

    Args:
        num_rows: how many rows.
        wrong_share: share of rows with a wrong completion, between 0 and 1.
        seed: the same seed gives the same rows.
        exclude: prompts that must not occur, such as those trained on. No prompt occurs twice either way.
    """
    if num_rows < 0 or not 0 <= wrong_share <= 1:
        raise InputError(
            f"num_rows must be at least 0 and wrong_share between 0 and 1, got {num_rows} and {wrong_share}."
        )
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
    """A gain or a loss of 2 to 99 that leaves between 0 and 199."""
    gains = range(2, min(99, 199 - amount) + 1)
    losses = range(2, min(99, amount) + 1)
    if gains and losses:
        return rng.choice(gains) if rng.random() < 0.5 else -rng.choice(losses)
    return rng.choice(gains) if gains else -rng.choice(losses)


def _clean(story: Story, rng: random.Random) -> str:
    return _completion(story.amounts, story.changes)


def _wrong_step(story: Story, rng: random.Random) -> str:
    """From a random step on, every amount is off by the same slip; none falls below 0."""
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
    """`47+25=72. 72-18=54. #### 54`; each step starts from the amount the one before it wrote down."""
    steps = [f"{left}{change:+d}={right}." for left, change, right in zip(amounts, changes, amounts[1:], strict=False)]
    return " ".join([*steps, f"#### {amounts[-1] if final is None else final}"])


COMPLETIONS = {
    "clean": _clean,
    "wrong_step": _wrong_step,
    "wrong_final": _wrong_final,
    "other_question": _other_question,
}
