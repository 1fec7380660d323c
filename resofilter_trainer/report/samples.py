"""The rows that a page shows: which rows, how much of their text, and which are similar. Knows text, no model.

A page cannot hold 400,000 rows. It holds those at both ends of the ranking and an even sample of the others, and says
so. Numbers are counted over all rows.
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
Tokens = tuple[list[str], list[float], list[bool]]  # text, loss and decision of a row's learnt tokens
Decode = Callable[[Sequence[int]], list[str]]  # token ids to the text of each

MAX_ROWS = 3000
ENDS = 500  # rows at each end of the ranking
UNSCORED = 200  # rows without a score, at most
MAX_NAME = 120  # characters of a group's name or a reason
MAX_TEXT = 4000  # characters of a prompt or a completion
TEXT_BYTES = 8_000_000  # of all texts in the page
ID_BYTES = 1_000_000  # of all ids in the page
MAX_TOKENS = 200_000  # of all coloured tokens
NEIGHBOURS = 3  # of a row, at most
FEATURES = 1024  # of a text
SIMILAR = 0.5  # cosine from which two texts are neighbours


@dataclass(frozen=True)
class Samples:
    """The R rows that the page shows; lists have one entry per row.

    Attributes:
        rows: their positions in the dataset, ascending.
        prompts, completions: their text, truncated where it is long; None without text.
        omitted: the number of characters that are not shown.
        neighbours: the most similar of the shown rows, with the similarity (cosine over words and word pairs).
        copy_of: the position of the first row of the dataset with the same text.
        tokens: the text, base loss in nats and decision of the learnt tokens; None where they were not measured.
        ids: the user's own ids of the rows; None without them.
        copies: the number of rows of the whole dataset that repeat the text of an earlier row.
    """

    rows: list[int]
    prompts: list[str] | None
    completions: list[str] | None
    omitted: list[int]
    neighbours: list[list[tuple[int, float]]]
    copy_of: list[int]
    tokens: list[Tokens | None]
    copies: int
    ids: list[str] | None = None


def samples_of(
    scores: ScoreTable,
    texts: Sequence[Text] | None,
    cleaned: TokenSelection | None,
    decode: Decode | None,
    ids: Sequence[str] | None = None,
) -> Samples:
    """Choose the rows to show and collect what is shown of them.

    Args:
        scores: the scores of N rows.
        texts: (N,) prompt and completion of each row, or None.
        cleaned: the tokens to learn, or None.
        decode: a function from token ids to the text of each; without it no token is shown.
        ids: (N,) the user's own id of each row, or None. They are whole unless they take too much of the page.
    """
    rows = chosen_rows(scores.column("score"), scores.scored)
    tokens: list[Tokens | None] = [None] * len(rows)
    if cleaned is not None and decode is not None:
        tokens = _tokens(rows, cleaned, decode)
    own = None if ids is None else [ids[row] for row in rows.tolist()]
    if own is not None:
        size = text_limit(own, ID_BYTES)
        own = [each if len(each) <= size else f"{each[:size]}\u2026" for each in own]
    if texts is None:
        nothing: list[list[tuple[int, float]]] = [[] for _ in rows]
        return Samples(rows.tolist(), None, None, [0] * len(rows), nothing, rows.tolist(), tokens, 0, own)
    first = first_of_copies(texts)
    shown = [texts[row] for row in rows.tolist()]
    size = text_limit([text for pair in shown for text in pair])
    return Samples(
        rows=rows.tolist(),
        prompts=[prompt[:size] for prompt, _ in shown],
        completions=[completion[:size] for _, completion in shown],
        omitted=[sum(max(len(text) - size, 0) for text in pair) for pair in shown],
        neighbours=neighbours([f"{prompt} {completion}" for prompt, completion in shown], rows),
        copy_of=first[rows].tolist(),
        tokens=tokens,
        copies=int((first != np.arange(len(first))).sum()),
        ids=own,
    )


def chosen_rows(values: np.ndarray, scored: np.ndarray, shown: int = MAX_ROWS) -> np.ndarray:
    """The rows to show, ascending: all, or both ends of the ranking, an even sample between, and some without a score.

    Args:
        values: (N,) scores.
        scored: (N,) bool, the rows that have a score.
        shown: the number of scored rows to show, at most.
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
    """(N,) the position of the first row with the same prompt and completion; rows without text are no copies."""
    seen: dict[int, int] = {}
    found = []
    for row, (prompt, completion) in enumerate(texts):
        if not (prompt or completion):
            found.append(row)
            continue
        key = xxhash.xxh3_128_intdigest(f"{len(prompt)} {prompt}{completion}".encode("utf-8", "surrogatepass"))
        found.append(seen.setdefault(key, row))
    return np.array(found, dtype=np.int64)


def text_limit(texts: Sequence[str], size: int = TEXT_BYTES) -> int:
    """The number of characters to show of each text, so that all texts take at most `size` bytes in the page."""
    limit = MAX_TEXT
    while limit > 1 and sum(page_bytes(text[:limit]) for text in texts) > size:
        limit //= 2
    return limit


def shortened(name: str) -> str:
    """A group's name or a reason, truncated where it is long."""
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}\u2026"


def page_bytes(text: str) -> int:
    """The number of bytes that a text takes in the page."""
    return len(as_json(text).encode())


def as_json(value: object) -> str:
    """JSON for a script element: it contains no `<`, `>` or `&`, and no Unicode line separator."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate becomes \udXXX, as in JSON


def neighbours(texts: Sequence[str], rows: np.ndarray) -> list[list[tuple[int, float]]]:
    """The rows of the texts most similar to each text, by cosine over hashed words and word pairs, nearest first."""
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
        cosine = features[start : start + 512] @ features.T
        cosine[np.arange(len(cosine)), start + np.arange(len(cosine))] = -1  # a text is not its own neighbour
        count = min(NEIGHBOURS, max(len(texts) - 1, 0))
        best = np.argpartition(-cosine, count - 1, axis=1)[:, :count] if count else np.empty((len(cosine), 0), int)
        for own, each in zip(cosine, best, strict=True):
            nearest = each[np.argsort(-own[each], kind="stable")]
            found.append([(int(rows[i]), round(float(own[i]), 3)) for i in nearest if own[i] >= SIMILAR])
    return found


def _tokens(rows: np.ndarray, cleaned: TokenSelection, decode: Decode) -> list[Tokens | None]:
    """The learnt tokens of each row, up to `MAX_TOKENS` in all."""
    scores, left = cleaned.scores, MAX_TOKENS
    index = {int(row): i for i, row in enumerate(scores.sample_id)}
    found: list[Tokens | None] = []
    for row in rows.tolist():
        count = int(scores.num_tokens[index[row]]) if row in index else 0
        if not 0 < count <= left:
            found.append(None)
            continue
        left -= count
        span = slice(scores.offsets[index[row]], scores.offsets[index[row] + 1])
        losses = [round(float(loss), 3) for loss in scores.base[span]]
        found.append((decode(scores.token[span].tolist()), losses, cleaned.keep[span].tolist()))
    return found
