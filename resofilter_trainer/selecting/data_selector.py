"""The policy that ranks rows and drops one end, as in ResoFilter. Knows nothing of models: sees arrays.

`shares`, `thresholds` and `combining` have the arithmetic; `DataSelector` holds the settings and words the reasons.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from ..config import InputError, at_most_one, check_kind, number, one_of, whole_number, with_known_keywords
from ..config import share as check_share
from ..scores.score_table import LENGTH, OF_GROUP, ScoreTable
from .combining import COMBINATIONS, residual, weighted_rank
from .groups import check_groups
from .selection import LATER, Selection, check_complete
from .shares import Drop, Side, complement, drop_share, outside, share_reason
from .thresholds import RULES

LISTED = 3  # columns that vote, in a reason


@with_known_keywords
@dataclass(frozen=True)
class DataSelector:
    """Drops the rows on which training would change the weights most; by default the larger half (ResoFilter).

    Attributes:
        keep: the share of the scored rows to keep, above 0 and at most 1; 0.5 if there is no threshold. With groups,
            the share of each group, or a mapping from group to share.
        drop: the end to drop: the `"largest"`, the `"smallest"`, or `"both"` in equal numbers. By default the largest;
            for a signal, or scores by another criterion, its own (the end that its authors drop).
        threshold: instead of a share, the score beyond which rows are dropped. Or how to find it in the values (see
            `thresholds`): `"otsu"`, between the two groups that differ most; `"iqr"`, beyond which values are outliers;
            `"knee"`, where the sorted values bend.
        by: the column to rank by: `"score"`, a signal such as `"entropy"`, or for a baseline `"loss"`, `"num_tokens"`
            or the column of a layer. Or several columns to combine, the largest of each to be dropped; a minus in front
            ranks a column the other way: `("score", "-num_tokens")`. Or votes: a mapping from columns to weights of at
            least 0, such as `{"loss": 0.7, "entropy": 0.4}`, for the weighted mean of their ranks. Each column votes
            against its own end; with a plus before its name against its largest values, with a minus against its
            smallest. `votes_of` reads the weights from a probe.
        combine: how to combine several columns into one number (see `combining`): `"ranks"`, `"topsis"`, `"pareto"`,
            or `"residual"`, what the first column says beyond the others.
        stratify_by: a column, such as `"num_tokens"`, whose values are divided into `strata`; the share applies within
            each stratum.
        strata: the number of strata, of about the same size: equal values are in one stratum.
        length_out: whether to rank by what the values say beyond the length: by the residual of their ranks, fitted to
            the ranks of `num_tokens`.
        band: instead of a share or threshold, the ranks to keep, as shares of the rows in ascending order: with
            `(0.1, 0.7)`, the smallest tenth and the largest 30 % are dropped.

    Rows without a score are dropped for the reason they have none, and do not count for a share.

    Raises:
        InputError: a setting is not allowed, or two exclude each other.
    """

    keep: float | Mapping[Any, float] | None = None
    drop: Drop | None = None
    threshold: float | str | None = None
    by: str | Sequence[str] | Mapping[str, float] = "score"
    combine: str = "ranks"
    stratify_by: str | None = None
    strata: int = 10
    length_out: bool = field(default=False, metadata={LATER: True})
    band: Sequence[float] | None = field(default=None, metadata={LATER: True})

    def __post_init__(self) -> None:
        if self.drop is not None:
            one_of("drop", self.drop, get_args(Drop))
        one_of("combine", self.combine, tuple(COMBINATIONS))
        self._check_columns()
        at_most_one(keep=self.keep, threshold=self.threshold, band=self.band)
        if self.band is not None:
            self._check_band(self.band)
        if isinstance(self.threshold, str):
            one_of("threshold", self.threshold, tuple(RULES))
        elif self.threshold is not None:
            number(f"A threshold other than {', '.join(RULES)}", self.threshold)
        if self.threshold is not None and self.drop == "both":
            raise InputError("A threshold has one side: use drop='largest' or drop='smallest'.")
        whole_number("strata", self.strata, least=1)
        if self.keep is not None:
            for value in self.keep.values() if isinstance(self.keep, Mapping) else [self.keep]:
                check_share("keep", value)

    def select(self, *tables: ScoreTable, groups: Sequence[Any] | None = None) -> Selection:
        """Keep or drop, with a reason, for every row of the dataset.

        Args:
            tables: the scores; several tables are shards of one dataset.
            groups: each row's group, N values in the dataset's order; shares then apply within each group.

        Raises:
            InputError: the tables do not belong together or leave out rows, or a group has no share.
        """
        scores = ScoreTable.join(tables)
        check_complete(scores)
        if self.drop is None and self.band is None:
            return dataclasses.replace(self, drop=self.end(scores)).select(scores, groups=groups)
        self._check_groups(groups, len(scores))
        values = self.values(scores)
        why = self.unranked(scores, values)
        ranked = scores.scored & np.isfinite(values)
        if self.stratify_by is not None:
            groups = _strata(scores.column(self.stratify_by), ranked, self.stratify_by, self.strata)
        for group, members in _members(groups, ranked).items():
            why[members] = self._decide(values[members], group)
        return Selection.of(self, scores, why)

    def values(self, scores: ScoreTable) -> np.ndarray:
        """The values to rank, (N,) float64; NaN without a score, or where one of several columns is not finite."""
        columns = [self._column(scores, name) for name in self._columns]
        if self._as_it_is:
            return columns[0]
        together = np.stack([*columns, scores.column(LENGTH)] if self.length_out else columns, axis=1)
        finite, values = np.isfinite(together).all(1), np.full(len(scores), np.nan)
        if finite.any():
            found = self._combined(together[finite][:, : len(columns)])
            values[finite] = residual(np.stack([found, together[finite][:, -1]], 1)) if self.length_out else found
        return values

    def unranked(self, scores: ScoreTable, values: np.ndarray) -> np.ndarray:
        """(N,) why rows with a score cannot be ranked by their value, such as `score is nan`; None for other rows."""
        why = np.full(len(scores), None)
        for row in np.flatnonzero(scores.scored & ~np.isfinite(values)).tolist():
            why[row] = f"{self.what} is {values[row]}"
        return why

    def end(self, scores: ScoreTable | None = None) -> Drop:
        """The end to drop; if the settings leave it open, that of the signal or the criterion of the scores."""
        if self.drop is not None:
            return self.drop
        if scores is None or len(self._columns) > 1 or self._weights is not None:
            return "largest"
        return _own_end(scores, self.column)

    @property
    def what(self) -> str:
        """The ranked column, or the combined columns, as text for messages."""
        how = self.combine if self._weights is None else "weighted ranks"
        names = list(self._columns)
        if self._weights is not None and len(names) > LISTED:
            names = [*names[: LISTED - 1], f"{len(names) - LISTED + 1} others"]
        what = f"{how} of {' and '.join(names)}" if len(names) > 1 or self._weights is not None else names[0]
        return f"{what} with length taken out" if self.length_out else what

    @property
    def ranks_one_column(self) -> bool:
        """Whether all rows are ranked together, by one column as it is: a row's value depends on no other row."""
        return self._as_it_is and self.stratify_by is None and not isinstance(self.keep, Mapping)

    @property
    def _as_it_is(self) -> bool:
        """Whether rows are ranked by one column, without weights and without its length taken out."""
        return len(self._columns) == 1 and self._weights is None and not self.length_out

    @property
    def column(self) -> str:
        """The name of the first column to rank by, without its sign."""
        return self._columns[0].removeprefix("-")

    @property
    def _columns(self) -> tuple[str, ...]:
        """The names of the columns, with their signs; of votes, those with a weight above 0."""
        if isinstance(self.by, Mapping):
            return tuple(name for name, weight in self.by.items() if weight > 0)
        return (self.by,) if isinstance(self.by, str) else tuple(self.by)

    @property
    def _weights(self) -> np.ndarray | None:
        """The weights of the columns, if they vote."""
        return np.array([self.by[name] for name in self._columns]) if isinstance(self.by, Mapping) else None

    def _combined(self, columns: np.ndarray) -> np.ndarray:
        """(N,) one number for each row of (N, K) finite columns."""
        if self._weights is not None:
            return weighted_rank(columns, self._weights)
        return COMBINATIONS[self.combine](columns) if columns.shape[1] > 1 else columns[:, 0]

    def _column(self, scores: ScoreTable, name: str) -> np.ndarray:
        """A column; its negative with a minus before its name, or for a vote against its smallest values."""
        votes = self._weights is not None
        plain = unsigned(name) if votes else name.removeprefix("-")
        if scores.is_cluster(plain):
            raise InputError(f"'{plain}' has numbers of clusters, whose order means nothing: rank by another column.")
        turned = name.startswith("-") or (votes and name == plain and _own_end(scores, name) == "smallest")
        values = scores.column(plain).astype(np.float64, copy=False)  # unsigned numbers have no negative
        return -values if turned else values

    def _check_columns(self) -> None:
        """Make `by` a tuple or a dict where it has several columns. Raise InputError where they do not go together."""
        if isinstance(self.by, Mapping):
            object.__setattr__(self, "by", _checked_votes(self.by))
            if self.combine != "ranks":
                raise InputError(f"Weights are for combine='ranks', got combine={self.combine!r}.")
        elif isinstance(self.by, Sequence) and not isinstance(self.by, str):
            object.__setattr__(self, "by", tuple(self.by))
        if not self._columns or not all(isinstance(name, str) and name.removeprefix("-") for name in self._columns):
            raise InputError(f"by is the name of a column, or of several, got {self.by!r}.")
        check_kind("length_out", self.length_out, bool, "True or False")
        if not self.length_out:
            return
        if self.combine == "residual" and len(self._columns) > 1:
            raise InputError("length_out=True and combine='residual' both take something out: add num_tokens to by.")
        if LENGTH in map(unsigned, self._columns):
            raise InputError("length_out=True takes num_tokens out: rank by another column.")

    def _check_band(self, band: Any) -> None:
        """Make the band a tuple. Raise InputError where it is none, or beside an end to drop."""
        object.__setattr__(self, "band", _bounds_of(band))
        if self.drop is not None:
            raise InputError("band= says which ranks to keep, whatever the end: leave drop= out.")

    def _check_groups(self, groups: Sequence[Any] | None, rows: int) -> None:
        """Raise InputError where groups are missing, or the settings do not allow them."""
        if groups is not None:
            check_groups(groups, rows)
        at_most_one(groups=groups, stratify_by=self.stratify_by)
        if groups is None and isinstance(self.keep, Mapping):
            raise InputError("keep has a share for each group: pass the group of each row (groups=).")

    def _decide(self, values: np.ndarray, group: Any) -> np.ndarray:
        """(N,) why values of a group are dropped; None for those to keep."""
        end, why = self.end(), np.full(len(values), None)
        if self.band is not None:
            low, high = self.band
            below, above = outside(values, (low, high))
            why[below], why[above] = self.reason(False, group), self.reason(True, group)
            return why
        if self.threshold is None:
            why[~drop_share(values, self.share(group), end)] = self.reason(end == "largest", group)
            return why
        sign = 1 if end == "largest" else -1
        bound = sign * RULES[self.threshold](sign * values) if isinstance(self.threshold, str) else self.threshold
        why[sign * values > sign * bound] = self.reason(sign == 1, group, bound)
        return why

    def reason(self, above: bool, group: Any = None, bound: float = math.nan) -> str:
        """Why the values at one end are dropped.

        Args:
            above: whether it is the end of the largest values.
            group: the group within which they are dropped; None for all rows.
            bound: the threshold, if there is one.
        """
        of_group = "" if group is None else f"{OF_GROUP}{group}"
        if self.band is not None:
            low, high = self.band
            end: Drop = "largest" if above else "smallest"
            return share_reason(high if above else complement(low), end, self.what, of_group)
        if self.threshold is None:
            return share_reason(self.share(group), self.end(), self.what, of_group)
        rule = f" ({self.threshold})" if isinstance(self.threshold, str) else ""
        return f"{self.what} {'above' if above else 'below'} {bound:g}{rule}{of_group}"

    def share(self, group: Any = None) -> float:
        """The share to keep of a group, or of all rows."""
        if not isinstance(self.keep, Mapping):
            return 0.5 if self.keep is None else self.keep
        if group not in self.keep:
            raise InputError(f"keep has no share for group '{group}'. It has: {', '.join(map(str, self.keep))}.")
        return self.keep[group]


