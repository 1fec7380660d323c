"""From scores to decisions: keep or drop, with a reason, for every row. Knows nothing of models: sees arrays.

Function first: `drop_share(values, 0.5, "largest")` decides; `DataSelector` only holds the settings. Policies that
look at more than one row at a time are in `policies.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import pyarrow as pa

from ..config import InputError, one_of
from ..io.files import file_at, load_parquet, save_parquet
from ..scores.provenance import Provenance
from ..scores.score_table import OF_GROUP, ScoreTable
from .combining import COMBINATIONS
from .dataset_card import make_card, push_card
from .thresholds import RULES

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset, IterableDataset
    from huggingface_hub import DatasetCard

SELECTION_FILE = "selection.parquet"
KEY = "resofilter_selection"  # the Parquet metadata that holds policy and provenance
KEPT = "kept"
COLUMN = "resofilter_"  # begins the name of a score that became a column
Drop = Literal["largest", "smallest", "both"]
Rule = Literal["otsu", "iqr", "knee"]
Combination = Literal["ranks", "topsis", "pareto", "residual"]


@dataclass(frozen=True)
class Selection:
    """Keep or drop, with a reason, for every row of the user's dataset.

    Attributes:
        keep: (N,) bool, in the dataset's order.
        reason: N strings; `"kept"` for those that stay.
        policy: the settings that decided, for people and for repeating.
        provenance: of the scores, as JSON.
        weight: (N,) what each row's loss counts in training, 0 for those that go; None where all count alike.
    """

    keep: np.ndarray
    reason: Sequence[str]
    policy: Mapping[str, Any]
    provenance: str
    weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keep)

    @property
    def sample_ids(self) -> np.ndarray:
        """Positions, in the user's dataset, of the rows that stay, ascending."""
        return np.flatnonzero(self.keep)

    def apply(self, dataset: Dataset | IterableDataset) -> Any:
        """The rows that stay, in their original order: of a `Dataset`, or of a stream, an `IterableDataset`.

        A stream is filtered by the places of its rows as it gives them to one reader: leave it unshuffled, and let one
        process read it (`dataloader_num_workers=0`).

        Raises:
            InputError: the dataset has another number of rows than was scored.
        """
        if not isinstance(dataset, Sized):
            return dataset.filter(self._stays, with_indices=True)
        if len(dataset) != len(self):
            raise InputError(
                f"The selection was made for {len(self)} rows and the dataset has {len(dataset)}. "
                "Apply it to the dataset as it was scored, before any filtering or shuffling."
            )
        return cast("Dataset", dataset).select(self.sample_ids)

    def _stays(self, row: Any, place: int) -> bool:
        if place >= len(self):
            raise InputError(f"The selection was made for {len(self)} rows and the stream has more. Score it again.")
        return bool(self.keep[place])

    def annotate(self, dataset: Dataset, scores: ScoreTable) -> Dataset:
        """The rows that stay, with the scores as columns: `resofilter_score`, `resofilter_loss` and so on."""
        rows = self.apply(dataset)
        for name in scores.table.column_names:
            if name not in ("sample_id", "reason"):
                rows = rows.add_column(f"{COLUMN}{name}", scores.table[name].take(self.sample_ids).to_pylist())
        return rows

    def card(self, licence: str | None = None, name: str | None = None, group_column: str | None = None) -> DatasetCard:
        """The card of the rows that stay: how they were chosen, from what, and the commands that repeat it.

        Args:
            licence: of the dataset, where its own card does not say.
            name: of the rows that stay.
            group_column: of the dataset, where shares held within its groups.
        """
        provenance = Provenance.from_json(self.provenance)
        return make_card(provenance, self.reason, KEPT, self.policy, licence, name, group_column)

    def push_to_hub(
        self,
        dataset: Dataset,
        repo_id: str,
        scores: ScoreTable | None = None,
        licence: str | None = None,
        **options: Any,
    ) -> None:
        """Put the rows that stay on the hub, with their card.

        Args:
            dataset: as it was scored.
            repo_id: `owner/name`.
            scores: become columns, where they are given.
            licence: as for `card`.
            **options: of `Dataset.push_to_hub`, such as `private` and `token`.
        """
        rows = self.apply(dataset) if scores is None else self.annotate(dataset, scores)
        commit = rows.push_to_hub(repo_id, **options)
        revision = getattr(commit, "pr_revision", None) or options.get("revision")
        push_card(self.card(licence, repo_id), repo_id, revision, options.get("token"))

    def to_pandas(self) -> pd.DataFrame:
        """`sample_id`, `keep` and `reason`, one line per row of the dataset."""
        return self._table().to_pandas()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to a Parquet file, or to `selection.parquet` in a folder; whole or not at all. Returns the file."""
        policy = dict(self.policy)
        if isinstance(policy.get("keep"), Mapping):
            policy["keep_of_groups"] = list(policy.pop("keep").items())  # JSON's keys are strings, groups need not be
        # numpy's numbers become Python's
        metadata = json.dumps({"policy": policy, "provenance": self.provenance}, default=lambda number: number.item())
        return save_parquet(self._table(), file_at(path, SELECTION_FILE), {KEY: metadata})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read what `save` wrote. Raises InputError for a missing, truncated or foreign file."""
        table, metadata = load_parquet(file_at(path, SELECTION_FILE), KEY, "selection")
        try:
            values = json.loads(metadata)
            policy, provenance = dict(values["policy"]), values["provenance"]
            if "keep_of_groups" in policy:
                policy["keep"] = dict(policy.pop("keep_of_groups"))
            columns = dict(zip(table.column_names, table.columns, strict=True))
            sound = isinstance(provenance, str) and pa.types.is_boolean(columns["keep"].type)
            if not sound or any(column.null_count for column in columns.values()):
                raise ValueError("other columns")
            weight = columns["weight"].cast(pa.float64()).to_numpy() if "weight" in columns else None
            reason = columns["reason"].cast(pa.string()).to_pylist()
            return cls(columns["keep"].to_numpy(), reason, policy, provenance, weight)
        except (TypeError, KeyError, ValueError, pa.ArrowException, RecursionError) as error:
            raise InputError(f"The selection at '{path}' was written by another version. Make it again.") from error

    def _table(self) -> pa.Table:
        columns = {"sample_id": np.arange(len(self)), "keep": self.keep, "reason": list(self.reason)}
        return pa.table(columns if self.weight is None else {**columns, "weight": self.weight})


