"""What can be wrong with one answer as text: cut, in a loop, a refusal, in another script. Knows text, no dataset.

Each function says in words what is wrong, or None. All keep quiet where they cannot be sure: numbers, code, lists,
tables and short answers end in many ways.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache
from itertools import pairwise

FEW_WORDS = 8  # an answer with fewer ends as it likes
LETTERS = 100  # of a text, by which its script is known
LOOPS, LONGEST_LOOP, LOOPED_WORDS = 5, 60, 12  # repeats of at most so many words, of so many words in all
SAME_LINES = 5  # in a row, of at least LINE characters
LINE = 10
REFUSES_WITHIN = 300  # characters
FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})(.*)$", re.MULTILINE)
ITEM = re.compile(r"^\s*(?:[-*+•]|\(?\d{1,3}[.)]|\(?[a-zA-Z][.)])(?:\s|$)")
EMPTY_ITEM = re.compile(r"^\s*(?:[-*+•]|\d{1,3}[.)])\s*$")
TABLE = re.compile(r"^\s*\|")
CODE = re.compile(r"[=;{}<>\\_]|\w\(|^(?:\t| {2,})\S|https?:|\bwww\.")
MARKED = re.compile(r"####|\banswer\b[^.]*[:=]|\banswer is\b|^\s*#{1,6}\s|^\s*\*\*.*\*\*\s*$", re.IGNORECASE)
GOES_ON = re.compile(  # a word with which no sentence ends
    "a|an|and|are|as|at|because|but|by|for|from|if|in|into|is|of|or|so|than|that|the|then|to|was|were|which|with"
)
OPEN_ENDS = ",([{=+*/<&"  # with none of which a text ends
MOJIBAKE = re.compile(
    "\u00c3[\u0080-\u00bf\u20ac\u201a\u0192\u2030\u0160\u0152\u0161\u0153\u0178]|\u00c2[\u0080-\u00bf]"
    "|\u00e2\u20ac.|\u00ef\u00bf\u00bd|\u00f0\u0178"
)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")
REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence|large language)\b[\w\s-]{0,20}(?:model|assistant|,)"
    r"|\bi(?:'|\u2019)?m (?:just )?an? (?:ai|large) (?:language )?model\b|\bi am (?:just )?an ai\b"
    r"|\bi(?:'|\u2019)?m (?:very )?sorry,? (?:but )?(?:as an ai|i (?:can(?:'|\u2019)?t|cannot|am (?:not able|unable)))"
    r"|\bi (?:can(?:'|\u2019)t|cannot|am unable to|am not able to|(?:'|\u2019)m unable to) "
    r"(?:assist|help you with|fulfil|comply|provide assistance|answer that)",
    re.IGNORECASE,
)
SCRIPTS = {"CJK": "East Asian", "HIRAGANA": "East Asian", "KATAKANA": "East Asian", "HANGUL": "East Asian"}


def break_of(answer: str) -> str | None:
    """What an answer opens and does not close, or a sentence or list that breaks off: a cut beyond doubt."""
    text = answer.rstrip()
    opened = _open_fence(text)
    if opened:
        return "ends inside a ``` block"
    if _open_boxed(text):
        return "ends inside \\boxed{"
    last = _last_line(text)
    if len(text.split()) < FEW_WORDS or opened is None or CODE.search(last) or TABLE.match(last):
        return None
    if EMPTY_ITEM.match(last) and sum(bool(ITEM.match(line)) for line in text.split("\n")) > 1:
        return f"ends with the empty list item '{last.strip()}'"
    word = last.split()[-1]
    if word[-1] in OPEN_ENDS or GOES_ON.fullmatch(word):
        return f"ends in the middle, with '{word[-20:]}'"
    return None


def loose_end(answer: str) -> str | None:
    """That an answer ends without a full stop or the like; it says something only where others end with one."""
    text = answer.rstrip()
    last = _last_line(text)
    if not ends_openly(answer) or len(text.split()) < FEW_WORDS:
        return None
    return f"ends without a full stop, with '{last.split()[-1][-20:]}'"


def ends_openly(answer: str) -> bool:
    """Whether an answer in prose ends with a letter or an opening or dividing sign; no list, table, code or heading."""
    text = answer.rstrip()
    last = _last_line(text)
    if not last or _open_fence(text) is None or CODE.search(last) or TABLE.match(last) or MARKED.search(last):
        return False
    if ITEM.match(last) and any(ITEM.match(line) and line.rstrip()[-1:].isalnum() for line in text.split("\n")[:-1]):
        return False
    kind = unicodedata.category(text[-1])
    return kind[0] in "LM" or kind in ("Ps", "Pi", "Pd") or text[-1] in ",;:&"


def prose(answer: str) -> bool:
    """Whether an answer is long enough for its end to say something."""
    return len(answer.split()) >= FEW_WORDS


def echo_of(prompt: str, answer: str) -> str | None:
    """That an answer repeats its prompt; both are texts in one line."""
    if len(prompt.split()) >= FEW_WORDS and len(answer) > len(prompt) and answer.startswith(prompt):
        return "begins with the whole prompt"
    return "is its prompt again" if prompt and prompt == answer and len(prompt.split()) >= 3 else None


def refusal_of(answer: str) -> str | None:
    """That an answer is a model's refusal, with its words."""
    found = REFUSAL.search(answer[:REFUSES_WITHIN])
    return None if found is None else f"refuses as a model does: '{' '.join(found.group().split())}'"


