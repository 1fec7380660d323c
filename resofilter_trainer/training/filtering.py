"""Which rows the next epoch of a run trains on. Knows scores and policies, no model, no Trainer."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import numpy as np
import pyarrow as pa
import xxhash

from ..config import InputError, Warmup, at_most_one, number, one_of, warmup_settings, whole_number
from ..config import share as checked_share
from ..scores.score_table import ScoreTable
from ..selecting.data_selector import DataSelector
from ..selecting.per_prompt import OnePerPrompt
from ..selecting.policies import Policy, SoftPruning, ask
from ..selecting.selection import KEPT, Selection, check_weights, settings_of
from ..selecting.shares import drop_count, number_dropped, share_reason

When = Literal["training", "before"]


@dataclass(frozen=True)
class ByShare:
    """A decision by shares of the dataset: the number of rows of every epoch is known before training.

    Attributes:
        ranking: the selector whose ranking is used, without its share.
        shares: the share of each epoch to keep, from the first epoch that filters; the last one repeats.
    """

    ranking: DataSelector
    shares: tuple[float, ...]


@dataclass(frozen=True)
class ByPolicy:
    """A decision by a policy: how many rows it keeps is known only when it has decided."""

    policy: Policy

    @property
    def ranking(self) -> DataSelector:
        """Which values must be finite for a row to be shown to the policy."""
        return self.policy if isinstance(self.policy, DataSelector) else DataSelector()


@dataclass(frozen=True)
class Schedule:
    """The arguments of `FilterConfig`, in a form in which none can contradict another. Epochs are counted from 0.

    Attributes:
        decision: how to decide on the rows of an epoch.
        first: the first epoch that may train on fewer rows.
        end: the first epoch that trains on all rows again; None if there is none.
    """

    decision: ByShare | ByPolicy
    first: int
    end: int | None


@dataclass(frozen=True)
class FilterConfig:
    """Which rows are dropped, how many, and when.

    Attributes:
        keep: the share of the whole dataset that an epoch trains on: one number for all epochs from `start_epoch` on,
            or a list with a share for each epoch, of which the last one repeats. Or a `DataSelector`, whose share is
            meant in the same way.
        threshold: an absolute score above which rows are dropped, instead of `keep`.
        selector: a policy, instead of `keep`. It is asked at the end of every epoch about the rows that are left, or
            with `readmit` about all rows; with `when="before"` it is asked once. Its weights, if it has any, weight
            the rows in SFTTrainer's loss.
        when: `"training"`: the scores of an epoch decide on the next one. `"before"`: the scores at the starting
            weights decide on every epoch.
        start_epoch: the first epoch, counted from 0, that trains on fewer rows; by default 1, or 0 with
            `when="before"`.
        end_epoch: with `readmit`, the first epoch, counted from 0, that trains on all rows again; by default none.
        readmit: whether dropped rows are ranked again, by their last score; otherwise they stay dropped.
        correct_drift: whether the drift of the scores during an epoch is removed (see `drift`); by default if the
            order of the rows is random, as the correction requires. Only the score is corrected:
            `DataSelector(by="loss")` ranks losses as they were measured.
        warmup: with `when="before"`, a short training of a copy of the model, which then scores the rows: the number
            of rows, or a `Warmup`. The run itself starts from the untouched weights. Nothing is kept of the copy,
            unless the `Warmup` names a folder.

    Raises:
        InputError: a setting is not allowed, or two exclude each other.
    """

    keep: float | Sequence[float] | DataSelector | None = None
    threshold: float | None = None
    selector: Policy | None = None
    when: When = "training"
    start_epoch: int | None = None
    readmit: bool = False
    correct_drift: bool | None = None
    end_epoch: int | None = None
    warmup: int | Warmup | None = None
    schedule: Schedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        one_of("when", self.when, get_args(When))
        at_most_one(keep=self.keep, threshold=self.threshold, selector=self.selector)
        object.__setattr__(self, "warmup", warmup_settings(self.warmup))
        if self.warmup is not None and self.when != "before":
            raise InputError("A warm-up tunes a copy that scores the rows before training: pass when='before' with it.")
        first = _first_epoch(self)
        object.__setattr__(self, "schedule", Schedule(_decision(self, first), first, _end_epoch(self, first)))

    @property
    def first(self) -> int:
        """The first epoch that may train on fewer rows."""
        return self.schedule.first

    def ended(self, epoch: int) -> bool:
        """Whether an epoch trains on all rows again."""
        return self.schedule.end is not None and epoch >= self.schedule.end

    def decides(self, epoch: int) -> bool:
        """Whether there is a decision before an epoch; otherwise it trains on the rows of the epoch before."""
        if self.when == "before" and not self.has_shares:  # a policy is asked once
            return epoch in (self.schedule.first, self.schedule.end)
        return epoch >= self.schedule.first

    @property
    def keeps_all(self) -> bool:
        """Whether no row is ever dropped."""
        decision = self.schedule.decision
        return isinstance(decision, ByShare) and all(share == 1 for share in decision.shares)

    @property
    def has_shares(self) -> bool:
        """Whether the number of rows of every epoch is known before training."""
        return isinstance(self.schedule.decision, ByShare)

    def shares(self, epochs: int) -> list[float]:
        """The share of the rows of each epoch in a run of `epochs`; 1 where a policy will decide.

        Raises:
            InputError: `keep` is a list that is longer than the run.
        """
        if isinstance(self.keep, Sequence) and len(self.keep) > epochs:
            raise InputError(f"keep has {len(self.keep)} shares and the run {epochs} epochs: leave some out.")
        return [self._share(epoch) for epoch in range(epochs)]

    def _share(self, epoch: int) -> float:
        decision, since = self.schedule.decision, epoch - self.schedule.first
        if not isinstance(decision, ByShare) or since < 0 or self.ended(epoch):
            return 1.0
        return decision.shares[min(since, len(decision.shares) - 1)]

    def sizes(self, epochs: int, rows: int) -> list[int]:
        """The number of rows of each epoch, of `rows` in the dataset; all of them where a policy will decide."""
        return [rows - number_dropped(rows, share) for share in self.shares(epochs)]

    def to_json(self) -> dict[str, Any]:
        """The arguments as plain values, to show them and to check that a run is resumed with the same ones."""
        found = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.init}
        found["keep"] = settings_of(self.keep) if isinstance(self.keep, DataSelector) else self.keep
        found["selector"] = None if self.selector is None else _described(self.selector)
        found |= {} if found.pop("warmup") is None else {"warmup": cast(Warmup, self.warmup).to_json()}
        plain: dict[str, Any] = json.loads(json.dumps(found, default=float))  # numbers and lists of Python's own
        return plain


def _first_epoch(config: FilterConfig) -> int:
    """The first epoch that filters. Raises InputError where it has no scores to decide by."""
    first_possible = 1 if config.when == "training" else 0
    if config.start_epoch is None:
        return first_possible
    start = whole_number("start_epoch", config.start_epoch)
    if isinstance(config.keep, Sequence):
        raise InputError("A list of shares already says when filtering begins: leave start_epoch out.")
    if start < first_possible:
        raise InputError(
            f"start_epoch={start}: the first epoch has no scores to decide by. "
            "Begin at 1, or measure with when='before'."
        )
    return start


def _end_epoch(config: FilterConfig, first: int) -> int | None:
    """The first epoch on all rows again. Raises InputError where no dropped row could be trained on again."""
    if config.end_epoch is None:
        return None
    end = whole_number("end_epoch", config.end_epoch)
    if not config.readmit or isinstance(config.keep, Sequence):
        raise InputError(
            "end_epoch takes dropped rows back: pass readmit=True, and in a list of shares end with 1.0 instead."
        )
    if end <= first:
        raise InputError(f"end_epoch={end}: filtering begins with epoch {first}, so no row would be dropped.")
    return end


def _decision(config: FilterConfig, first: int) -> ByShare | ByPolicy:
    """How to decide, by `keep`, `threshold` or `selector`, of which at most one is given."""
    if config.selector is not None:
        return ByPolicy(_checked_policy(config.selector, config))
    if config.threshold is not None:
        return ByPolicy(DataSelector(threshold=number("threshold", config.threshold)))
    ranking = config.keep if isinstance(config.keep, DataSelector) else DataSelector()
    keep: Any = config.keep.keep if isinstance(config.keep, DataSelector) else config.keep
    if isinstance(keep, Mapping):
        raise InputError("keep has a share for each group: in training, pass a policy of your own as selector=.")
    if ranking.stratify_by is not None or ranking.band is not None:
        what = "A band of ranks" if ranking.stratify_by is None else "The share of each stratum"
        raise InputError(
            f"{what} is not a share of the whole dataset: pass the DataSelector as selector=, and readmit=True."
        )
    if ranking.threshold is not None:
        return ByPolicy(ranking)
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        return ByShare(ranking, _checked_list(keep, config, first))
    return ByShare(ranking, (0.5 if keep is None else checked_share("keep", keep),))


def _checked_policy(selector: Policy, config: FilterConfig) -> Policy:
    """The user's policy. Raises InputError where it cannot decide in this run."""
    if isinstance(selector, type) or not callable(getattr(selector, "select", None)):
        raise InputError(f"selector must be an object with a method select(scores), got {selector!r}.")
    if isinstance(selector, OnePerPrompt):
        raise InputError(
            "OnePerPrompt needs to know which rows have the same prompt, and a run does not: choose before it, "
            "with OnePerPrompt().select(scores).apply(dataset)."
        )
    if isinstance(selector, SoftPruning) and config.when == "training" and not config.readmit:
        raise InputError("SoftPruning draws among all rows after every epoch: pass readmit=True.")
    return selector