@dataclass(frozen=True)
class DataSelector:
    """Drops the rows whose training would change the weights most; by default the larger half (ResoFilter).

    Attributes:
        keep: share of the scored rows that stays, above 0 and at most 1; 0.5 unless a threshold is given. With
            groups, the share of each group, or a mapping from group to share.
        drop: which end goes: the `"largest"`, the `"smallest"`, or `"both"` in equal parts. By default the largest, or
            of scores by another selector's criterion the end that those drop who proposed it.
        threshold: an absolute score instead of a share: rows beyond it go. Or where the values themselves say it (see
            `thresholds`): `"otsu"`, between the two groups that differ most; `"iqr"`, beyond which lie outliers;
            `"knee"`, where the sorted values bend.
        by: the column that is ranked. `"score"`, or for a baseline `"loss"`, `"num_tokens"` or a layer's. Several are
            taken together; one whose other end goes has a minus: `("score", "-num_tokens")`.
        combine: how several columns become one number (see `combining`): `"ranks"`, `"topsis"` or `"pareto"`;
            or `"residual"`, what the first says beyond the others.
        stratify_by: a column, such as `"num_tokens"`: the share holds within each of `strata` parts of it.
        strata: parts of as many rows each, or nearly, as equal values stay together.

    Rows without a score are dropped for the reason they have none, and count for no share.
    """

    keep: float | Mapping[Any, float] | None = None
    drop: Drop | None = None
    threshold: float | Rule | None = None
    by: str | Sequence[str] = "score"
    combine: Combination = "ranks"
    stratify_by: str | None = None
    strata: int = 10

    def __post_init__(self) -> None:
        if self.drop is not None:
            one_of("drop", self.drop, get_args(Drop))
        one_of("combine", self.combine, get_args(Combination))
        if isinstance(self.by, Sequence) and not isinstance(self.by, str):
            object.__setattr__(self, "by", tuple(self.by))
        if not self._columns or not all(isinstance(name, str) and name.removeprefix("-") for name in self._columns):
            raise InputError(f"by is the name of a column, or of several, got {self.by!r}.")
        if self.keep is not None and self.threshold is not None:
            raise InputError("Pass keep, a share of the rows, or threshold, an absolute score; not both.")
        if isinstance(self.threshold, str):
            one_of("threshold", self.threshold, get_args(Rule))
        elif self.threshold is not None and not math.isfinite(self.threshold):
            raise InputError(f"A threshold is one finite number, or one of {', '.join(RULES)}, got {self.threshold}.")
        if self.threshold is not None and self.drop == "both":
            raise InputError("A threshold has one side: use drop='largest' or drop='smallest'.")
        if isinstance(self.strata, bool) or not isinstance(self.strata, numbers.Integral) or self.strata < 1:
            raise InputError(f"strata must be a whole number of at least 1, got {self.strata!r}.")
        for share in self._shares():
            if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 < share <= 1:
                raise InputError(f"keep is the share that stays, above 0 and at most 1, got {share}.")

    def select(self, *tables: ScoreTable, groups: Sequence[Any] | None = None) -> Selection:
        """Decide for every row of the dataset.

        Args:
            tables: the scores; several are taken as parts of one dataset's.
            groups: each row's group, N values in the dataset's order; shares then hold within each group.

        Raises:
            InputError: the tables do not belong together or leave out rows; a group has no share.
        """
        scores = ScoreTable.join(tables)
        if self.drop is None:
            return dataclasses.replace(self, drop=self.end(scores.provenance)).select(scores, groups=groups)
        rows = scores.provenance.rows
        if len(scores) != rows:
            raise InputError(f"The dataset has {rows} rows and the scores cover {len(scores)}. Pass all parts.")
        if groups is not None and len(groups) != rows:
            raise InputError(f"There are {rows} rows and {len(groups)} groups: every row needs one.")
        if groups is not None and self.stratify_by is not None:
            raise InputError("Pass groups or stratify_by, not both.")
        if groups is None and isinstance(self.keep, Mapping):
            raise InputError("keep has a share for each group: say which group each row is in (groups=).")
        values = self.values(scores)
        scored = scores.scored & np.isfinite(values)
        if self.stratify_by is not None:
            groups = _strata(scores.column(self.stratify_by), scored, self.stratify_by, self.strata)
        keep = np.zeros(rows, dtype=bool)
        reason = np.full(rows, KEPT, dtype=object)
        reason[~scores.scored] = scores.table["reason"].drop_null().to_pylist()
        for row in np.flatnonzero(scores.scored & ~scored):
            reason[row] = f"{self.what} is {values[row]}"
        for group, members in _members(groups, scored).items():
            keep[members], dropped = self._decide(values[members], group)
            reason[members[~keep[members]]] = dropped
        return Selection(keep, reason.tolist(), dataclasses.asdict(self), scores.provenance.to_json())

    def values(self, scores: ScoreTable) -> np.ndarray:
        """What is ranked, (N,); NaN where a row has no score, or one of several columns is not finite."""
        columns = [_column(scores, name) for name in self._columns]
        if len(columns) == 1:
            return columns[0]
        together = np.stack(columns, axis=1)
        finite, values = np.isfinite(together).all(1), np.full(len(scores), np.nan)
        if finite.any():
            values[finite] = COMBINATIONS[self.combine](together[finite])
        return values

    def end(self, provenance: Provenance | None = None) -> Drop:
        """Which end goes; of what is measured as the provenance says, where the settings leave it open."""
        if self.drop is not None:
            return self.drop
        own = None if provenance is None or self._columns != ("score",) else provenance.config.get("drop")
        return "smallest" if own == "smallest" else "largest"

    @property
    def what(self) -> str:
        """The column, or the columns together, for people."""
        return self._columns[0] if len(self._columns) == 1 else f"{self.combine} of {' and '.join(self._columns)}"

    @property
    def _columns(self) -> tuple[str, ...]:
        return self.by if isinstance(self.by, tuple) else (self.by,)

    def _decide(self, values: np.ndarray, group: Any) -> tuple[np.ndarray, str]:
        of_group = "" if group is None else f"{OF_GROUP}{group}"
        by = "" if self.what == "score" else f" by {self.what}"
        if not len(values):
            return np.ones(0, dtype=bool), ""
        if self.threshold is not None:
            sign = 1 if self.end() == "largest" else -1
            rule = f" ({self.threshold})" if isinstance(self.threshold, str) else ""
            at = sign * RULES[self.threshold](sign * values) if isinstance(self.threshold, str) else self.threshold
            beyond = "above" if sign == 1 else "below"
            return sign * values <= sign * at, f"{self.what} {beyond} {at:g}{rule}{of_group}"
        share = self._share(group)
        end = self.end()
        ends = "largest and smallest" if end == "both" else end
        return drop_share(values, share, end), f"{ends} {per_cent_dropped(share)}{of_group}{by}"

    def _share(self, group: Any) -> float:
        if not isinstance(self.keep, Mapping):
            return 0.5 if self.keep is None else self.keep
        if group not in self.keep:
            raise InputError(f"keep has no share for group '{group}'. It has: {', '.join(map(str, self.keep))}.")
        return self.keep[group]

    def _shares(self) -> list[float]:
        if isinstance(self.keep, Mapping):
            return list(self.keep.values())
        return [] if self.keep is None else [self.keep]


