"""Policies that look at more than one row at a time, or draw lots. Knows nothing of models: sees arrays.

`DiverseSelector`: by score, but no row that is much like one that stays already. `SoftPruning`: only some of the rows
beyond the mean go, by lot, and those left of them count for more.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import xxhash

from ..config import InputError, one_of
from ..scores.score_table import ScoreTable
from .selection import KEPT, DataSelector, Selection, dropped_of, per_cent_dropped

Side = Literal["largest", "smallest"]


@dataclass(frozen=True)
class DiverseSelector:
    """The best rows that differ (DEITA's Repr Filter: Liu et al., arXiv 2312.15685, section 2.4).

    Rows are taken in the order of their score; one whose cosine similarity to a row taken before is above `similarity`
    is passed over. Where too few are left, the best of those passed over fill up the share.

    Attributes:
        features: (N, d) what each row of the dataset is like, such as embeddings; not zero where a row has a score.
        keep: share of the scored rows that stays.
        drop: which end goes first; by default as for `DataSelector`.
        by: the column that orders the rows, or several, as for `DataSelector`.
        similarity: a cosine, above which two rows are alike.
    """

    features: np.ndarray = field(repr=False, compare=False)
    keep: float = 0.5
    drop: Side | None = None
    by: str | tuple[str, ...] = "score"
    similarity: float = 0.9

    def __post_init__(self) -> None:
        if self.drop is not None:
            one_of("drop", self.drop, get_args(Side))
        _check(self.keep, self.by)
        if np.ndim(self.features) != 2:
            raise InputError(f"features are (N, d), a line for every row, got {np.ndim(self.features)} dimensions.")
        if not -1 <= self.similarity <= 1:
            raise InputError(f"similarity is a cosine, from -1 to 1, got {self.similarity}.")

    def select(self, scores: ScoreTable) -> Selection:
        """Keep or drop, with a reason, for every row. Raises InputError where features and scores do not match."""
        if len(self.features) != len(scores):
            raise InputError(f"There are {len(scores)} rows and features of {len(self.features)}.")
        selector = DataSelector(by=self.by, drop=self.drop)
        end, values = selector.end(scores.provenance), selector.values(scores)
        rows = np.flatnonzero(scores.scored & np.isfinite(values))
        best = rows[np.argsort(values[rows] if end == "largest" else -values[rows], kind="stable")]
        taken, alike = self._take(best, len(rows) - dropped_of(len(rows), self.keep))
        keep = np.zeros(len(scores), dtype=bool)
        keep[taken] = True
        reason = [why or f"{end} {per_cent_dropped(self.keep)}" for why in scores.reasons]
        for row in np.flatnonzero(scores.scored & ~np.isfinite(values)).tolist():
            reason[row] = f"{selector.what} is {values[row]}"
        for row, other in alike.items():
            reason[row] = f"much like row {other}"
        for row in taken:
            reason[row] = KEPT
        settings = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.compare}
        return Selection(keep, reason, settings, scores.provenance.to_json())

    def _take(self, best: np.ndarray, count: int) -> tuple[list[int], dict[int, int]]:
        """The rows that stay, and of those that were passed over, which row they are like."""
        features = np.asarray(self.features, dtype=np.float64)[best]
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        if not (lengths > 0).all() or not np.isfinite(lengths).all():
            row = best[int(np.argmin((lengths > 0) & np.isfinite(lengths)))]
            raise InputError(f"Row {row} has a score, but its features are zero or not finite.")
        features /= lengths
        places, alike = list[int](), dict[int, int]()  # places in `best`
        chosen = np.empty((count, features.shape[1]))
        for place in range(len(best)):
            if len(places) == count:
                break
            cosines = chosen[: len(places)] @ features[place]
            if len(cosines) and min(cosines.max(), 1.0) > self.similarity:
                alike[place] = places[int(cosines.argmax())]
            else:
                chosen[len(places)] = features[place]
                places.append(place)
        filled = list(alike)[: count - len(places)]
        passed = {int(best[place]): int(best[alike[place]]) for place in list(alike)[len(filled) :]}
        return [int(row) for row in best[[*places, *filled]]], passed


@dataclass(frozen=True)
class RandomSelector:
    """A random share of the rows that have a score, whatever it is: what every selector has to beat.

    Attributes:
        keep: share of the scored rows that stays.
        seed: of the lot.
    """

    keep: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.keep, "score")
        _check_seed(self.seed)

    def select(self, scores: ScoreTable) -> Selection:
        """Keep or drop, with a reason, for every row."""
        rows = np.flatnonzero(scores.scored)
        dropped = np.random.default_rng(self.seed).permutation(rows)[len(rows) - dropped_of(len(rows), self.keep) :]
        keep = scores.scored.copy()
        keep[dropped] = False
        reason = [why or KEPT for why in scores.reasons]
        for row in dropped:
            reason[row] = f"by lot, {per_cent_dropped(self.keep)}"
        return Selection(keep, reason, dataclasses.asdict(self), scores.provenance.to_json())


@dataclass(frozen=True)
class SoftPruning:
    """Of the rows beyond the mean only a share stays, by lot, and counts for more (InfoBatch, arXiv 2303.04947).

    The rows of that side that stay weigh `n / kept`, so the expected gradient is that of all rows. InfoBatch also takes
    all rows in the last eighth of the epochs: `ResonanceCallback(selector=SoftPruning(), readmit=True, end_epoch=7)` of
    eight.

    Attributes:
        keep: share of the rows beyond the mean that stays; InfoBatch's r is `1 - keep`.
        drop: which side of the mean is thinned out; InfoBatch: the `"smallest"` losses.
        by: the column whose mean is meant, or several, as for `DataSelector`.
        seed: of the lot, which also depends on the values: a run draws another one after every epoch.
    """

    keep: float = 0.5
    drop: Side = "smallest"
    by: str | tuple[str, ...] = "loss"
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("drop", self.drop, get_args(Side))
        _check(self.keep, self.by)
        _check_seed(self.seed)

    def select(self, scores: ScoreTable) -> Selection:
        """Keep or drop, with a reason and a weight, for every row."""
        selector = DataSelector(by=self.by)
        values = selector.values(scores)
        rows = np.flatnonzero(scores.scored & np.isfinite(values))
        keep, weight = scores.scored.copy(), scores.scored.astype(np.float64)
        reason = [why or KEPT for why in scores.reasons]
        if len(rows):
            mean = np.clip(values[rows].mean(), values[rows].min(), values[rows].max())  # rounding may lead beyond
            beyond = rows[values[rows] > mean if self.drop == "largest" else values[rows] < mean]
            count = len(beyond) - dropped_of(len(beyond), self.keep)
            lot = np.random.default_rng([self.seed, xxhash.xxh3_64_intdigest(values[rows].tobytes())])
            dropped = lot.permutation(beyond)[count:]
            weight[beyond] = len(beyond) / max(count, 1)
            keep[dropped], weight[dropped] = False, 0
            side = "above" if self.drop == "largest" else "below"
            for row in dropped:
                reason[row] = f"by lot, {selector.what} {side} the mean"
        settings: dict[str, Any] = dataclasses.asdict(self)
        return Selection(keep, reason, settings, scores.provenance.to_json(), weight)


def _check(keep: Any, by: Any) -> None:
    """Raise InputError for a share or columns that DataSelector would not take, or a share for each group."""
    if keep is None or isinstance(keep, Mapping):
        raise InputError(f"keep is the share that stays, above 0 and at most 1, got {keep}.")
    DataSelector(keep=keep, by=by)


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise InputError(f"seed must be a whole number of at least 0, got {seed!r}.")
