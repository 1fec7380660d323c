"""The checks of texts that need no model: each a function from the texts of all rows to what it finds. Knows no file.

A new check is a function here and a line in `CHECKS`; what it looks for in one text is in `text_faults`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .repeated_texts import digests, first_of, near_duplicates, odd_endings, plain
from .text_faults import break_of, damage_of, echo_of, ends_openly, loop_of, loose_end, prose, refusal_of, script_of

USUAL = 1 / 3  # of the answers, at most: where more end without a full stop, this says nothing
NEARLY_ALL = 0.95  # of the answers have the usual script
OTHER = "\0"  # in a reason: the number of the other row


@dataclass(frozen=True)
class Texts:
    """The texts of N rows.

    Attributes:
        prompts, answers: what is asked, with the messages before the last; and what is learnt.
        questions: the last message of each prompt.
        extras: tools and the like, as text.
        empty: the rows with nothing to learn, or with an empty prompt.
    """

    prompts: list[str]
    questions: list[str]
    answers: list[str]
    extras: list[str]
    empty: dict[int, str]

    def __len__(self) -> int:
        return len(self.answers)


@dataclass(frozen=True)
class Found:
    """What a check has found in a row: a reason in words, in which `OTHER` stands for the row that it names, if any."""

    reason: str
    other: int | None = None


@dataclass(frozen=True)
class Check:
    """A check of texts.

    Attributes:
        find: what is found, by row.
        says: what it looks for.
        remedy: what to do about it.
        drops: whether its rows are dropped unless checks are named.
        names: whether it names another row for each.
    """

    find: Callable[[Texts], dict[int, Found]]
    says: str
    remedy: str
    drops: bool = True
    names: bool = False


def exact_duplicates(texts: Texts) -> dict[int, Found]:
    """The rows whose prompt and answer an earlier row has, but for white space."""
    return {row: Found(f"repeats row {OTHER}", other) for row, other in _repeats(texts).items()}


def near_duplicate_rows(texts: Texts) -> dict[int, Found]:
    """The rows that are like an earlier one; see `repeated_texts`."""
    pairs = list(zip([a + b for a, b in zip(texts.prompts, texts.extras, strict=True)], texts.answers, strict=True))
    found = near_duplicates(pairs, but=[*_repeats(texts), *texts.empty])
    return {
        row: Found(f"is like row {OTHER} ({100 * alike:.0f} % of the word trigrams)", other)
        for row, (other, alike) in found.items()
    }


def contradictions(texts: Texts) -> dict[int, Found]:
    """The rows whose answer ends otherwise than those of other rows with the same prompt."""
    prompts = [
        f"{prompt}\0{extra}" if extra else prompt for prompt, extra in zip(texts.prompts, texts.extras, strict=True)
    ]
    found = odd_endings(prompts, texts.answers)
    return {
        row: Found(f"ends with {own[:40]}, and row {OTHER} with {usual[:40]}, to the same prompt", other)
        for row, (other, own, usual) in found.items()
    }


def cut_answers(texts: Texts) -> dict[int, Found]:
    """The answers that break off; or that end without a full stop, where most end with one."""
    found = _each(texts.answers, break_of)
    long = [answer for answer in texts.answers if prose(answer)]
    if sum(map(ends_openly, long)) <= USUAL * len(long):
        found = _each(texts.answers, loose_end) | found
    return found


def empty_texts(texts: Texts) -> dict[int, Found]:
    """The rows without an answer, or without a prompt."""
    return {row: Found(reason) for row, reason in texts.empty.items()}


def echoes(texts: Texts) -> dict[int, Found]:
    """The answers that repeat their prompt."""
    pairs = zip(texts.questions, texts.answers, strict=True)
    found = {row: echo_of(plain(asked), plain(answer)) for row, (asked, answer) in enumerate(pairs) if asked}
    return {row: Found(reason) for row, reason in found.items() if reason is not None}


def refusals(texts: Texts) -> dict[int, Found]:
    """The answers in which a model refuses, or speaks of itself."""
    return _each(texts.answers, refusal_of)


def odd_scripts(texts: Texts) -> dict[int, Found]:
    """The answers in another script than nearly all others."""
    scripts = [script_of(answer) for answer in texts.answers]
    counts = Counter(each for each in scripts if each is not None)
    usual, count = counts.most_common(1)[0] if counts else ("", 0)
    if count < NEARLY_ALL * counts.total():
        return {}
    share = 100 * count / max(counts.total(), 1)
    return {
        row: Found(f"is in {script.title()} script, and {share:.3g} % of the answers in {usual.title()}")
        for row, script in enumerate(scripts)
        if script not in (None, usual)
    }


def damaged(texts: Texts) -> dict[int, Found]:
    """The rows with characters that come from a wrong decoding."""
    of_prompts = {row: Found(f"the prompt {found.reason}") for row, found in _each(texts.prompts, damage_of).items()}
    return of_prompts | _each(texts.answers, damage_of)


def loops(texts: Texts) -> dict[int, Found]:
    """The answers that repeat a line or words again and again."""
    return _each(texts.answers, loop_of)


CHECKS: dict[str, Check] = {
    "exact_duplicate": Check(
        exact_duplicates, "repeats an earlier row", "Drop them: what is there twice counts twice.", names=True
    ),
    "near_duplicate": Check(
        near_duplicate_rows, "is nearly an earlier row", "Look at a few, and drop them.", names=True
    ),
    "endings_differ": Check(
        contradictions,
        "answers to the same prompt end differently",
        "At most one is right: look at them, or select one row of each prompt.",
        drops=False,
        names=True,
    ),
    "cut": Check(cut_answers, "the answer is cut", "Drop them, or generate them again with more tokens."),
    "empty": Check(empty_texts, "there is no answer or no prompt", "Drop or complete them."),
    "echo": Check(echoes, "the answer repeats the prompt", "Remove the prompt from the answer, or drop the row."),
    "refusal": Check(refusals, "a model refuses", "Drop them, unless they are meant."),
    "odd_script": Check(
        odd_scripts,
        "the answer is in another script than nearly all",
        "Look at them: translations may be meant.",
        drops=False,
    ),
    "damaged": Check(damaged, "characters are wrongly decoded", "Decode the texts again, as UTF-8, or drop them."),
    "loop": Check(loops, "the answer repeats itself again and again", "Drop them: a model ran in a loop."),
}


def _repeats(texts: Texts) -> dict[int, int]:
    """The rows that repeat an earlier one, each with the first; rows without an answer are empty, and no repeats."""
    columns = zip(texts.prompts, texts.extras, texts.answers, strict=True)
    return {row: other for row, other in first_of(digests(list(columns))).items() if row not in texts.empty}


def _each(texts: Sequence[str], find: Callable[[str], str | None]) -> dict[int, Found]:
    """What is found in each text on its own."""
    found = {row: find(text) for row, text in enumerate(texts)}
    return {row: Found(reason) for row, reason in found.items() if reason is not None}
