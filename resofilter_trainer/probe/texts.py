"""Faults of a text, `(text, rng) -> text`, each None where the text does not allow it. Knows text alone.

middle_number   16 - 3 = <<16-3=13>>13. 13 * 2 = 26. #### 26  ->  16 - 3 = <<16-3=18>>18. 13 * 2 = 26. #### 26
carried_number  the same, and later steps follow              ->  16 - 3 = <<16-3=18>>18. 18 * 2 = 26. #### 26
final_number    the number that the text ends with            ->  16 - 3 = <<16-3=13>>13. 13 * 2 = 26. #### 76
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.endings import ending_of

NUMBER = re.compile(  # 13, 1,050, 2.50 and .5, but not a part of x2, 2nd, 1.2.3, 12:30 or 3,5
    r"(?<![A-Za-z_\d])(?<!\d[.,:])(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\.)\.\d+)(?![A-Za-z_\d]|[.,:]\d)"
)
ANNOTATION = re.compile(r"<<[^<>]*>>")  # a calculator's, as in GSM8K
LEAST_WORDS, LEAST_LETTERS = 5, 20  # of a text to cut
LEAST_GIVEN = 4  # words of a text whose beginning is given
SHARES = (0.4, 0.8)  # of a text that is left when it is cut
LEAST_PIECES = 3  # sentences or lines to put out of order
SENTENCE = re.compile("((?<=[.!?\u061f\u2026])\\s+|(?<=[\u3002\uff01\uff1f])\\s*)")  # Arabic and Chinese marks, too
BOILERPLATE = (
    "As an AI language model, I cannot provide a definitive answer, but here is what I found.",
    "I'm sorry, but I can't assist with that request.",
    "Thank you for your question! I hope this helps. Let me know if you have any other questions.",
    "Please note that this content is for informational purposes only and is not professional advice.",
    "Subscribe to our newsletter and follow us on social media for more updates!",
    "Copyright © All rights reserved. Terms of Use | Privacy Policy | Contact Us",
    "Click here to read more.",
)


@dataclass(frozen=True)
class Found:
    """A number in a text: the places where it is written, `(start, end)` each, and its digits.

    A result that a calculator's annotation repeats, `<<16-3=13>>13`, is one number at two places.
    """

    spans: tuple[tuple[int, int], ...]
    text: str

    @property
    def end(self) -> int:
        """The place after it."""
        return self.spans[-1][1]


# ---- numbers


def middle_number(text: str, rng: np.random.Generator) -> str | None:
    """Another number at a random place before the text's end, which stays; what follows stays, too."""
    chosen = _one_of(text, _before_the_end(text), rng)
    return None if chosen is None else _replaced(text, chosen.spans, another_number(chosen.text, rng))


def carried_number(text: str, rng: np.random.Generator) -> str | None:
    """Another number at a random place before the end, and wherever the same number is written after it.

    A number qualifies if it is written again where a reader sees it. Other numbers stay: the sums that follow are not
    computed again.
    """
    seen, choices = numbers_of(text), _before_the_end(text)
    number = _one_of(text, [each for each in choices if any(_follows(other, each) for other in seen)], rng)
    if number is None:
        return None
    written = [Found((match.span(),), match.group()) for match in NUMBER.finditer(text)]  # in annotations, too
    later = [other.spans[0] for other in written if _follows(other, number)]
    return _replaced(text, (*number.spans, *later), another_number(number.text, rng))


def final_number(text: str, rng: np.random.Generator) -> str | None:
    """Another number at the text's end: `ending_of` changes, and everything else stays."""
    last = _last_number(text)
    return None if last is None else _replaced(text, last.spans, another_number(last.text, rng))


def another_number(number: str, rng: np.random.Generator) -> str:
    """A number with one digit changed: of the same length, decimals and separators, and not 0 or with a zero first."""
    places = [place for place, letter in enumerate(number) if letter.isdigit()]
    digits = [unicodedata.digit(number[place]) for place in places]
    whole = len(places) - sum(letter.isdigit() for letter in number.partition(".")[2])
    choices = []
    for place in range(len(digits)):
        for digit in range(10):
            changed = [*digits[:place], digit, *digits[place + 1 :]]
            leads = place == 0 and digit == 0 and whole > 1
            if digit != digits[place] and not leads and any(changed):
                choices.append((place, digit))
    place, digit = choices[int(rng.integers(len(choices)))]
    at = places[place]
    zero = ord(number[at]) - digits[place]  # the zero of its script
    return number[:at] + chr(zero + digit) + number[at + 1 :]


def numbers_of(text: str) -> list[Found]:
    """The numbers that a reader sees; inside of annotations only the results that stand after them, too."""
    annotations = {match.end(): match for match in ANNOTATION.finditer(text)}
    inside = [match.span() for match in annotations.values()]
    found = []
    for match in NUMBER.finditer(text):
        start, end = match.span()
        if any(first <= start < last for first, last in inside):
            continue
        note = annotations.get(start) or annotations.get(start - 1)  # <<...>>$13
        result = note and re.search(rf"=\s*\$?({re.escape(match.group())})\s*>>$", note.group())
        spans = ((note.start() + result.start(1), note.start() + result.end(1)),) if note and result else ()
        found.append(Found((*spans, (start, end)), match.group()))
    return found


