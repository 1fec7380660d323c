"""A score for each row, and what it was made from. Knows nothing of models or policies: Parquet in, Parquet out."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pyarrow as pa

from ..config import InputError, check_kind, with_known_keywords
from ..io.files import file_at, load_parquet, save_parquet
from ..io.hub import HubPath, PushOptions, push_files, record_at
from .cards import as_block, record_card, score_lines
from .doubts import trust_lines
from .full_step import full_step_of, is_saturated, percent, span_of
from .joining import LAYER_VOTE as LAYER_VOTE
from .joining import NAMED_ROW, common_schema, moved, trust_of, with_votes_of_all
from .provenance import Provenance
from .row_record import RowRecord
from .shards import SHARD, Shard, shards_of, whole_of, with_digest_of
from .statistics import LAYER as LAYER

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from huggingface_hub import CommitInfo

SCORES_FILE = "scores.parquet"
KEY = "resofilter_scores"  # the metadata key of the provenance
LAYERS_FOLDER = "layers"  # beside the scores: scores of every layer, for some rows
SAME_PROMPT, EMPTY = "same prompt as row", "empty completion"  # reasons, or their beginnings
OF_GROUP = " of group "  # in the reason of a row that was dropped within its group
WARMED_UP = "warmed_up"  # a column: 1 for the rows that a warm-up has learnt, else 0
PROMPT = "prompt"  # the column with a hash of each row's prompt
OF_PROMPT = " has the same prompt and "  # in the reason of a row that was dropped among those with its prompt
LENGTH = "num_tokens"  # the column of the length that selections take out
CLUSTER = "cluster"  # the unit of a column of names, which have no order


@dataclass(frozen=True, eq=False)
class ScoreTable(RowRecord):
    """The score of every row of the user's dataset, or the reason why it has none.

    `scores["score"]` is a column, `scores[0]` a row, see `RowRecord`. A missing value is null, so pandas shows integers
    as floats.

    Columns:
        sample_id: int64, the position of the row in the user's dataset.
        score: float64; for resonance the mean absolute weight change, about lr.
        loss: float64, the mean over the sample's learnt tokens, in nats.
        num_tokens: int64, the number of learnt tokens.
        length: int64, the number of all tokens.
        prompt: int64, a hash of the tokens before the first learnt one: the same for rows with the same prompt; null
            for a row without one. No number to rank by. Scores of version 0.1.0 and of training runs have none.
        layer_<i>: float64, the score of each measured layer.
        <signal>: float64, each signal that was asked for. The metadata of its Arrow field has its `direction`, the end
            to drop by default (`largest` or `smallest`), its `unit`, `formula` and `source`.
        warmed_up: int64, with a warm-up: 1 for a row that it has learnt, whose loss and scores are smaller for that.
        reason: text, why the row has no score.

    Attributes:
        table: the columns.
        provenance: what the scores were made from.
        seconds: how long each signal took, where it was measured just now; those of one pass share its seconds. Not
            saved.
    """

    table: pa.Table
    provenance: Provenance
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.table.num_rows

    def __repr__(self) -> str:
        values, broken = self._numbers()
        scored = f"{len(values) + broken:,} scored, scores {span_of(values, full_step_of(self.provenance.config))}"
        return f"ScoreTable({len(self):,} rows, {scored}{_not_numbers(broken)})"

    def _columns(self) -> Mapping[str, pa.ChunkedArray]:
        return dict(zip(self.table.column_names, self.table.columns, strict=True))

    def _made_from(self) -> Provenance:
        return self.provenance

    def summary(self) -> str:
        """What the scores are, why rows have none, and what makes them doubtful, in a few lines."""
        values, broken = self._numbers()
        full = full_step_of(self.provenance.config)
        mean = "none" if not len(values) else _mean(values, full)
        scored = f"{len(values) + broken} scored: {span_of(values, full)}, mean {mean}"
        lines = [f"{len(self)} rows, {scored}{_not_numbers(broken)}"]
        for reason, count in count_reasons((why for why in self.reasons if why is not None), 5):
            lines.append(f"  {count} not scored: {reason}")
        lines += warmup_line(self)
        limit = self.provenance.preparation.get("max_length")
        known = limit is not None and "length" in self.table.column_names
        if known and (cut := int((self.column("length") == limit).sum())):
            lines.append(f"  {cut} have max_length {limit} tokens: they were truncated, or are exactly that long")
        return "\n".join([*lines, *trust_lines(self)])

    def _numbers(self) -> tuple[np.ndarray, int]:
        """The scores that are finite numbers, and how many others there are."""
        values = self.column("score")[self.scored]
        finite = values[np.isfinite(values)]
        return finite, len(values) - len(finite)

    def column(self, name: str) -> np.ndarray:
        """A numeric column, with NaN for a missing value. Raises InputError for an unknown column."""
        numeric = [column for column in self.table.column_names if column not in (PROMPT, "reason")]
        if name not in numeric:
            raise InputError(f"The scores have no column '{name}' of numbers. They have: {', '.join(numeric)}.")
        return self.table[name].to_numpy()

    def direction(self, name: str) -> str | None:
        """The end of a column to drop by default, as its metadata has it; None for a column that says nothing."""
        return self._said(name, "direction")

    def is_cluster(self, name: str) -> bool:
        """Whether a column has the numbers of clusters, which are names: their order means nothing."""
        return self._said(name, "unit") == CLUSTER

    def _said(self, name: str, what: str) -> str | None:
        """What the metadata of a column has under a key; None without it."""
        place = self.table.schema.get_field_index(name)
        said = None if place < 0 else (self.table.schema.field(place).metadata or {}).get(what.encode())
        return None if said is None else said.decode("utf-8", "replace")

    @property
    def reasons(self) -> list[str | None]:
        """Why each row has no score; None if it has one."""
        return self.table["reason"].to_pylist()

    @property
    def scored(self) -> np.ndarray:
        """Which rows have a score, (N,) bool."""
        return self.table["reason"].is_null().to_numpy()

    def to_pandas(self) -> pd.DataFrame:
        """All columns, with a line for each row of the dataset."""
        return self.table.to_pandas()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to a Parquet file, or to `scores.parquet` in a folder; complete or not at all. Returns the file."""
        return save_parquet(self.table, file_at(path, SCORES_FILE), {KEY: self.provenance.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, token: str | bool | None = None) -> ScoreTable:
        """Read what `save` wrote, or `push_to_hub` pushed.

        Args:
            path: the folder or file; on the hub, `hf://datasets/owner/name`, with `@revision` after it where needed.
            token: huggingface_hub's, for a path on the hub; by default the one that is logged in.

        Raises:
            InputError: the file is missing, damaged, or something else; or the hub does not give it.
        """
        with record_at(path, SCORES_FILE, "scores", token) as file:
            table, metadata = load_parquet(file, KEY, "scores")
        try:
            scores = cls(table, Provenance.from_json(metadata))
            scores.check_columns()
            return scores
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise InputError(f"The scores at '{path}' were written by another version. Make them again.") from error

    @classmethod
    @with_known_keywords
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> ScoreTable:
        """Load what `push_to_hub` pushed. Arguments and errors as for `load`, which takes them as one path."""
        return cls.load(str(HubPath(repo_id, revision)), token=token)

    def push_to_hub(self, repo_id: str, *, licence: str | None = None, **options: Unpack[PushOptions]) -> CommitInfo:
        """Push to a repository of datasets on the hub, in one commit, with a card that says what the scores are.

        Names of folders of this machine stay here: of a path, others see its last part.

        Args:
            repo_id: `owner/name`; the repository is made if it does not exist.
            licence: the licence of the scored dataset; by default the one that its own card names.
            **options: `private`, `token`, `revision`, `create_pr`, `commit_message`, as for `Dataset.push_to_hub`.

        Raises:
            InputError: nobody is logged in, the token may not write there, or the hub cannot be reached.
        """
        shared = replace(self, provenance=self.provenance.without_folders())
        why = {reason for reason in self.reasons if reason is not None}
        again = score_lines(shared.provenance, any(each.startswith(SAME_PROMPT) for each in why), EMPTY in why)
        card = record_card("ScoreTable", SCORES_FILE, self.provenance, [*as_block(self.summary()), *again], licence)
        return push_files(shared.save, card, repo_id, **options)

    def check_columns(self) -> None:
        """Raise TypeError or ValueError if they are not those of the class docstring."""
        for name, kind in zip(self.table.column_names, self.table.schema.types, strict=True):
            number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
            if not (text if name == "reason" else number):
                raise TypeError(f"{name} has another type")
        if len({*self.table.column_names}) < self.table.num_columns:
            raise ValueError("two columns have the same name")
        if not {"sample_id", "score", "reason"} <= {*self.table.column_names}:
            raise ValueError("columns are missing")
        ids = self.table["sample_id"]
        if not pa.types.is_integer(ids.type) or ids.null_count:
            raise TypeError("sample_id has another type")
        if len(ids) and not 0 <= ids.to_numpy().min() <= ids.to_numpy().max() < self.provenance.rows:
            raise ValueError("sample_id is outside the dataset")

    @classmethod
    def join(cls, tables: Sequence[ScoreTable]) -> ScoreTable:
        """Shards of one dataset's scores as one table, in the dataset's order.

        Args:
            tables: the shards, in any order.

        Raises:
            InputError: the shards were made from different models, data or settings, or two of them have the same row.
        """
        if not tables:
            raise InputError("There are no scores: pass at least one table.")
        for each in tables:
            check_kind("scores", each, ScoreTable, "a ScoreTable, as score_dataset returns")
        first = tables[0]
        for other in tables[1:]:
            differences = first.provenance.differences(other.provenance)
            if differences:
                apart = all(each.startswith(("dataset ", "rows ")) for each in differences)
                hint = " (ScoreTable.concatenate and resofilter join are for shards)" if apart else ""
                raise InputError(f"These scores do not belong together{hint}, they differ in {'; '.join(differences)}.")
            columns = {*first.table.column_names} ^ {*other.table.column_names}
            if columns:
                raise InputError(
                    f"These scores do not belong together: not all have the columns {', '.join(sorted(columns))}. "
                    "Make the older ones again."
                )
        table = pa.concat_tables([each.table for each in tables])
        ids = table["sample_id"].to_numpy()
        if (ids[1:] < ids[:-1]).any():
            table = table.sort_by("sample_id")
            ids = table["sample_id"].to_numpy()
        repeated = ids[1:][ids[1:] == ids[:-1]]
        if len(repeated):
            raise InputError(f"Row {repeated[0]} is scored twice: the same shard was passed more than once.")
        return cls(with_votes_of_all(table) if len(tables) > 1 else table, first.provenance)

    @classmethod
    @with_known_keywords
    def concatenate(
        cls, tables: Sequence[ScoreTable], *, partial: bool = False, dataset: Dataset | None = None
    ) -> ScoreTable:
        """Scores of shards of a dataset, each scored on its own, as one table of the whole dataset.

        A row's `sample_id` becomes its position in the whole. `Selection.apply` takes the whole dataset and compares
        the rows of each shard. Scores of files, or of `dataset.shard(...)`, follow each other as they are passed; those
        of `resofilter score --shard 3/64` know their place. Tables that were joined can be joined again. Scores are
        copied to the bit, and `layer_vote` is made from all rows; prompts that repeat in another shard are not found.

        Args:
            tables: the scores of the shards.
            partial: whether rows of the whole dataset may be missing, until further shards are joined.
            dataset: the whole dataset, whose rows are then compared, and whose digest the table has from then on.

        Raises:
            InputError: the shards were made by different models or settings, two have the same rows, rows are missing,
                or the score of a row depends on all rows of the dataset.
        """
        for each in tables:
            check_kind("scores", each, ScoreTable, "a ScoreTable, as score_dataset returns")
        tables = [cls.join([each]) for each in tables]  # sorted by row
        made = [each.provenance for each in tables]
        names = [f"Table {number}" for number in range(len(tables))]
        whole = whole_of(made, [len(each) for each in tables], names, partial)
        if dataset is not None:
            whole = dataclasses.replace(whole, provenance=with_digest_of(whole.provenance, dataset))
        if len(tables) == 1 and SHARD not in made[0].source:
            return cls(tables[0].table, dataclasses.replace(whole.provenance, trust=made[0].trust))
        schema = common_schema([each.table.schema for each in tables], names)
        rows = [tables[each.table].table.slice(each.start, each.shard.rows) for each in whole.pieces]
        rows = [moved(own, each, 0, schema, names[each.table]) for own, each in zip(rows, whole.pieces, strict=True)]
        joined = cls(with_votes_of_all(pa.concat_tables(rows)), whole.provenance)
        values, config = joined._numbers()[0], made[0].config
        span = float(np.ptp(values)) if len(values) else None
        trust = trust_of([each.trust for each in made], span, is_saturated(values, config), config.get("lr"))
        return cls(joined.table, dataclasses.replace(whole.provenance, trust=trust))

    @property
    def shards(self) -> list[Shard]:
        """The shards that the scores are of, in the order of their rows; one for scores that were made at once."""
        return shards_of(self.provenance)


def warmup_line(scores: ScoreTable) -> list[str]:
    """What the warm-up has cost, if there was one, and how many of the scored rows it has learnt."""
    cost = scores.provenance.warmup
    if not cost:
        return []
    learnt = int((scores.column(WARMED_UP) == 1).sum())
    end = f"; {learnt} scored rows were learnt there, which biases their scores ({WARMED_UP})" if learnt else ""
    size = f"{cost['rows']} rows, {cost['tokens']} tokens, {cost['steps']} steps, {cost['seconds']:g} s"
    return [f"  scored by a copy of the model after a warm-up ({size}){end}"]


def _mean(values: np.ndarray, full_step: float | None) -> str:
    mean = float(values.mean())
    return f"{mean:.6g}" if full_step is None else percent(mean, full_step, float(np.ptp(values)))


def _not_numbers(count: int) -> str:
    return "" if not count else f", {count:,} {'row has' if count == 1 else 'rows have'} a score that is not a number"


def count_reasons(reasons: Iterable[str] | Mapping[str, int], listed: int) -> list[tuple[str, int]]:
    """The most frequent reasons and their counts, in descending order, without the other rows that they name.

    Args:
        reasons: one reason for each row, or how often each occurs.
        listed: the number of reasons to list; the others are summed up in a last entry.
    """
    counts = Counter[str]()
    for each, count in Counter(reasons).items():
        counts[NAMED_ROW.sub("another row", each)] += count
    found = counts.most_common(listed)
    left = len(counts) - len(found)
    return [*found, (f"{left:,} other reasons", counts.total() - sum(count for _, count in found))] if left else found