def drop_share(values: np.ndarray, keep: float, drop: Drop) -> np.ndarray:
    """Which of `values` stay when `floor(N * (1 - keep))` of them go.

    As in ResoFilter's released code, rows are sorted by value, descending and stably, and the first go: of equal
    values the earlier row goes first. `"smallest"` sorts ascending; `"both"` takes half from either end, the odd one
    from the largest.

    Returns:
        (N,) bool.
    """
    return drop_count(values, dropped_of(len(values), keep), drop)


def drop_count(values: np.ndarray, count: int, drop: Drop) -> np.ndarray:
    """Which of `values` stay when `count` of them go, in the order of `drop_order`; (N,) bool."""
    stays = np.ones(len(values), dtype=bool)
    if drop == "both" or not 0 < count < len(values) or np.isnan(values).any():
        stays[drop_order(values, drop)[:count]] = False
        return stays
    last = count - 1 if drop == "smallest" else len(values) - count
    bound = np.partition(values, last)[last]  # of the last that goes: ten million rows need no sorting
    stays[values < bound if drop == "smallest" else values > bound] = False
    ties = np.flatnonzero(values == bound)
    stays[ties[: count - np.count_nonzero(~stays)]] = False
    return stays


def drop_order(values: np.ndarray, drop: Drop) -> np.ndarray:
    """(N,) positions, that which goes first at the beginning: whatever the share, the first ones go."""
    descending = np.argsort(-values, kind="stable")
    if drop == "largest":
        return descending
    ascending = np.argsort(values, kind="stable")
    if drop == "smallest":
        return ascending
    turns = np.empty((len(values), 2), dtype=np.int64)  # one of the largest, one of the smallest, and so on
    turns[:, 0], turns[:, 1] = descending, ascending
    order, first = np.unique(turns.ravel(), return_index=True)
    return order[np.argsort(first, kind="stable")]


