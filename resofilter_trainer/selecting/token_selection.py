"""From token scores to the tokens to learn. Knows nothing of models: sees arrays, returns masks.

`keep_globally(base, reference, 0.6)` decides; `TokenSelector` only holds the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pandas as pd

from ..config import InputError, Ranking, check_kind, one_of, share, with_known_keywords
from ..scores.row_record import SHOWN, as_html
from ..scores.token_scores import TokenScores

CHUNK = 1 << 21  # tokens that are processed at once
EMPTIED = "every token was cleaned away"


@with_known_keywords
@dataclass(frozen=True)
class TokenSelector:
    """Keeps the tokens with the highest scores; by default 60 % of all tokens together (Token Cleaning).

    Attributes:
        keep: the share k of the learnt tokens to keep, above 0 and at most 1.
        ranking: `"global"` keeps int(N*k) of all N tokens; `"sample"` keeps int(n*k) of each row's n, as RHO does.

    Of tokens with the same score, those of earlier rows are kept first, and within a row the earlier ones.

    Raises:
        InputError: the share or the ranking is not allowed.
    """

    keep: float = 0.6
    ranking: Ranking = "global"

    def __post_init__(self) -> None:
        one_of("ranking", self.ranking, get_args(Ranking))
        object.__setattr__(self, "keep", share("keep", self.keep, "tokens"))

    def check(self, num_tokens: np.ndarray) -> None:
        """Raise InputError if no token would be kept. Needs no scores: can be called before they are measured.

        Args:
            num_tokens: (R,) the number of learnt tokens of each row.
        """
        total = int(num_tokens.sum())
        if not (int(total * self.keep) if self.ranking == "global" else (num_tokens * self.keep >= 1).any()):
            raise InputError(f"Of {total} tokens, keep={self.keep} keeps none: choose a larger share.")

    def select(self, scores: TokenScores) -> TokenSelection:
        """Keep or mask, for every learnt token. Raises InputError where a score is missing or not a number."""
        check_kind("scores", scores, TokenScores, "TokenScores")
        if self.ranking == "global":
            keep = keep_globally(scores.base, scores.reference_losses, self.keep)
        else:
            keep = keep_by_sample(scores.base, scores.reference_losses, scores.offsets, self.keep)
        return TokenSelection(scores, keep)


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """Keep or mask, for every learnt token; or a weight.

    Attributes:
        scores: the scores that were decided on.
        keep: (N,) bool, the tokens that are learnt.
        weight: (N,) float64, the weight of each token in the loss, above 0 where it is learnt; None where all that are
            learnt count alike.
    """

    scores: TokenScores
    keep: np.ndarray
    weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keep)

    def __repr__(self) -> str:
        rows = f"{int(self.emptied.sum()):,} of {len(self.scores.sample_id):,} rows keep none"
        return f"TokenSelection({int(self.keep.sum()):,} of {len(self):,} tokens kept; {rows})"

    def _repr_html_(self) -> str:
        """The first rows as a table, for a notebook."""
        tokens = self.scores.num_tokens
        first = {"sample_id": self.scores.sample_id, "tokens": tokens, "kept": self.kept_of_row}
        note = "" if len(tokens) <= SHOWN else f"The first {SHOWN} of {len(tokens):,} rows."
        return as_html(repr(self), pd.DataFrame({name: each[:SHOWN] for name, each in first.items()}), note)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenSelection):
            return NotImplemented
        same = np.array_equal(self.keep, other.keep) and np.array_equal(self.weights, other.weights)
        return same and self.scores == other.scores and (self.weight is None) == (other.weight is None)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of_weights(cls, scores: TokenScores, weights: np.ndarray) -> TokenSelection:
        """The selection of a rule's weights, (N,): bool for a mask."""
        return cls(scores, weights) if weights.dtype == bool else cls(scores, weights > 0, weights)

    @property
    def weights(self) -> np.ndarray:
        """(N,) the weight of each token: `keep` where all that are learnt count alike."""
        return self.keep if self.weight is None else self.weight

    @property
    def kept_of_row(self) -> np.ndarray:
        """(R,) the number of tokens that each row keeps."""
        return kept_of_rows(self.keep, self.scores.offsets)

    @property
    def emptied(self) -> np.ndarray:
        """(R,) bool, the rows that had learnt tokens and keep none."""
        return (self.scores.num_tokens > 0) & (self.kept_of_row == 0)

    def share(self) -> float:
        """The kept share of all tokens; with weights, their mean."""
        return float(self.weights.mean()) if len(self.keep) else 0.0

    def share_of_groups(self, groups: Sequence[Any]) -> dict[str, float]:
        """The kept share of each group's tokens; with weights, their mean.

        Args:
            groups: the group or source of each row, R values.

        Raises:
            InputError: the number of groups is not the number of rows.
        """
        if len(groups) != len(self.scores.sample_id):
            raise InputError(f"{len(groups)} groups for {len(self.scores.sample_id)} rows: give one for each row.")
        kept = self.kept_of_row if self.weight is None else sums_of_rows(self.weight, self.scores.offsets)
        frame = pd.DataFrame({"tokens": self.scores.num_tokens, "kept": kept})
        sums = frame.groupby([str(group) for group in groups]).sum()
        return {str(name): kept / tokens for name, tokens, kept in sums.itertuples() if tokens}

    def tokens_by_share(self, at_least: int = 5) -> pd.DataFrame:
        """The kept share of each frequent token id, the highest first: `token`, `count` and `share`.

        With weights, the share is their mean.

        Args:
            at_least: the least number of times that a listed token id occurs; it also makes up at least a thousandth of
                all tokens.
        """
        token, size = self.scores.token, int(self.scores.token.max(initial=0)) + 1
        count, kept = np.zeros(size, dtype=np.int64), np.zeros(size)
        for start in range(0, len(token), CHUNK):
            span = slice(start, start + CHUNK)
            count += np.bincount(token[span], minlength=size)
            kept += np.bincount(token[span], self.weights[span], minlength=size)
        ids = np.flatnonzero(count >= max(at_least, len(self.keep) / 1000))
        frame = pd.DataFrame({"token": ids, "count": count[ids], "share": kept[ids] / count[ids]})
        return frame.sort_values(["share", "count", "token"], ascending=[False, False, True], ignore_index=True)


