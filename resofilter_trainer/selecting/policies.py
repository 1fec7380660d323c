"""The interface of a policy, all policies by name, and the policies beside `DataSelector`. Knows nothing of models.

A new policy is a frozen dataclass here and a line in `POLICIES`: its `select`
says why each row is dropped, and `Selection.of` does the rest. Its public name goes into the package's `__init__`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, get_args

import numpy as np
import xxhash

from ..config import InputError, check_kind, number, one_of, share, whole_number, with_known_keywords
from ..scores.score_table import ScoreTable
from .data_selector import DataSelector
from .per_prompt import OnePerPrompt
from .selection import Selection
from .shares import Side, number_dropped, percent_dropped, share_reason


class Policy(Protocol):
    """Anything that decides on rows as `DataSelector` does."""

    def select(self, scores: ScoreTable, /) -> Selection:
        """Keep or drop, with a reason, for every row of the dataset."""
        ...


@with_known_keywords
@dataclass(frozen=True)
class DiverseSelector:
    """Keeps the best rows that differ from each other (DEITA's Repr Filter: Liu et al., arXiv 2312.15685, section 2.4).

    Rows are kept in the order of their score. A row whose cosine similarity to a kept row is above `similarity` is
    skipped. If too few rows are kept, the best of the skipped rows complete the share.

    Attributes:
        features: (N, d) features of each row of the dataset, such as embeddings; not zero for a row with a score.
        keep: the share of the scored rows to keep.
        drop: the end to drop first; by default as for `DataSelector`.
        by: the column to rank by, or several, as for `DataSelector`.
        similarity: the cosine similarity above which two rows are alike.

    Raises:
        InputError: a setting is not allowed.
    """

    features: np.ndarray = field(repr=False, compare=False)
    keep: float = 0.5
    drop: Side | None = None
    by: str | tuple[str, ...] = "score"
    similarity: float = 0.9

    def __post_init__(self) -> None:
        if self.drop is not None:
            one_of("drop", self.drop, get_args(Side))
        share("keep", self.keep)
        DataSelector(by=self.by)  # checks the columns
        if np.ndim(self.features) != 2:
            raise InputError(f"features must be (N, d), a line for every row, got {np.ndim(self.features)} dimensions.")
        number("similarity", self.similarity, least=-1, most=1)

    def select(self, scores: ScoreTable) -> Selection:
        """Keep or drop, with a reason, for every row. Raises InputError where features and scores do not match."""
        check_kind("scores", scores, ScoreTable, "a ScoreTable, as score_dataset returns")
        if len(self.features) != len(scores):
            raise InputError(f"There are {len(scores)} rows and features of {len(self.features)}: pass as many.")
        ranking = DataSelector(by=self.by, drop=self.drop)
        end, values = ranking.end(scores), ranking.values(scores)
        rows = np.flatnonzero(scores.scored & np.isfinite(values))
        best = rows[np.argsort(values[rows] if end == "largest" else -values[rows], kind="stable")]
        taken, alike = self._take(best, len(rows) - number_dropped(len(rows), self.keep))
        why = ranking.unranked(scores, values)
        why[rows] = share_reason(self.keep, end)
        for row, other in alike.items():
            why[row] = f"resembles row {other}"
        why[taken] = None
        return Selection.of(self, scores, why)

    def _take(self, best: np.ndarray, count: int) -> tuple[list[int], dict[int, int]]:
        """The rows to keep, and for each skipped row the kept row that it resembles."""
        features = np.asarray(self.features, dtype=np.float64)[best]
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        if not (lengths > 0).all() or not np.isfinite(lengths).all():
            row = best[int(np.argmin((lengths > 0) & np.isfinite(lengths)))]
            raise InputError(f"Row {row} has a score, but its features are zero or not finite.")
        features /= lengths
        taken, alike = list[int](), dict[int, int]()  # positions in `best`
        chosen = np.empty((count, features.shape[1]))
        for position in range(len(best)):
            if len(taken) == count:
                break
            cosines = chosen[: len(taken)] @ features[position]
            if len(cosines) and min(cosines.max(), 1.0) > self.similarity:
                alike[position] = taken[int(cosines.argmax())]
            else:
                chosen[len(taken)] = features[position]
                taken.append(position)
        filled = list(alike)[: count - len(taken)]
        passed_over = {int(best[each]): int(best[alike[each]]) for each in list(alike)[len(filled) :]}
        return [int(row) for row in best[[*taken, *filled]]], passed_over


@with_known_keywords
@dataclass(frozen=True)
class RandomSelector:
    """Keeps a random share of the scored rows, whatever their scores: the baseline for every selector.

    Attributes:
        keep: the share of the scored rows to keep.
        seed: the seed of the random draw.

    Raises:
        InputError: a setting is not allowed.
    """

    keep: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        share("keep", self.keep)
        whole_number("seed", self.seed, least=0)

    def select(self, scores: ScoreTable) -> Selection:
        """Keep or drop, with a reason, for every row."""
        check_kind("scores", scores, ScoreTable, "a ScoreTable, as score_dataset returns")
        rows = np.flatnonzero(scores.scored)
        kept = len(rows) - number_dropped(len(rows), self.keep)
        why = np.full(len(scores), None)
        why[np.random.default_rng(self.seed).permutation(rows)[kept:]] = f"at random, {percent_dropped(self.keep)}"
        return Selection.of(self, scores, why)


@with_known_keywords
@dataclass(frozen=True)
class SoftPruning:
    """Keeps a random share of the rows beyond the mean and upweights them (InfoBatch: Qin et al., arXiv 2303.04947).

    The kept rows beyond the mean weigh `n / kept`, so the expected gradient is that of all rows. InfoBatch also trains
    on all rows in the last eighth of the epochs: of eight epochs,
    `ResonanceCallback(selector=SoftPruning(), readmit=True, end_epoch=7)`.

    Attributes:
        keep: the share of the rows beyond the mean to keep; InfoBatch's r is `1 - keep`.
        drop: the side of the mean to drop rows from; InfoBatch drops rows of the `"smallest"` losses.
        by: the column of which to take the mean, or several, as for `DataSelector`.
        seed: the seed of the random draw, which also depends on the values: a run draws again after every epoch.

    Raises:
        InputError: a setting is not allowed.
    """

    keep: float = 0.5
    drop: Side = "smallest"
    by: str | tuple[str, ...] = "loss"
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("drop", self.drop, get_args(Side))
        share("keep", self.keep)
        DataSelector(by=self.by)  # checks the columns
        whole_number("seed", self.seed, least=0)

    def select(self, scores: ScoreTable) -> Selection:
        """Keep or drop, with a reason and a weight, for every row."""
        check_kind("scores", scores, ScoreTable, "a ScoreTable, as score_dataset returns")
        ranking = DataSelector(by=self.by)
        values = ranking.values(scores)
        rows = np.flatnonzero(scores.scored & np.isfinite(values))
        why, weight = np.full(len(scores), None), np.ones(len(scores))
        if len(rows):
            mean = np.clip(values[rows].mean(), values[rows].min(), values[rows].max())  # rounding may lead beyond
            beyond = rows[values[rows] > mean if self.drop == "largest" else values[rows] < mean]
            kept = len(beyond) - number_dropped(len(beyond), self.keep)
            rng = np.random.default_rng([self.seed, xxhash.xxh3_64_intdigest(values[rows].tobytes())])
            side = "above" if self.drop == "largest" else "below"
            why[rng.permutation(beyond)[kept:]] = f"at random, {ranking.what} {side} the mean"
            weight[beyond] = len(beyond) / max(kept, 1)
        return Selection.of(self, scores, why, weight)


POLICIES: dict[str, type[Policy]] = {
    "DataSelector": DataSelector,
    "DiverseSelector": DiverseSelector,
    "OnePerPrompt": OnePerPrompt,
    "RandomSelector": RandomSelector,
    "SoftPruning": SoftPruning,
}


def ask(policy: Policy, scores: ScoreTable) -> Selection:
    """The decision of any policy, checked. Raises InputError where it is not a selection of all rows."""
    found: object = policy.select(scores)
    name, remedy = type(policy).__name__, "build it with Selection.of(self, scores, why)."
    if not isinstance(found, Selection):
        raise InputError(f"{name}.select returned {type(found).__name__}, but a policy returns a Selection: {remedy}")
    if len(found) != len(scores):
        raise InputError(
            f"{name}.select returned a selection of {len(found)} rows for scores of {len(scores)} rows, but a policy "
            f"decides on every row, also on those without a score: {remedy}"
        )
    return found