def unsigned(name: str) -> str:
    """The name of a column without the sign before it."""
    return name[1:] if name[0] in "+-" else name


def _own_end(scores: ScoreTable, name: str) -> Side:
    """The end of a column that its authors drop: a signal's or a criterion's own, or else the largest."""
    of_criterion = scores.provenance.config.get("drop") if name == "score" else None
    return "smallest" if (scores.direction(name) or of_criterion) == "smallest" else "largest"


def _bounds_of(band: Any) -> tuple[float, float]:
    """A band of ranks as two shares. Raises InputError where it is none."""
    try:
        low, high = (number("A bound of band", each, least=0, most=1) for each in band)
    except (TypeError, ValueError) as error:
        raise InputError(f"band is two shares of the rows, such as (0.1, 0.7), got {band!r}.") from error
    if low >= high:
        raise InputError(f"band begins at {low:g} and ends at {high:g}: give the smaller bound first.")
    return low, high


def _checked_votes(votes: Mapping[Any, Any]) -> dict[str, float]:
    """The weights of columns. Raises InputError for one that is none, and where no column has a vote."""
    for name, weight in votes.items():
        if not isinstance(name, str) or name in ("", "+", "-"):
            raise InputError(f"by is a mapping from names of columns to weights, got the name {name!r}.")
        number(f"The weight of {name}", weight, least=0)
    if not any(votes.values()):
        raise InputError("by has no column with a weight above 0.")
    if len(set(map(unsigned, votes))) < len(votes):
        raise InputError(f"by has a column twice: {', '.join(votes)}.")
    return {name: float(weight) for name, weight in votes.items()}


