"""The policy that ranks rows and drops one end, as in ResoFilter. Knows nothing of models: sees arrays.

`shares`, `thresholds` and `combining` have the arithmetic; `DataSelector` holds the settings and words the reasons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from ..config import InputError, at_most_one, number, one_of, share, whole_number, with_known_keywords
from ..scores.score_table import OF_GROUP, ScoreTable
from .combining import COMBINATIONS
from .selection import Selection, check_complete
from .shares import Drop, drop_share, share_reason
from .thresholds import RULES


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
            ranks a column the other way: `("score", "-num_tokens")`.
        combine: how to combine several columns into one number (see `combining`): `"ranks"`, `"topsis"`, `"pareto"`,
            or `"residual"`, what the first column says beyond the others.
        stratify_by: a column, such as `"num_tokens"`, whose values are divided into `strata`; the share applies within
            each stratum.
        strata: the number of strata, of about the same size: equal values are in one stratum.

    Rows without a score are dropped for the reason they have none, and do not count for a share.

    Raises:
        InputError: a setting is not allowed, or two exclude each other.
    """

    keep: float | Mapping[Any, float] | None = None
    drop: Drop | None = None
    threshold: float | str | None = None
    by: str | Sequence[str] = "score"
    combine: str = "ranks"
    stratify_by: str | None = None
    strata: int = 10

    def __post_init__(self) -> None:
        if self.drop is not None:
            one_of("drop", self.drop, get_args(Drop))
        one_of("combine", self.combine, tuple(COMBINATIONS))
        if isinstance(self.by, Sequence) and not isinstance(self.by, str):
            object.__setattr__(self, "by", tuple(self.by))
        if not self._columns or not all(isinstance(name, str) and name.removeprefix("-") for name in self._columns):
            raise InputError(f"by is the name of a column, or of several, got {self.by!r}.")
        at_most_one(keep=self.keep, threshold=self.threshold)
        if isinstance(self.threshold, str):
            one_of("threshold", self.threshold, tuple(RULES))
        elif self.threshold is not None:
            number(f"A threshold other than {', '.join(RULES)}", self.threshold)
        if self.threshold is not None and self.drop == "both":
            raise InputError("A threshold has one side: use drop='largest' or drop='smallest'.")
        whole_number("strata", self.strata, least=1)
        if self.keep is not None:
            for value in self.keep.values() if isinstance(self.keep, Mapping) else [self.keep]:
                share("keep", value)

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
        if self.drop is None:
            return dataclasses.replace(self, drop=self.end(scores)).select(scores, groups=groups)
        self._check_groups(groups, len(scores))
        values = self.values(scores)
        why = self.unranked(scores, values)
        ranked = scores.scored & np.isfinite(values)
        if self.stratify_by is not None:
            groups = _strata(scores.column(self.stratify_by), ranked, self.stratify_by, self.strata)
        for group, members in _members(groups, ranked).items():
            keep, reason = self._decide(values[members], group)
            why[members[~keep]] = reason
        return Selection.of(self, scores, why)

    def values(self, scores: ScoreTable) -> np.ndarray:
        """The values to rank, (N,); NaN for a row without a score, or where one of several columns is not finite."""
        columns = [_column(scores, name) for name in self._columns]
        if len(columns) == 1:
            return columns[0]
        together = np.stack(columns, axis=1)
        finite, values = np.isfinite(together).all(1), np.full(len(scores), np.nan)
        if finite.any():
            values[finite] = COMBINATIONS[self.combine](together[finite])
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
        if scores is None or len(self._columns) > 1:
            return "largest"
        name = self._columns[0]
        of_criterion = scores.provenance.config.get("drop") if name == "score" else None
        own = scores.direction(name.removeprefix("-")) or of_criterion
        return "smallest" if own == "smallest" else "largest"

    @property
    def what(self) -> str:
        """The ranked column, or the combined columns, as text for messages."""
        return self._columns[0] if len(self._columns) == 1 else f"{self.combine} of {' and '.join(self._columns)}"

    @property
    def _columns(self) -> tuple[str, ...]:
        return self.by if isinstance(self.by, tuple) else (self.by,)

    def _check_groups(self, groups: Sequence[Any] | None, rows: int) -> None:
        """Raise InputError where groups are missing, or the settings do not allow them."""
        if groups is not None and len(groups) != rows:
            raise InputError(f"There are {rows} rows and {len(groups)} groups: every row needs one.")
        at_most_one(groups=groups, stratify_by=self.stratify_by)
        if groups is None and isinstance(self.keep, Mapping):
            raise InputError("keep has a share for each group: pass the group of each row (groups=).")

    def _decide(self, values: np.ndarray, group: Any) -> tuple[np.ndarray, str]:
        """Which values of a group to keep, and why the others are dropped."""
        of_group = "" if group is None else f"{OF_GROUP}{group}"
        end = self.end()
        if self.threshold is None:
            keep = self._share(group)
            return drop_share(values, keep, end), share_reason(keep, end, self.what, of_group)
        sign = 1 if end == "largest" else -1
        rule = f" ({self.threshold})" if isinstance(self.threshold, str) else ""
        bound = sign * RULES[self.threshold](sign * values) if isinstance(self.threshold, str) else self.threshold
        beyond = "above" if sign == 1 else "below"
        return sign * values <= sign * bound, f"{self.what} {beyond} {bound:g}{rule}{of_group}"

    def _share(self, group: Any) -> float:
        if not isinstance(self.keep, Mapping):
            return 0.5 if self.keep is None else self.keep
        if group not in self.keep:
            raise InputError(f"keep has no share for group '{group}'. It has: {', '.join(map(str, self.keep))}.")
        return self.keep[group]


def _column(scores: ScoreTable, name: str) -> np.ndarray:
    """A column; with a minus before its name, its negative."""
    return -scores.column(name[1:]) if name.startswith("-") else scores.column(name)


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