def dropped_of(rows: int, keep: float) -> int:
    """How many of `rows` go where the share `keep` stays: `floor(N * (1 - keep))` (ResoFilter, released code)."""
    return math.floor(rows * (1 - _exact(keep)))


def per_cent_dropped(keep: float) -> str:
    """The share that goes, for people: `50 %`."""
    return f"{float(100 - 100 * _exact(keep)):.4g} %"


def _exact(share: float) -> Fraction:
    """The share as it was written: 1 - 0.9 is a tenth, not a little less."""
    return Fraction(repr(float(share)))


def _column(scores: ScoreTable, name: str) -> np.ndarray:
    """A column; with a minus before its name, its negative."""
    return -scores.column(name[1:]) if name.startswith("-") else scores.column(name)


def _strata(values: np.ndarray, scored: np.ndarray, name: str, strata: int) -> list[str]:
    """Which part of a column's values each row is in, for people; equal values are in one part."""
    cuts = np.unique(np.quantile(values[scored], np.arange(1, strata) / strata)) if scored.any() else np.empty(0)
    part = np.searchsorted(cuts, values, side="left")
    spans = {each: values[scored & (part == each)] for each in np.unique(part[scored])}
    names = {each: f"{name} {_short(span.min())} to {_short(span.max())}" for each, span in spans.items()}
    return [names.get(each, "") for each in part.tolist()]


def _short(value: float) -> str:
    """A number as people write it, but never as another one."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))


def _members(groups: Sequence[Any] | None, scored: np.ndarray) -> dict[Any, np.ndarray]:
    """The scored rows of each group, ascending; all under None where there are no groups."""
    if groups is None:
        return {None: np.flatnonzero(scored)}
    members: dict[Any, list[int]] = {}
    for row in np.flatnonzero(scored).tolist():
        try:
            members.setdefault(groups[row], []).append(row)
        except TypeError as error:
            raise InputError(f"A group is text or a number, row {row}'s is {type(groups[row]).__name__}.") from error
    return {group: np.array(rows) for group, rows in members.items()}
