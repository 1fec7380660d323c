"""The rows that a page can show: which of them, as how much text, and which resemble each other. Knows text, no model.

A page cannot hold 400,000 rows. It holds those at both ends of the ranking and an even sample of the others, and says
so; what is counted, is counted over all rows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from ..scores.score_table import ScoreTable
from ..selecting.token_selection import TokenSelection

Text = tuple[str, str]  # prompt and completion
Tokens = tuple[list[str], list[float], list[bool]]  # a row's learnt tokens: text, loss, whether they are kept
Decode = Callable[[Sequence[int]], list[str]]  # token ids to the text of each

SHOWN = 3000
ENDS = 500  # of these at either end of the ranking
UNSCORED = 200
NAME = 120  # characters of a group's name or a reason
LONGEST = 4000  # characters of a prompt or a completion
TEXT_BYTES = 8_000_000  # of all texts, as they stand in the page
TOKENS = 200_000  # that are coloured
NEIGHBOURS = 3
FEATURES, GRAM = 1024, 2
ALIKE = 0.5  # cosine from which on two texts are called neighbours


@dataclass(frozen=True)
class Samples:
    """What the page shows of R rows.

    Attributes:
        rows: their places in the dataset, ascending.
        prompts, completions: cut where they are long; None without text.
        cut: characters of each row that are left out.
        neighbours: for each row the others that resemble it most, and how much (cosine of word pairs, 0 to 1).
        copy_of: for each row the place of the first row with its text, itself where it is the first.
        tokens: for each row its learnt tokens' text, base loss in nats, and which are kept; None where not measured.
        copies: rows of the whole dataset whose text is that of an earlier one.
    """

    rows: list[int]
    prompts: list[str] | None
    completions: list[str] | None
    cut: list[int]
    neighbours: list[list[tuple[int, float]]]
    copy_of: list[int]
    tokens: list[Tokens | None]
    copies: int


def samples_of(
    scores: ScoreTable, texts: Sequence[Text] | None, cleaned: TokenSelection | None, decode: Decode | None
) -> Samples:
    """The rows to be shown.

    Args:
        scores: of N rows.
        texts: of N rows, or None.
        cleaned: which tokens of which rows are learnt.
        decode: what token ids are as text; without it no token is shown.
    """
    rows = chosen_rows(scores.column("score"), scores.scored)
    tokens: list[Tokens | None] = [None] * len(rows)
    if cleaned is not None and decode is not None:
        tokens = _tokens(rows, cleaned, decode)
    if texts is None:
        nothing: list[list[tuple[int, float]]] = [[] for _ in rows]
        return Samples(rows.tolist(), None, None, [0] * len(rows), nothing, rows.tolist(), tokens, 0)
    first = first_of_copies(texts)
    shown = [texts[row] for row in rows.tolist()]
    size = cut_at([text for pair in shown for text in pair])
    return Samples(
        rows=rows.tolist(),
        prompts=[prompt[:size] for prompt, _ in shown],
        completions=[completion[:size] for _, completion in shown],
        cut=[sum(max(len(text) - size, 0) for text in pair) for pair in shown],
        neighbours=neighbours([f"{prompt} {completion}" for prompt, completion in shown], rows),
        copy_of=first[rows].tolist(),
        tokens=tokens,
        copies=int((first != np.arange(len(first))).sum()),
    )


def chosen_rows(values: np.ndarray, scored: np.ndarray, shown: int = SHOWN) -> np.ndarray:
    """Places of the rows to be shown, ascending: all, or both ends, an even sample by rank, and some without score.

    Args:
        values: (N,) scores.
        scored: (N,) bool.
        shown: as many at most, and some without a score.
    """
    if len(values) <= shown:
        return np.arange(len(values))
    ranked = np.flatnonzero(scored)
    ranked = ranked[np.argsort(values[ranked], kind="stable")]
    unscored = np.flatnonzero(~scored)[:UNSCORED]
    if len(ranked) <= shown:
        return np.sort(np.concatenate([ranked, unscored]))
    ends = min(ENDS, shown // 4)
    inner = ranked[ends : len(ranked) - ends]
    even = inner[np.linspace(0, len(inner) - 1, shown - 2 * ends).astype(int)]
    return np.unique(np.concatenate([ranked[:ends], even, ranked[len(ranked) - ends :], unscored]))


def first_of_copies(texts: Iterable[Text]) -> np.ndarray:
    """(N,) for each row the place of the first one with the same prompt and completion."""
    seen: dict[int, int] = {}
    found = []
    for row, (prompt, completion) in enumerate(texts):
        if not (prompt or completion):  # which is no text, not the same one
            found.append(row)
            continue
        key = xxhash.xxh3_128_intdigest(f"{len(prompt)} {prompt}{completion}".encode("utf-8", "surrogatepass"))
        found.append(seen.setdefault(key, row))
    return np.array(found, dtype=np.int64)


def cut_at(texts: Sequence[str], size: int = TEXT_BYTES) -> int:
    """How many characters of each text can be shown, so that all together fit into so many bytes."""
    cut = LONGEST
    while cut > 1 and sum(page_bytes(text[:cut]) for text in texts) > size:
        cut //= 2
    return cut


def cut(name: str) -> str:
    """A name or a reason as short as it is shown."""
    return name if len(name) <= NAME else f"{name[:NAME]}\u2026"


def page_bytes(text: str) -> int:
    """What a text takes in the page."""
    return len(as_json(text).encode())


def as_json(value: object) -> str:
    """JSON that can stand inside a script element: nothing in it ends or begins one, and no line separator is left."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair becomes \udXXX, as JSON has it