def keep_globally(base: np.ndarray, reference: np.ndarray, keep: float) -> np.ndarray:
    """(N,) bool: the int(N * keep) tokens with the largest `base - reference`; of equal ones, the first.

    The float32 difference never contradicts the order of the exact one, so it is partitioned; among tokens that are
    equal in float32, the exact difference decides.
    """
    size, count = len(base), int(len(base) * keep)
    if count in (0, size):
        return np.full(size, count == size)
    rounded = base - reference
    rounded.partition(size - count)  # in place, to save memory
    _check_numbers(rounded)
    threshold = rounded[size - count]
    del rounded
    kept, undecided = np.empty(size, dtype=bool), []
    for start in range(0, size, CHUNK):
        span = slice(start, start + CHUNK)
        difference = base[span] - reference[span]
        np.greater(difference, threshold, out=kept[span])
        undecided.append(start + np.flatnonzero(difference == threshold))
    at_threshold = np.concatenate(undecided)
    exact = base[at_threshold].astype(np.float64) - reference[at_threshold]
    kept[at_threshold] = _largest(exact, count - int(kept.sum()))
    return kept


def keep_by_sample(base: np.ndarray, reference: np.ndarray, offsets: np.ndarray, keep: float) -> np.ndarray:
    """(N,) bool: as `keep_globally`, but the int(n * keep) of each row's n tokens.

    Args:
        base, reference: (N,) losses.
        offsets: (R + 1,) the start of each row, and the end.
        keep: the share k to keep.
    """
    counts = (np.diff(offsets) * keep).astype(np.int64)
    return keep_in_rows(lambda span: base[span].astype(np.float64) - reference[span], offsets, counts)


def keep_in_rows(values: Callable[[slice], np.ndarray], offsets: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """(N,) bool: the tokens of each row with the largest values; of equal ones, the first.

    Args:
        values: a function from a slice of the N tokens to their values.
        offsets: (R + 1,) the start of each row, and the end.
        keep: (R,) the number of tokens of each row to keep.
    """
    kept = np.empty(offsets[-1], dtype=bool)
    first = 0
    while first < len(offsets) - 1:  # as many complete rows as fit into a chunk
        last = max(int(np.searchsorted(offsets, offsets[first] + CHUNK, side="right")) - 1, first + 1)
        start, stop = offsets[first], offsets[last]
        counts = np.diff(offsets[first : last + 1])
        exact = values(slice(start, stop))
        _check_numbers(exact)
        row = np.repeat(np.arange(len(counts)), counts)
        order = np.lexsort((-exact, row))  # by row, then by falling score; stable
        rank = np.empty(stop - start, dtype=np.int64)
        rank[order] = np.arange(stop - start)
        rank -= np.repeat(offsets[first:last] - start, counts)
        kept[start:stop] = rank < np.repeat(keep[first:last], counts)
        first = last
    return kept


def keep_largest(values: np.ndarray, keep: float) -> np.ndarray:
    """(N,) bool: the int(N * keep) tokens with the largest values; of equal ones, the first."""
    _check_numbers(values)
    return _largest(values, int(len(values) * keep))


def kept_of_rows(keep: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(R,) the number of tokens that each row keeps.

    Args:
        keep: (N,) bool, for every token.
        offsets: (R + 1,) the start of each row, and the end.
    """
    return sums_of_rows(keep, offsets, np.int64)


def sums_of_rows(values: np.ndarray, offsets: np.ndarray, dtype: Any = np.float64) -> np.ndarray:
    """(R,) the sum of each row's values, (N,)."""
    some = np.diff(offsets) > 0
    sums = np.zeros(len(some), dtype=dtype)
    if some.any():
        sums[some] = np.add.reduceat(values, offsets[:-1][some], dtype=dtype)
    return sums


def _check_numbers(values: np.ndarray) -> None:
    if np.isnan(values.max(initial=0)):
        raise InputError("A token's score is not a number: its loss is not finite under one of the models. Check both.")


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """(M,) bool: the `count` largest; of equal ones, the first."""
    if count in (0, len(values)):
        return np.full(len(values), count > 0)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    kept: np.ndarray = values > threshold
    ties = np.flatnonzero(values == threshold)
    kept[ties[: count - int(kept.sum())]] = True
    return kept
