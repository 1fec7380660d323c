"""Kinds of faults, and faults of these kinds planted in copies of rows. Knows examples, not what is measured of them.

A further kind is a record in `FAULTS`.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import texts
from .examples import Example

Plant = Callable[[Example, Sequence[Example], np.random.Generator], dict[str, Any] | None]
FEWEST = 10  # rows of a kind, below which it says nothing
PARTNERS = 5  # rows of like length, one of which gives its answer
LIKE = 2.0  # times the length, at most


@dataclass(frozen=True)
class Planted:
    """A new row for the probe.

    Attributes:
        kind: the kind of fault.
        row: the position, in the user's dataset, of the row that it was made of.
        values: the new row, with the columns of that row.
        stratum: rows are compared only with rows of the same stratum; empty for faults in texts, which are compared
            with the user's rows.
        faulty: whether it is a fault; False for a right answer that faults are compared with.
    """

    kind: str
    row: int
    values: dict[str, Any]
    stratum: str = ""
    faulty: bool = True


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        plant: a function `(example, all examples, rng)` that returns the row with a fault; None where the row does not
            allow it.
        stands_for: what real errors it is like, which is shown beside its results.
        needs: what a row needs for it, "3 sentences" for instance.
    """

    plant: Plant
    stands_for: str
    needs: str


def plant(
    examples: Sequence[Example], kinds: Mapping[str, Fault], count: int, seed: int
) -> tuple[list[Planted], dict[str, str]]:
    """Faults in copies of rows, for each kind in rows drawn at random among those that allow it.

    What is done to a row depends on the seed, the kind and the row, not on which other rows are drawn.

    Args:
        examples: the rows.
        kinds: the kinds of faults, `FAULTS` or some of them, and the user's own.
        count: the number of faults of each kind.
        seed: the random seed.

    Returns:
        The faults, and the kinds that too few rows allow, each with the reason.
    """
    found, left_out = list[Planted](), dict[str, str]()
    for kind, fault in kinds.items():
        order = np.random.default_rng([seed, zlib.crc32(kind.encode())]).permutation(len(examples))
        planted = list[Planted]()
        for place in order:
            if len(planted) == count:
                break
            example = examples[place]
            values = fault.plant(example, examples, _rng(seed, kind, example.row))
            if values is not None and values != example.values:
                planted.append(Planted(kind, example.row, values))
        if len(planted) < min(FEWEST, count):
            some = "no row has" if not planted else f"only {len(planted)} of {len(examples)} rows have"
            left_out[kind] = f"{some} {fault.needs}"
        else:
            found += planted
    return found, left_out


def _rng(seed: int, kind: str, row: int) -> np.random.Generator:
    """Random numbers of one row alone."""
    return np.random.default_rng([seed, zlib.crc32(kind.encode()), row + 1])


def _of_text(change: Callable[[str, np.random.Generator], str | None]) -> Plant:
    """A fault of the answer's text."""

    def planted(example: Example, others: Sequence[Example], rng: np.random.Generator) -> dict[str, Any] | None:
        text = change(example.answer, rng)
        return None if text is None or not text.strip() else example.with_answer(text)

    return planted


def _exchanged(example: Example, others: Sequence[Example], rng: np.random.Generator) -> dict[str, Any] | None:
    """The answer of another row, of like length and with another prompt."""
    length, own = len(example.answer), _plain(example.answer)

    def fits(other: Example) -> bool:
        alike = length <= LIKE * len(other.answer) and len(other.answer) <= LIKE * length
        return alike and _plain(other.prompt) != asked and _plain(other.answer) != own

    asked = _plain(example.prompt)
    if not asked:
        return None  # plain text answers nothing
    fitting = (other for other in others if fits(other))
    near = heapq.nsmallest(PARTNERS, fitting, key=lambda other: (abs(len(other.answer) - length), other.row))
    return example.with_answer(near[int(rng.integers(len(near)))].answer) if near else None


def _other_turn(example: Example, others: Sequence[Example], rng: np.random.Generator) -> dict[str, Any] | None:
    """The answer to an earlier turn of the same conversation."""
    said = [each["content"] for each in example.messages[:-1] if each["role"] == "assistant" and each["content"]]
    choices = [text for text in said if text.strip() and _plain(text) != _plain(example.answer)]
    return example.with_answer(choices[int(rng.integers(len(choices)))]) if choices else None


def _lost_turn(example: Example, others: Sequence[Example], rng: np.random.Generator) -> dict[str, Any] | None:
    """Without an earlier question and its answer, so that roles still alternate."""
    roles = [each["role"] for each in example.messages]
    pairs = [place for place in range(len(roles) - 2) if roles[place : place + 2] == ["user", "assistant"]]
    if not pairs:
        return None
    place = pairs[int(rng.integers(len(pairs)))]
    return example.without_messages([place, place + 1])


def _repeated_prompt(example: Example, others: Sequence[Example], rng: np.random.Generator) -> dict[str, Any] | None:
    """The question as the answer, which keeps its white space in front."""
    question, answer = example.question.strip(), example.answer
    if not question or _plain(question) == _plain(answer):
        return None
    return example.with_answer(answer[: len(answer) - len(answer.lstrip())] + question)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


FAULTS: dict[str, Fault] = {
    "exchanged": Fault(_exchanged, "wrong pairing of prompts and answers", "a prompt, and another of like length"),
    "number": Fault(
        _of_text(texts.middle_number), "a slip of the pen: later steps do not use it", "a number before the final one"
    ),
    "number_carried": Fault(
        _of_text(texts.carried_number), "a slip that later steps carry on", "a number that is repeated later"
    ),
    "final_number": Fault(
        _of_text(texts.final_number), "a wrong final answer after right steps", "a number at the answer's end"
    ),
    "cut": Fault(_of_text(texts.cut), "truncation", "an answer of 5 words"),
    "shuffled": Fault(_of_text(texts.shuffled), "corruption: sentences or lines out of order", "3 sentences or lines"),
    "other_turn": Fault(_other_turn, "wrong pairing within a conversation", "another answer earlier in the chat"),
    "lost_turn": Fault(_lost_turn, "a conversation with a turn lost", "an earlier question with its answer"),
    "boilerplate": Fault(_of_text(texts.with_boilerplate), "text of web pages and refusals put in", "an answer"),
    "repeated_prompt": Fault(_repeated_prompt, "the prompt copied as the answer", "a prompt"),
}
