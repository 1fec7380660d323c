"""Which rows the next epoch of a run trains on. Knows scores and policies, no model, no Trainer."""

from __future__ import annotations

import dataclasses
import itertools
import json
import numbers
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import pyarrow as pa
import xxhash

from ..config import InputError, one_of
from ..scores.score_table import ScoreTable
from ..selecting.policies import SoftPruning
from ..selecting.selection import KEPT, DataSelector, Selection, drop_count, dropped_of, per_cent_dropped

When = Literal["training", "before"]
WHOLE = numbers.Integral


class Policy(Protocol):
    """Anything that decides as `DataSelector` does."""

    def select(self, scores: ScoreTable, /) -> Selection:
        """Keep or drop, with a reason, for every row of the dataset."""
        ...


@dataclass(frozen=True)
class FilterConfig:
    """What is dropped, how much of it, and when.

    Attributes:
        keep: the share of the whole dataset that an epoch trains on: a number for every epoch from `start_epoch` on,
            or a list with a share for each epoch, of which the last repeats. Or a `DataSelector`, whose share is meant
            in the same way.
        threshold: an absolute score instead: rows above it go.
        selector: any policy instead, asked at the end of every epoch, of the rows that are left, or with `readmit` of
            all; with `when="before"` asked once. Its weights, if it has any, count in SFTTrainer's loss.
        when: `"training"`, where an epoch's own scores decide on the next, or `"before"`, where the scores at the
            starting weights decide on every epoch.
        start_epoch: the first epoch, counted from 0, that trains on fewer rows. 1, or 0 with `when="before"`.
        end_epoch: the first epoch, counted from 0, that trains on all rows again, with `readmit`; None: there is none.
        readmit: whether dropped rows are ranked again, by their last score; otherwise they stay dropped.
        correct_drift: whether the change of the model during an epoch is taken out of its scores (see `drift`). None:
            where the order of the rows is random, which is the condition for it. It is the score that is corrected;
            `DataSelector(by="loss")` ranks losses as they were measured.
    """

    keep: float | Sequence[float] | DataSelector | None = None
    threshold: float | None = None
    selector: Policy | None = None
    when: When = "training"
    start_epoch: int | None = None
    readmit: bool = False
    correct_drift: bool | None = None
    end_epoch: int | None = None

    def __post_init__(self) -> None:
        one_of("when", self.when, get_args(When))
        ways = [name for name in ("keep", "threshold", "selector") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise InputError(f"Pass one of keep, threshold and selector, got {' and '.join(ways)}.")
        for name, kind in (("threshold", numbers.Real), ("start_epoch", WHOLE), ("end_epoch", WHOLE)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                raise InputError(f"{name} must be a {'whole ' * (kind is WHOLE)}number, got {value!r}.")
        if self.selector is not None and not callable(getattr(self.selector, "select", None)):
            raise InputError(f"selector must have a method select(scores), got {self.selector!r}.")
        if isinstance(self.selector, SoftPruning) and self.when == "training" and not self.readmit:
            raise InputError("SoftPruning draws among all rows after every epoch: pass readmit=True.")
        if self.start_epoch is not None and isinstance(self.keep, Sequence):
            raise InputError("A list of shares says itself when filtering begins: leave start_epoch out.")
        if self.end_epoch is not None and (not self.readmit or isinstance(self.keep, Sequence)):
            raise InputError(
                "end_epoch takes dropped rows back: pass readmit=True, and in a list of shares end with 1.0 instead."
            )
        if self.end_epoch is not None and self.end_epoch <= self.first:
            raise InputError(
                f"end_epoch={self.end_epoch}: filtering begins with epoch {self.first}, so nothing would go."
            )
        if self.first < (1 if self.when == "training" else 0):
            raise InputError(
                f"start_epoch={self.start_epoch}: the first epoch has no scores to decide by. "
                "Begin at 1, or measure with when='before'."
            )
        listed = self.keep if isinstance(self.keep, Sequence) else [self._share]
        if not listed:
            raise InputError("keep is an empty list: give a share, or a list with a share for each epoch.")
        for share in listed:
            if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 < share <= 1:
                raise InputError(f"keep is the share that stays, above 0 and at most 1, got {share}.")
        if isinstance(self.keep, Sequence) and self.when == "training" and listed[0] != 1:
            raise InputError(
                f"keep begins with {listed[0]}: the first epoch has no scores to decide by. "
                "Begin the list with 1.0, or measure with when='before'."
            )
        if not self.readmit and any(later > earlier for earlier, later in itertools.pairwise(listed)):
            raise InputError("keep rises, but rows once dropped stay dropped. Pass readmit=True to take them back.")
        _ = self.policy  # a threshold that is none is refused now

    @property
    def first(self) -> int:
        """The first epoch that may train on fewer rows."""
        if self.start_epoch is None:
            return 1 if self.when == "training" else 0
        return self.start_epoch

    def ended(self, epoch: int) -> bool:
        """Whether an epoch trains on all rows again."""
        return self.end_epoch is not None and epoch >= self.end_epoch

    def decides(self, epoch: int) -> bool:
        """Whether something is decided before an epoch; otherwise it trains on what the last one did."""
        if self.when == "before" and not self.has_shares:  # a policy is asked once
            return epoch in (self.first, self.end_epoch)
        return epoch >= self.first

    @property
    def policy(self) -> Policy:
        """Who decides."""
        if self.selector is not None:
            return self.selector
        if self.threshold is not None:
            return DataSelector(threshold=self.threshold)
        return self.keep if isinstance(self.keep, DataSelector) else DataSelector()

    @property
    def _share(self) -> float:
        """The one share, where there is one."""
        keep = self.keep.keep if isinstance(self.keep, DataSelector) else self.keep
        if isinstance(keep, Mapping):
            raise InputError("keep has a share for each group: in training, pass a policy of your own as selector=.")
        if isinstance(self.keep, DataSelector) and self.keep.stratify_by is not None:
            raise InputError(
                "A share of each stratum is none of the whole: pass the DataSelector as selector=, and readmit=True."
            )
        return 0.5 if keep is None or isinstance(keep, Sequence) else keep

    @property
    def has_shares(self) -> bool:
        """Whether the number of rows of every epoch is known beforehand."""
        policy = self.policy
        return self.selector is None and isinstance(policy, DataSelector) and policy.threshold is None

    def shares(self, epochs: int) -> list[float]:
        """The share of each epoch, of a run of so many. Raises InputError for a list that is longer than the run."""
        if not isinstance(self.keep, Sequence):
            return [1.0 if epoch < self.first or self.ended(epoch) else self._share for epoch in range(epochs)]
        if len(self.keep) > epochs:
            raise InputError(f"keep has {len(self.keep)} shares and the run {epochs} epochs: leave some out.")
        return [*self.keep, *[self.keep[-1]] * (epochs - len(self.keep))]

    def sizes(self, epochs: int, rows: int) -> list[int]:
        """Rows of each epoch, of `rows` in all; all of them where a policy will decide."""
        if not self.has_shares:
            return [rows] * epochs
        return [rows - dropped_of(rows, share) for share in self.shares(epochs)]

    def to_json(self) -> dict[str, Any]:
        """For people, and to compare a run with the one it goes on with."""
        found = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        found["keep"] = dataclasses.asdict(self.keep) if isinstance(self.keep, DataSelector) else self.keep
        found["selector"] = None if self.selector is None else _described(self.selector)
        plain: dict[str, Any] = json.loads(json.dumps(found, default=float))  # numbers and lists of Python's own
        return plain


def decide(
    config: FilterConfig, epoch: int, share: float, scores: ScoreTable, rows: np.ndarray, last: Selection
) -> Selection:
    """The rows of an epoch.

    Args:
        config: what is dropped.
        epoch: which epoch is decided on, counted from 0.
        share: the share of `rows` that is to stay, where shares decide.
        scores: the last score of every row of the user's dataset.
        rows: (N,) the user's rows that can be trained on.
        last: what the epoch before trained on.

    Returns:
        Of all rows of the user's dataset; from `end_epoch` on, all of them. A row without a measurement stays. A row
        whose score is not a number goes: by a policy always, by a share first of all, but no more rows than it says.
    """
    if config.ended(epoch):
        keep, reason = last.keep.copy(), list(last.reason)
        keep[rows] = True
        for row in rows:
            reason[row] = KEPT
        return Selection(keep, reason, {**config.to_json(), "epoch": epoch}, scores.provenance.to_json())
    candidates = rows if config.readmit else rows[last.keep[rows]]
    policy = config.policy
    ranked = policy if isinstance(policy, DataSelector) else DataSelector()
    values, measured = ranked.values(_only(scores, candidates)), scores.column("epoch") >= 0
    broken = candidates[measured[candidates] & ~np.isfinite(values[candidates])]
    judged = candidates[measured[candidates] & np.isfinite(values[candidates])]
    keep, reason = last.keep.copy(), list(last.reason)
    keep[candidates] = True
    when, weight = "" if config.when == "before" else f", after epoch {epoch}", None
    if config.has_shares and isinstance(policy, DataSelector):
        count = len(candidates) - (len(rows) - dropped_of(len(rows), share))
        keep[broken[: max(count, 0)]] = False
        stays = drop_count(values[judged], min(max(count - len(broken), 0), len(judged)), policy.end())
        keep[judged] = stays
        why = dict.fromkeys(judged[~stays], _share_reason(policy, share))
    else:
        found = policy.select(_only(scores, judged))
        keep[judged], keep[broken] = found.keep[judged], False
        if found.weight is not None:
            weight = keep.astype(np.float64)
            weight[judged] = found.weight[judged]
            if not (np.isfinite(weight[keep]) & (weight[keep] > 0)).all():
                raise InputError("A policy's weight of a row that stays is finite and above 0: drop the row instead.")
        why = {row: found.reason[row] for row in judged[~found.keep[judged]]}
    for row in candidates:
        reason[row] = KEPT if keep[row] else f"{why.get(row, f'{ranked.what} is {values[row]}')}{when}"
    return Selection(keep, reason, {**config.to_json(), "epoch": epoch}, scores.provenance.to_json(), weight)


def most_common(reasons: Sequence[str]) -> str:
    """The reason that most rows have, for people."""
    reason, count = Counter(reasons).most_common(1)[0]
    return f"{count} of {len(reasons)} rows have '{reason}'"


def _described(policy: Policy) -> dict[str, Any]:
    """What can be compared between two runs: the class, and the settings where it is a dataclass."""
    fields: tuple[Any, ...] = dataclasses.fields(policy) if dataclasses.is_dataclass(policy) else ()
    settings = {each.name: _plain(getattr(policy, each.name)) for each in fields}
    return {"policy": type(policy).__qualname__, **settings}


def _plain(value: Any) -> Any:
    """A setting as it can be written; an array by a hash of it."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(value).data) if isinstance(value, np.ndarray) else value


def _share_reason(policy: DataSelector, share: float) -> str:
    end = policy.end()
    ends = "largest and smallest" if end == "both" else end
    what = "" if policy.what == "score" else f" by {policy.what}"
    return f"{ends} {per_cent_dropped(share)}{what}"


def _only(scores: ScoreTable, rows: np.ndarray) -> ScoreTable:
    """The same table, in which only these rows have a score."""
    hidden = np.ones(len(scores), dtype=bool)
    hidden[rows] = False
    reasons = [why or ("not ranked" if hide else None) for why, hide in zip(scores.reasons, hidden, strict=True)]
    columns = {name: scores.table[name] for name in scores.table.column_names}
    for name in columns:
        if name not in ("sample_id", "reason"):
            columns[name] = pa.array(scores.table[name].to_numpy(), mask=hidden)
    return ScoreTable(pa.table({**columns, "reason": pa.array(reasons, pa.string())}), scores.provenance)