def damage_of(text: str) -> str | None:
    """Characters that come from a wrong decoding, or that no text has."""
    if "\ufffd" in text:
        return "has a replacement character (U+FFFD) where a character was lost"
    found = MOJIBAKE.search(text)
    if found:
        return f"has '{found.group()}', which was decoded as another encoding"
    found = CONTROL.search(text)
    return f"has the control character U+{ord(found.group()):04X}" if found else None


def loop_of(answer: str) -> str | None:
    """That an answer repeats the same line again and again, or the same words up to its end."""
    lines, same = [line.strip() for line in answer.split("\n") if line.strip()], 1
    for one, other in pairwise(lines):
        same = same + 1 if one == other else 1
        if same >= SAME_LINES and len(other) >= LINE and any(map(str.isalpha, other)):
            return f"has the line '{other[:40]}' {same} times and more in a row"
    words = answer.split()
    for period in range(1, min(LONGEST_LOOP, len(words) // LOOPS) + 1):
        if words[-1] != words[-1 - period]:
            continue
        count = 1
        while words[-(count + 1) * period : -count * period] == words[-period:]:
            count += 1
        looped = " ".join(words[-period:])
        if count >= LOOPS and count * period >= LOOPED_WORDS and any(map(str.isalpha, looped)):
            return f"ends with '{looped[:40]}' {count} times"
    return None


def script_of(text: str) -> str | None:
    """The script of most letters of a text's beginning, such as `LATIN`; None for fewer than four letters."""
    letters = [each for each in text[: 4 * LETTERS] if each.isalpha()][:LETTERS]
    counts = Counter(map(_script, letters))
    return counts.most_common(1)[0][0] if len(letters) > 3 else None


@cache
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "UNKNOWN").split(" ")[0].split("-")[0]
    return SCRIPTS.get(name, name)


def _open_fence(text: str) -> bool | None:
    """Whether a fenced block is left open; None where the text ends with the fence that closes one."""
    opening, closed = None, None
    for fence in FENCE.finditer(text):
        sign, more = fence.groups()
        if sign in more:  # opened and closed in one line
            continue
        if opening is None:
            opening = sign
        elif sign[0] == opening[0] and len(sign) >= len(opening) and not more.strip():
            opening, closed = None, fence.end()
    return True if opening is not None else None if closed == len(text) else False


def _open_boxed(text: str) -> bool:
    r"""Whether the last \boxed{ is left open."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return False
    inside = text[start:].replace("\\{", "").replace("\\}", "")
    return inside.count("{") > inside.count("}")


def _last_line(text: str) -> str:
    return text[text.rfind("\n") + 1 :]