def _strata(values: np.ndarray, ranked: np.ndarray, name: str, strata: int) -> list[str]:
    """The name of each row's stratum, for reasons; equal values are in one stratum."""
    cuts = np.unique(np.quantile(values[ranked], np.arange(1, strata) / strata)) if ranked.any() else np.empty(0)
    stratum = np.searchsorted(cuts, values, side="left")
    spans = {each: values[ranked & (stratum == each)] for each in np.unique(stratum[ranked])}
    names = {each: f"{name} {_short(span.min())} to {_short(span.max())}" for each, span in spans.items()}
    return [names.get(each, "") for each in stratum.tolist()]


def _short(value: float) -> str:
    """A number in few digits, or in all of them where fewer would be another number."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))


def _members(groups: Sequence[Any] | None, ranked: np.ndarray) -> dict[Any, np.ndarray]:
    """The ranked rows of each group, ascending; without groups, all of them as the group None."""
    rows = np.flatnonzero(ranked)
    if groups is None:
        return {None: rows} if len(rows) else {}
    members: dict[Any, list[int]] = {}
    for row in rows.tolist():
        try:
            members.setdefault(groups[row], []).append(row)
        except TypeError as error:
            raise InputError(f"A group is text or a number, row {row}'s is {type(groups[row]).__name__}.") from error
    return {group: np.array(members_of) for group, members_of in members.items()}
