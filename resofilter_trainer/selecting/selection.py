"""The record of a decision: keep or drop, with a reason, for every row. Knows nothing of how it was decided."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa

from ..config import InputError, check_kind, with_known_keywords
from ..io.files import file_at, load_parquet, save_parquet
from ..io.hub import HubPath, record_at
from ..io.pieces import TableFile
from ..scores.provenance import Provenance
from ..scores.row_record import RowRecord, as_html
from ..scores.score_table import PROMPT, ScoreTable, count_reasons
from ..scores.shards import SHARDS, difference, missing_of, told
from .applying import OTHER_ROWS, check_dataset, check_stream, kept_of_stream
from .dataset_card import make_card
from .groups import group_lines
from .pushing import push_kept
from .reasons import MANY, columns_of, counts_of, read_in_pieces, write_in_pieces
from .weighted_rows import OF_A_STREAM, WEIGHT, Reminder, keep_weighted, weighted, with_columns

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from huggingface_hub import CommitInfo, DatasetCard

SELECTION_FILE = "selection.parquet"
KEY = "resofilter_selection"  # the Parquet metadata that holds policy and provenance
KEPT = "kept"
LATER = "later"  # in the metadata of a policy's field: a setting that version 0.1.0 lacks
LISTED = 10  # reasons in a summary
COLUMN = "resofilter_"  # prefix of a score's column in an annotated dataset


@dataclass(frozen=True, eq=False)
class Selection(RowRecord):
    """Keep or drop, with a reason, for every row of the user's dataset. A policy builds one with `Selection.of`.

    `selection["reason"]` is a column, `selection[0]` a row, see `RowRecord`.

    Attributes:
        keep: (N,) bool, in the dataset's order.
        reason: N strings; `"kept"` for the kept rows.
        policy: the settings of the policy that decided.
        provenance: the provenance of the scores, as JSON.
        weight: (N,) how much each row's loss counts in training, 0 for a dropped row; None if all rows count alike.

    Raises:
        InputError: `keep` is not an array of bool, or `reason` or `weight` has another length.
    """

    keep: np.ndarray
    reason: Sequence[str]
    policy: Mapping[str, Any]
    provenance: str
    weight: np.ndarray | None = None
    _reminder: Reminder = dataclasses.field(default_factory=Reminder, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.keep, np.ndarray) or self.keep.dtype != bool or self.keep.ndim != 1:
            raise InputError(f"A selection's keep must be an array of bool, (N,), got {type(self.keep).__name__}.")
        for name, values in (("reason", self.reason), ("weight", self.weight)):
            if values is not None and len(values) != len(self):
                raise InputError(f"A selection has {len(self)} rows and a {name} for {len(values)}: give each row one.")

    def __len__(self) -> int:
        return len(self.keep)

    def __repr__(self) -> str:
        dropped = counts_of(self.reason)
        dropped.pop(KEPT, None)
        why = ", ".join(f"{count:,} {why}" for why, count in count_reasons(dropped, 3))
        return f"Selection({int(self.keep.sum()):,} of {len(self):,} kept; dropped: {why or 'none'})"

    def _repr_html_(self) -> str:
        """How many rows are kept, and why the others are not, as a table for a notebook."""
        counts = count_reasons(counts_of(self.reason), LISTED)
        return as_html(repr(self), pd.DataFrame({"rows": [n for _, n in counts], "reason": [why for why, _ in counts]}))

    def _columns(self) -> Mapping[str, Any]:
        columns = {"sample_id": range(len(self)), "keep": self.keep, "reason": self.reason}
        return columns if self.weight is None else {**columns, "weight": self.weight}

    def _made_from(self) -> object:
        return json.loads(self.metadata())

    def summary(self, groups: Sequence[Any] | None = None) -> str:
        """How many rows are kept, and why the others are not, in a few lines.

        Args:
            groups: (N,) the group of each row, such as its source: each group has a line with its kept rows.

        Raises:
            InputError: there is not one group for each row.
        """
        lines = [f"{int(self.keep.sum()):,} of {len(self):,} rows kept"]
        lines += [f"  {count:>8,} {why}" for why, count in count_reasons(counts_of(self.reason), LISTED)]
        return "\n".join([*lines, *([] if groups is None else group_lines(self.keep, self.reason, groups))])

    @classmethod
    def of(
        cls,
        policy: object,
        scores: ScoreTable,
        why: Sequence[str | None] | np.ndarray,
        weight: np.ndarray | None = None,
    ) -> Selection:
        """What a policy decided on scores. A row without a score is dropped, for the reason that the scores give.

        Args:
            policy: the policy, usually `self`. The fields of its dataclass are its settings, except for those with
                `compare=False`.
            scores: the scores of all rows of the dataset.
            why: N values: why each row is dropped, None for a row to keep. `np.full(len(scores), None)` keeps all.
            weight: (N,) how much each kept row's loss counts in training; None if all rows count alike.

        Raises:
            InputError: the scores leave out rows, the number of values is not that of the scores, a reason is not
                text, or a kept row's weight is not finite and above 0.
        """
        check_complete(scores)
        name, why = type(policy).__name__, np.asarray(why, dtype=object)
        for what, values in (("reasons", why), ("weights", weight)):
            if values is not None and np.shape(values) != (len(scores),):
                raise InputError(
                    f"{name} gives {what} for {np.size(values)} rows and the scores have {len(scores)}: "
                    "a policy decides on every row of the scores, also on those without a score."
                )
        scored, keep = scores.scored, np.equal(why, np.array(None)).astype(bool)
        reason = np.where(keep, KEPT, why)
        dropped = why[~keep & scored]
        all_text = all(issubclass(kind, str) for kind in set(map(type, dropped)))
        if not all_text or {"", KEPT} & set(dropped):
            row = next(row for row in np.flatnonzero(~keep & scored) if not _says_why(why[row]))
            raise InputError(f"{name} drops row {row} for the reason {why[row]!r}: say why, in words.")
        keep &= scored
        reason[~scored] = scores.table["reason"].drop_null().to_pylist()
        if weight is not None:
            check_weights(policy, np.asarray(weight)[keep])
            weight = np.where(keep, weight, 0.0)
        return cls(keep, reason.tolist(), settings_of(policy), scores.provenance.to_json(), weight)

    @property
    def sample_ids(self) -> np.ndarray:
        """Positions of the kept rows in the user's dataset, ascending."""
        return np.flatnonzero(self.keep)

    @with_known_keywords
    def apply(self, dataset: Dataset | IterableDataset, *, check_rows: bool = True) -> Any:
        """The kept rows in their original order, of a `Dataset` or of a stream (`IterableDataset`).

        A stream is read once to compare its rows with those that were scored, then it is filtered by the position of
        each row, so it must give the same rows in the same order each time. Of several shards, a single process must
        read it (`dataloader_num_workers=0`); it may be shuffled afterwards, though not by shard.

        Rows that do not count alike have their weights as a column, `resofilter_weight`, times those that they had.
        A training on them needs `SampleWeights.of(selection)`; without, a warning comes with its first batch.

        Args:
            dataset: the dataset as it was scored.
            check_rows: whether all values must be those that were scored. `False` is for the same rows in the same
                order with other columns, such as those before `map_columns`, and for a stream that is not to be read
                twice.

        Raises:
            InputError: the dataset has other rows than was scored, or another number of rows.
        """
        check_dataset(dataset)
        if not isinstance(dataset, Sized):
            source = source_of(self.provenance)
            if check_rows and source.get("content") is not None:
                check_stream(dataset, source, len(self))
            if self.has_weights:
                warnings.warn(OF_A_STREAM, stacklevel=3)
            return kept_of_stream(dataset, self.keep)
        dataset = cast("Dataset", dataset)
        self._check(dataset, check_rows)
        if self.has_weights:
            return keep_weighted(dataset, self.sample_ids, np.asarray(self.weight), self._reminder)
        kept = dataset.select(self.sample_ids)
        return weighted(kept, self._reminder) if WEIGHT in kept.column_names else kept

    def kept_weights(self) -> np.ndarray:
        """(K,) how much the loss of each kept row counts in training, in their order; 1 where all rows count alike.

        For a training loop of one's own: the rows no longer warn that they have weights.
        """
        self._reminder.due = False
        return np.ones(int(self.keep.sum())) if self.weight is None else self.weight[self.keep]

    @property
    def has_weights(self) -> bool:
        """Whether a kept row counts otherwise than once, so that `apply` adds the weights as a column."""
        return self.weight is not None and bool((self.weight[self.keep] != 1).any())

    def _check(self, dataset: Dataset, check_rows: bool) -> None:
        """Raise InputError unless these are the rows that were scored."""
        if len(dataset) != len(self):
            raise InputError(
                f"The selection was made for {len(self)} rows and the dataset has {len(dataset)}. "
                "Apply it to the dataset as it was scored, before any filtering or shuffling."
            )
        where = difference(source_of(self.provenance), dataset) if check_rows else None
        if where is not None:
            raise InputError(f"{OTHER_ROWS}{where}")

    @with_known_keywords
    def annotate(self, dataset: Dataset, scores: ScoreTable, *, check_rows: bool = True) -> Dataset:
        """The kept rows, with the scores as columns: `resofilter_score`, `resofilter_loss` and so on.

        Args:
            dataset, check_rows: as for `apply`.
            scores: the scores of all its rows, in its order.

        Raises:
            InputError: as for `apply`.
        """
        check_kind("scores", scores, ScoreTable, "a ScoreTable, as score_dataset returns")
        names = [name for name in scores.table.column_names if name not in ("sample_id", PROMPT, "reason")]
        columns = {f"{COLUMN}{name}": scores.table[name].take(self.sample_ids).to_pylist() for name in names}
        return with_columns(self.apply(dataset, check_rows=check_rows), columns)

    @with_known_keywords
    def card(
        self,
        licence: str | None = None,
        name: str | None = None,
        group_column: str | None = None,
        *,
        folders: bool = False,
    ) -> DatasetCard:
        """The dataset card of the kept rows: how they were selected, from what, and the commands that repeat it.

        Args:
            licence: the licence of the dataset; by default the one that its own card names.
            name: the name of the filtered dataset.
            group_column: the column of the dataset whose groups each have their share, if any.
            folders: whether to name folders of this machine, as in the card beside the kept rows on a disk. By default,
                others see the last part of a path.
        """
        provenance = Provenance.from_json(self.provenance)
        weights = WEIGHT if self.has_weights else None
        return make_card(provenance, self.reason, KEPT, self.policy, licence, name, group_column, weights, folders)

    def push_to_hub(
        self,
        dataset: Dataset | None,
        repo_id: str,
        scores: ScoreTable | None = None,
        licence: str | None = None,
        *,
        check_rows: bool = True,
        group_column: str | None = None,
        **options: Any,
    ) -> CommitInfo:
        """Push the kept rows to the hub, and with them this selection and their card.

        `datasets` pushes the rows in one commit, and a second one adds the selection and the card. If the first fails,
        nothing is there; if the second does, the rows are there without them: push again. Names of folders of this
        machine stay here.

        Args:
            dataset: as for `apply`; None to push the selection and its card without any row.
            repo_id: `owner/name`.
            scores: the scores to add as columns, if any.
            licence, group_column: as for `card`.
            check_rows: as for `apply`.
            **options: arguments of `Dataset.push_to_hub`, such as `private`, `token` and `revision`.

        Raises:
            InputError: as for `apply`, and as for `ScoreTable.push_to_hub`.
        """
        rows = None if dataset is None else self._rows_to_push(dataset, scores, check_rows)
        card = self.card(licence, repo_id, group_column)
        there, here = Provenance.from_json(self.provenance).without_folders(), Provenance.from_json(self.provenance)
        shared = self if there == here else dataclasses.replace(self, provenance=there.to_json())
        return push_kept(rows, shared.save, SELECTION_FILE, card, repo_id, options)

    def _rows_to_push(self, dataset: Dataset, scores: ScoreTable | None, check_rows: bool) -> Any:
        if scores is None:
            return self.apply(dataset, check_rows=check_rows)
        return self.annotate(dataset, scores, check_rows=check_rows)

    @classmethod
    @with_known_keywords
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> Selection:
        """Load what `push_to_hub` pushed. Arguments and errors as for `load`, which takes them as one path."""
        return cls.load(str(HubPath(repo_id, revision)), token=token)

    def to_pandas(self) -> pd.DataFrame:
        """`sample_id`, `keep` and `reason`, one line per row of the dataset."""
        return self._table().to_pandas()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to a Parquet file, or to `selection.parquet` in a folder; whole or not at all. Returns the file."""
        file, metadata = file_at(path, SELECTION_FILE), {KEY: self.metadata()}
        if len(self) > MANY:
            return write_in_pieces(file, self._columns(), metadata)
        return save_parquet(self._table(), file, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, token: str | bool | None = None) -> Selection:
        """Read what `save` wrote or `push_to_hub` pushed. Arguments and errors as for `ScoreTable.load`."""
        try:
            with record_at(path, SELECTION_FILE, "selection", token) as place:
                file = TableFile.open(place, KEY, "selection")
                many = file.rows > MANY
                columns = read_in_pieces(file) if many else columns_of(load_parquet(place, KEY, "selection")[0])
            values = json.loads(file.metadata)
            policy, provenance = dict(values["policy"]), values["provenance"]
            if "keep_of_groups" in policy:
                policy["keep"] = dict(policy.pop("keep_of_groups"))
            if not isinstance(provenance, str):
                raise TypeError("provenance")
            return cls(**columns, policy=policy, provenance=provenance)
        except InputError:
            raise
        except (TypeError, KeyError, ValueError, pa.ArrowException, RecursionError) as error:
            raise InputError(f"The selection at '{path}' was written by another version. Make it again.") from error

    def metadata(self) -> str:
        """The policy and the provenance as JSON."""
        policy = dict(self.policy)
        if isinstance(policy.get("keep"), Mapping):
            policy["keep_of_groups"] = list(policy.pop("keep").items())  # JSON's keys are strings, groups need not be
        return json.dumps({"policy": policy, "provenance": self.provenance}, default=_as_json)

    def _table(self) -> pa.Table:
        return pa.table({**self._columns(), "sample_id": np.arange(len(self)), "reason": list(self.reason)})


def _as_json(value: Any) -> Any:
    """A setting that JSON does not know: a number of NumPy's as Python's, anything else as its text."""
    return value.item() if isinstance(value, np.generic) else repr(value)


def source_of(provenance: str) -> Mapping[str, Any]:
    """The source of the scores; empty where they were not made from a dataset of the user's."""
    try:
        return json.loads(provenance).get("source") or {}
    except (ValueError, AttributeError):
        return {}