def neighbours(texts: Sequence[str], rows: np.ndarray) -> list[list[tuple[int, float]]]:
    """For each text the rows of those most like it, nearest first: cosine of their hashed words and word pairs."""
    features = np.zeros((len(texts), FEATURES), dtype=np.float32)
    for i, text in enumerate(texts):
        words = text.lower().split()
        grams = words + [" ".join(pair) for pair in itertools.pairwise(words)]
        for gram in grams:
            digest = xxhash.xxh3_64_intdigest(gram.encode("utf-8", "surrogatepass"))
            features[i, digest % FEATURES] += 1 if digest >> 63 else -1
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)
    found: list[list[tuple[int, float]]] = []
    for start in range(0, len(texts), 512):
        likeness = features[start : start + 512] @ features.T
        likeness[np.arange(len(likeness)), start + np.arange(len(likeness))] = -1
        count = min(NEIGHBOURS, max(len(texts) - 1, 0))
        best = np.argpartition(-likeness, count - 1, axis=1)[:, :count] if count else np.empty((len(likeness), 0), int)
        for own, each in zip(likeness, best, strict=True):
            nearest = each[np.argsort(-own[each], kind="stable")]
            found.append([(int(rows[i]), round(float(own[i]), 3)) for i in nearest if own[i] >= ALIKE])
    return found


def _tokens(rows: np.ndarray, cleaned: TokenSelection, decode: Decode) -> list[Tokens | None]:
    """Each row's learnt tokens, until there are too many."""
    scores, left = cleaned.scores, TOKENS
    place = {int(row): i for i, row in enumerate(scores.sample_id)}
    found: list[Tokens | None] = []
    for row in rows.tolist():
        count = int(scores.num_tokens[place[row]]) if row in place else 0
        if not 0 < count <= left:
            found.append(None)
            continue
        left -= count
        span = slice(scores.offsets[place[row]], scores.offsets[place[row] + 1])
        losses = [round(float(loss), 3) for loss in scores.base[span]]
        found.append((decode(scores.token[span].tolist()), losses, cleaned.keep[span].tolist()))
    return found
