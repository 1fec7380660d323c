r"""What an answer ends with, to compare answers to the same question. Knows text alone.

"... so 2 * 9 = $18.\n#### 18"    "18"        "The answer is (B)."        "b"
"... is \boxed{x + 1}, done."     "x+1"       "She pays 1,050.00 dollars" "1050"
"Paris."                          "paris"     a long text without a number: None
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

MARK = re.compile(r"(?:####|\banswer(?:\s+is|\s*[:=])|^A:)\s*:?\s*(?=\S)", re.IGNORECASE | re.MULTILINE)
NUMBER = re.compile(  # 1,050.00, -$3, .5, 2/3 and 2:3, but no part of x2, 1.2.3 or 3,4,5
    r"(?<![A-Za-z_\d.])(?<!\d[,:/])"
    r"(?:-?\s?\$?\s?-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?[/:]\s?\d+)?|-?\.\d+)(?!\d|[.,]\d)"
)
OPTION = re.compile(r"\W*([A-Za-z])\)")  # (B), of a question with options
BOXED = re.compile(r"\\boxed\s*\{")
MOST_WORDS = 5  # of an answer that is compared as a whole
LAST_WORDS = 2  # of a text, in which a number that nothing marks is its end
SPELLINGS = str.maketrans({"\u2212": "-", "\u00a0": " ", "\u202f": " "})  # a minus sign, narrow and other spaces
FORMULA = re.compile(r"\\[dt]?frac|\\sqrt|\^")  # more than a number


def ending_of(answer: str) -> str | None:
    """The end of an answer in a form that can be compared; None where the answer has none.

    The first of these that there is: what is in the last `\\boxed{}`; what follows the last `####`, `The answer is`,
    `Answer:` or, at the beginning of a line, `A:`; the last number of the text; or the whole text, if it is short.
    Numbers are compared by value, without currency, thousands separators or unit; other texts without case, spaces
    and punctuation.
    """
    text = answer.strip().translate(SPELLINGS).replace("{,}", ",")
    boxed = _last_boxed(text)
    if boxed is not None:
        return _plain(boxed)
    marks = list(MARK.finditer(text))
    if marks:
        line = text[marks[-1].end() :].split("\n", 1)[0]
        line = re.split(r"(?<=\S)[.!?](?:\s|$)", line, maxsplit=1)[0]
        option = OPTION.match(line)
        if option:
            return option.group(1).casefold()
        number = None if FORMULA.search(line) else NUMBER.search(line)
        return _value(number.group()) if number else _plain(line)
    numbers = NUMBER.findall(text)
    if numbers:
        return _value(numbers[-1])
    return _plain(text) if text and len(text.split()) <= MOST_WORDS else None


def told_end(answer: str) -> str | None:
    """As `ending_of`, of answers whose end is told: it is marked, stands in the last words, or is all there is."""
    text = answer.strip().translate(SPELLINGS)
    if BOXED.search(text) or MARK.search(text) or len(text.split()) <= MOST_WORDS:
        return ending_of(answer)
    last = " ".join(text.split()[-LAST_WORDS:])
    return ending_of(answer) if NUMBER.search(last) else None


def _last_boxed(text: str) -> str | None:
    """What is in the last `\\boxed{...}`, with braces inside; None without one that is closed."""
    found = None
    for match in BOXED.finditer(text):
        depth, start = 1, match.end()
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                found = text[start:place]
                break
    return found


def _plain(text: str) -> str | None:
    """Without case, spaces, and punctuation around it; a number by its value; None if nothing is left."""
    number = NUMBER.fullmatch(text.strip().rstrip(".%"))
    if number:
        return _value(number.group())
    return re.sub(r"\s+", "", text).strip(".,;:!?*_`'\"()[]$").casefold() or None


def _value(number: str) -> str:
    """A number as text: equal numbers are equal texts."""
    digits = re.sub(r"[\s$,]", "", number).replace("--", "")
    try:
        value = Decimal(digits)
    except InvalidOperation:  # such as 2/3
        return digits
    text = format(value, "f")  # exact, however many digits there are
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if value == 0 else text