def _before_the_end(text: str) -> list[Found]:
    """The numbers before the one that the text ends with, if it ends with one."""
    last = _last_number(text)
    return [each for each in numbers_of(text) if last is None or each.end <= last.spans[0][0]]


def _one_of(text: str, numbers: Sequence[Found], rng: np.random.Generator) -> Found | None:
    """One of the numbers at random, with which the text's end does not change."""
    end = ending_of(text)
    drawn = (numbers[place] for place in rng.permutation(len(numbers)))
    return next((each for each in drawn if _end_without(text, each) == end), None)


def _last_number(text: str) -> Found | None:
    """The number with which the text's end changes."""
    end = ending_of(text)
    if end is None:
        return None
    return next((each for each in reversed(numbers_of(text)) if _end_without(text, each) not in (end, None)), None)


def _end_without(text: str, number: Found) -> str | None:
    """The text's end with another number in place of this one."""
    return ending_of(_replaced(text, number.spans, another_number(number.text, np.random.default_rng(0))))


def _follows(other: Found, number: Found) -> bool:
    """Whether it is the same number, later in the text."""
    return other.spans[0][0] >= number.end and other.text.replace(",", "") == number.text.replace(",", "")


def _replaced(text: str, spans: Sequence[tuple[int, int]], number: str) -> str:
    """The text with a number written at other places, each with its own separators."""
    digits = number.replace(",", "")
    for start, end in sorted(spans, reverse=True):
        rest = iter(digits)
        own = "".join("," if letter == "," else next(rest) for letter in text[start:end])
        text = text[:start] + own + text[end:]
    return text


# ---- words, sentences and lines


def cut(text: str, rng: np.random.Generator) -> str | None:
    """The first 40 to 80 % of the words; of the letters where words are not written apart."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    if len(ends) < LEAST_WORDS:
        letters = [place + 1 for place, letter in enumerate(text) if not letter.isspace()]
        if len(letters) < LEAST_LETTERS:
            return None
        # such as Chinese and Thai; a mark stays with its letter
        ends = [end for end in letters if end == len(text) or unicodedata.category(text[end])[0] != "M"]
    least, most = int(np.ceil(SHARES[0] * len(ends))), int(SHARES[1] * len(ends))
    if most < max(least, 1):
        return None
    return text[: ends[int(rng.integers(least, most + 1)) - 1]]


def shuffled(text: str, rng: np.random.Generator) -> str | None:
    """The lines out of order, or the sentences of a text of fewer than three lines."""
    for pattern in (re.compile(r"(\r?\n)"), SENTENCE):
        parts = pattern.split(text)
        places = [place for place in range(0, len(parts), 2) if parts[place].strip()]
        pieces = [parts[place] for place in places]
        if len(pieces) >= LEAST_PIECES and len(set(pieces)) > 1:
            for place, piece in zip(places, _out_of_order(pieces, rng), strict=True):
                parts[place] = piece
            return "".join(parts)
    return None


def with_boilerplate(text: str, rng: np.random.Generator) -> str | None:
    """A sentence of boilerplate before a random line or sentence, or at the end."""
    sentence = BOILERPLATE[int(rng.integers(len(BOILERPLATE)))]
    lines = re.compile(r"(\r?\n)")
    pattern = lines if lines.search(text.strip()) else SENTENCE
    starts = [0, *(match.end() for match in pattern.finditer(text.rstrip())), len(text.rstrip())]
    start = starts[int(rng.integers(len(starts)))]
    between = ("\r\n" if "\r\n" in text else "\n") if pattern is lines else " "
    if start == len(text.rstrip()):
        return text[:start] + between + sentence + text[start:]
    lead = len(text[start:]) - len(text[start:].lstrip()) if start == 0 else 0
    return text[: start + lead] + sentence + between + text[start + lead :]


def prefix(text: str, share: float) -> str | None:
    """The first share of a text, up to the end of a line, sentence or word near it; None where the text is too short.

    Neither the prefix nor the rest is blank, and the prefix has no white space at its end.
    """
    words = [match.end() for match in re.finditer(r"\S+", text)]
    if len(words) < LEAST_GIVEN:
        return None
    target = share * len(text)
    sentences = [match.start() for pattern in (re.compile(r"(\r?\n)"), SENTENCE) for match in pattern.finditer(text)]
    near = [end for end in sentences if abs(end - target) <= len(text) / 8]
    ends = [end for end in near or words if text[:end].strip() and text[end:].strip()]
    found = text[: min(ends, key=lambda end: (abs(end - target), end))].rstrip() if ends else ""
    return found or None


def _out_of_order(pieces: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The pieces in another order."""
    for _ in range(20):
        order = [pieces[place] for place in rng.permutation(len(pieces))]
        if order != list(pieces):
            return order
    order = list(pieces)  # nearly all are equal
    other = next(place for place, piece in enumerate(order) if piece != order[0])
    order[0], order[other] = order[other], order[0]
    return order