def _checked_list(keep: Sequence[Any], config: FilterConfig, first: int) -> tuple[float, ...]:
    """The shares of a list from the first epoch that filters. Raises InputError where a run cannot follow them."""
    if not keep:
        raise InputError("keep is an empty list: give a share, or a list with a share for each epoch.")
    shares = tuple(checked_share("keep", each) for each in keep)
    if config.when == "training" and shares[0] != 1:
        raise InputError(
            f"keep begins with {keep[0]}: the first epoch has no scores to decide by. "
            "Begin the list with 1.0, or measure with when='before'."
        )
    if not config.readmit and any(later > earlier for earlier, later in itertools.pairwise(shares)):
        raise InputError("keep rises, but dropped rows stay dropped. Pass readmit=True to take them back.")
    return shares[first:] or shares[-1:]


def decide(
    config: FilterConfig,
    epoch: int,
    share: float,
    scores: ScoreTable,
    rows: np.ndarray,
    last: Selection,
    idle: Mapping[int, str] = MappingProxyType({}),
) -> Selection:
    """The rows of an epoch.

    From `end_epoch` on, all rows are kept. A row that was not measured is kept. A row whose score is not finite is
    dropped: always by a policy; by a share before all others, but no more rows than the share says. A row without a
    token to learn counts in no share; it is kept where all rows are to stay, by a share of 1 or from `end_epoch` on.

    Args:
        config: which rows are dropped.
        epoch: the epoch to decide on, counted from 0.
        share: the share of `rows` to keep, where shares decide.
        scores: the last scores of all rows of the user's dataset.
        rows: (N,) the rows of the user's dataset that can be trained on.
        last: the selection of the epoch before.
        idle: other rows, which have no token to learn, each with the reason.

    Raises:
        InputError: a policy returned something that is no selection of all rows.
    """
    candidates = rows if config.readmit else rows[last.keep[rows]]
    why: dict[int, str] = {}
    weight = None
    if not config.ended(epoch):
        why, weight = _judge(config.schedule.decision, share, scores, candidates, len(rows))
    keep, reason = last.keep.copy(), list(last.reason)
    keep[candidates] = True
    keep[list(why)] = False
    when = "" if config.when == "before" else f", after epoch {epoch}"
    for row in candidates.tolist():
        reason[row] = f"{why[row]}{when}" if row in why else KEPT
    all_stay = config.ended(epoch) or (share == 1 and isinstance(config.schedule.decision, ByShare))
    for row, without_token in idle.items():
        keep[row], reason[row] = (True, KEPT) if all_stay else (False, without_token)
    if weight is not None:
        weight = np.where(keep, weight, 0.0)
    return Selection(keep, reason, {**config.to_json(), "epoch": epoch}, scores.provenance.to_json(), weight)