def settings_of(policy: object) -> dict[str, Any]:
    """The settings of a policy: the fields of a dataclass, except for those with `compare=False`; else none.

    A field that a later version has added (`LATER` in its metadata) is left out while it has its default, so that the
    same policy has the settings that an earlier version has written.
    """
    fields: tuple[Any, ...] = dataclasses.fields(policy) if dataclasses.is_dataclass(policy) else ()
    settings = {each.name: getattr(policy, each.name) for each in fields if each.compare}
    added = {each.name: each.default for each in fields if LATER in each.metadata}
    return {name: value for name, value in settings.items() if name not in added or value != added[name]}


def _says_why(reason: object) -> bool:
    return isinstance(reason, str) and reason not in ("", KEPT)


def check_complete(scores: ScoreTable) -> None:
    """Raise InputError unless the scores cover all rows of the dataset."""
    check_all_rows(len(scores), scores.provenance)


def check_all_rows(rows: int, provenance: Provenance) -> None:
    """Raise InputError unless so many scores cover all rows of the dataset."""
    if rows == provenance.rows:
        return
    if SHARDS in provenance.source:
        missing = told(missing_of(provenance), provenance.rows)
        raise InputError(f"{missing} are in no shard: join their scores, too (ScoreTable.concatenate).")
    raise InputError(
        f"The dataset has {provenance.rows} rows and the scores cover {rows}. "
        "Pass the scores of all shards (ScoreTable.join makes one table of them)."
    )


def check_weights(policy: object, weight: np.ndarray) -> None:
    """Raise InputError unless the weights of all kept rows are finite and above 0."""
    if not (np.isfinite(weight) & (weight > 0)).all():
        raise InputError(
            f"{type(policy).__name__} gives a kept row a weight that is not finite and above 0: drop the row instead."
        )
