"""Rows that repeat others, and answers to one prompt that disagree. Knows texts and MinHash, no dataset.

A near duplicate is found by MinHash and locality-sensitive hashing (Broder, 1997), and then verified: its similarity is
the Jaccard similarity of the sets of word trigrams, computed exactly, for prompts and answers on their own. Rows whose
answers end with different numbers are none: one of them may be right. Trigrams of a template, which many rows have, do
not count beside others. Hashing may miss a pair; it never makes one.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import xxhash

from ..config import InputError
from .endings import ending_of

ALIKE = 0.8  # the least similarity of near duplicates
BANDS, ROWS_OF_BAND = 32, 6  # at a similarity of 0.8, one pair in 17,000 is missed
NGRAM = 3  # words
SEED = 42
SAMPLED, COMMON, LEAST_COMMON = 5000, 0.01, 50  # rows; a trigram in this share of them, and in so many, is common
MOST_COMPARED = 200  # rows that one row is compared with
CHARACTERS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # of scripts without spaces between words: each is a word
WORD = re.compile(f"[{CHARACTERS}]|[^\\W{CHARACTERS}]+|[-+*/=<>^%$#@&|~]")  # a sign may be all that differs
NUMBER = re.compile(r"-?[\d.]+(?:[/:][\d.]+)?")
SHORT = 2  # words of an answer that is compared as a whole


def plain(text: str) -> str:
    """A text in one form: one space for each white space, and composed characters (NFC)."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def digests(texts: Sequence[tuple[str, ...]]) -> list[bytes]:
    """A hash of each row's texts in their plain form."""
    return [xxhash.xxh3_128_digest("\0".join(map(plain, each)).encode("utf-8", "surrogatepass")) for each in texts]


def first_of(keys: Sequence[bytes]) -> dict[int, int]:
    """The rows whose key an earlier row has, each with the first of these."""
    first: dict[bytes, int] = {}
    found = {row: first.setdefault(key, row) for row, key in enumerate(keys)}
    return {row: other for row, other in found.items() if other != row}


def has_minhash() -> bool:
    """Whether `rensa` is there, which finds near duplicates."""
    return importlib.util.find_spec("rensa") is not None


def near_duplicates(
    texts: Sequence[tuple[str, str]], but: Sequence[int] = (), alike: float = ALIKE
) -> dict[int, tuple[int, float]]:
    """The rows that are like an earlier one that stays, each with the most similar of these and their similarity.

    Args:
        texts: prompt and answer of each row.
        but: rows that are left out, as they are exact duplicates.
        alike: the least similarity: that of the prompts or that of the answers, whichever is smaller.

    Raises:
        InputError: `rensa` is not installed.
    """
    if not has_minhash():
        raise InputError("Near duplicates need the library rensa: pip install 'resofilter_trainer[checks]'.")
    from rensa import RMinHash, RMinHashLSH

    size = BANDS * ROWS_OF_BAND
    index = RMinHashLSH(threshold=alike, num_perm=size, num_bands=BANDS)
    common = _common(texts)
    grams = lru_cache(4096)(lambda row: tuple(each - common or each for each in map(_grams, texts[row])))
    end = lru_cache(4096)(lambda row: _end(texts[row][1]))
    found, out = dict[int, tuple[int, float]](), set(but)
    for row in range(len(texts)):
        own = () if row in out else grams(row)
        if not any(own):
            continue
        sketch = RMinHash(num_perm=size, seed=SEED)
        named = [(f"{part}:{gram}", gram) for part, each in enumerate(own) for gram in each]
        rare = [name for name, gram in named if gram not in common]
        sketch.update(rare or [name for name, _ in named])  # else all rows of a template are alike
        candidates = [other for other in sorted(index.query(sketch))[:MOST_COMPARED] if end(other) == end(row)]
        best = max(((_similarity(own, grams(other)), -other) for other in candidates), default=(0.0, 0))
        if best[0] >= alike:
            found[row] = (-best[1], best[0])
        else:
            index.insert(row, sketch)
    return found


def odd_endings(prompts: Sequence[str], answers: Sequence[str]) -> dict[int, tuple[int, str, str]]:
    """The rows whose answer ends otherwise than most answers to the same prompt: another row, and the two endings.

    Where no ending is that of most, all rows of the prompt are among them. Numbers are compared with numbers, and
    texts of at most two words with each other.
    """
    groups: dict[bytes, list[int]] = {}
    for row, key in enumerate(digests([(prompt,) for prompt in prompts])):
        if prompts[row].strip():
            groups.setdefault(key, []).append(row)
    found = {}
    for rows in groups.values():
        ends = {row: _end(answers[row]) for row in rows} if len(rows) > 1 else {}
        for kind in ("number", "text"):
            of_kind = {row: end[1] for row, end in ends.items() if end is not None and end[0] == kind}
            common = Counter(of_kind.values()).most_common(2)
            if len(common) < 2:
                continue
            usual = common[0][0] if common[0][1] > common[1][1] else None
            for row, end in of_kind.items():
                others = (each for each, value in of_kind.items() if value != end and usual in (None, value))
                if end != usual:
                    other = next(others)
                    found[row] = (other, end, of_kind[other])
    return dict(sorted(found.items()))


def _end(answer: str) -> tuple[str, str] | None:
    """The kind and the value of an answer's end, if it can be compared; that of a long text is in its last line."""
    text = answer.strip()
    end = ending_of(text if "\\boxed" in text else text[text.rfind("\n") + 1 :])
    if end is None:
        return None
    if NUMBER.fullmatch(end):
        return "number", end
    return ("text", end) if len(text.split()) <= SHORT else None


def _common(texts: Sequence[tuple[str, str]]) -> frozenset[str]:
    """The trigrams of templates: those that many of an even sample of the rows have."""
    step = max(len(texts) // SAMPLED, 1)
    sample = [texts[row] for row in range(0, len(texts), step)]
    counts = Counter(gram for each in sample for gram in frozenset().union(*map(_grams, each)))
    least = max(COMMON * len(sample), LEAST_COMMON)
    return frozenset(gram for gram, count in counts.items() if count >= least)


def _grams(text: str) -> frozenset[str]:
    """The word trigrams of a text, without case and punctuation; all its words as one where there are fewer."""
    words = WORD.findall(unicodedata.normalize("NFC", text).casefold())
    if len(words) < NGRAM:
        whole = " ".join(words) or plain(text)  # of signs alone
        return frozenset([whole] if whole else [])
    return frozenset(map(" ".join, zip(*(words[start:] for start in range(NGRAM)), strict=False)))


def _similarity(one: tuple[frozenset[str], ...], other: tuple[frozenset[str], ...]) -> float:
    """The smallest Jaccard similarity of two rows' parts; 1 for two empty parts."""
    return min(len(a & b) / len(a | b) if a or b else 1.0 for a, b in zip(one, other, strict=True))