def most_common(reasons: Sequence[str]) -> str:
    """The most frequent reason, as text for a message."""
    reason, count = Counter(reasons).most_common(1)[0]
    return f"{count} of {len(reasons)} rows have '{reason}'"


def _judge(
    decision: ByShare | ByPolicy, share: float, scores: ScoreTable, candidates: np.ndarray, total: int
) -> tuple[dict[int, str], np.ndarray | None]:
    """Which of the candidates are dropped, and why.

    Args:
        decision: how to decide.
        share: the share of all rows to keep, where shares decide.
        scores: the last scores of all rows.
        candidates: the rows to decide on.
        total: the number of rows that can be trained on.

    Returns:
        The reason for each row to drop, and (N,) the weight of every row, if a policy gives weights.
    """
    ranking = decision.ranking
    values = ranking.values(_only(scores, candidates))
    measured = candidates[scores.column("epoch")[candidates] >= 0]
    finite = np.isfinite(values[measured])
    judged, not_finite = measured[finite], measured[~finite]
    if isinstance(decision, ByPolicy):
        why, weight = _by_policy(decision.policy, scores, judged)
    else:
        count = max(len(candidates) - (total - number_dropped(total, share)), 0)
        not_finite, weight = not_finite[:count], None
        keep = drop_count(values[judged], min(count - len(not_finite), len(judged)), ranking.end())
        why = dict.fromkeys(judged[~keep].tolist(), share_reason(share, ranking.end(), ranking.what))
    return why | {row: f"{ranking.what} is {values[row]}" for row in not_finite.tolist()}, weight


def _by_policy(policy: Policy, scores: ScoreTable, rows: np.ndarray) -> tuple[dict[int, str], np.ndarray | None]:
    """Why a policy drops some of these rows, and the weight of every row if it gives weights, 1 for other rows."""
    found = ask(policy, _only(scores, rows))
    keep = found.keep[rows]
    why = {row: found.reason[row] for row in rows[~keep].tolist()}
    if found.weight is None:
        return why, None
    check_weights(policy, found.weight[rows[keep]])
    weight = np.ones(len(scores))
    weight[rows] = found.weight[rows]
    return why, weight


def _described(policy: Policy) -> dict[str, Any]:
    """What can be compared between two runs: the class of a policy, and its settings if it is a dataclass."""
    fields: tuple[Any, ...] = dataclasses.fields(policy) if dataclasses.is_dataclass(policy) else ()
    hidden = {each.name: getattr(policy, each.name) for each in fields if not each.compare}
    settings = {name: _plain(value) for name, value in {**settings_of(policy), **hidden}.items()}
    return {"policy": type(policy).__qualname__, **settings}


def _plain(value: Any) -> Any:
    """A setting as JSON can hold it; an array as its hash."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(value).data) if isinstance(value, np.ndarray) else value


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
