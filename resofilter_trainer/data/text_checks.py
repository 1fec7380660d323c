"""Checks of a dataset's texts that need no model, and the record of what they find. Knows rows, not what is checked."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..config import ColumnMapping, InputError, check_keywords, check_kind
from ..config.keywords import ColumnOptions
from ..io.digest import ARROW, hash_rows, shards_in
from ..io.files import file_at, load_parquet, save_parquet
from ..scores.provenance import Provenance
from ..scores.row_record import RowRecord
from ..scores.score_table import ScoreTable
from .chat import said
from .checks import CHECKS, OTHER, Found, Texts
from .columns import media_columns
from .layout import RENDERED, TOKENS
from .repeated_texts import has_minhash
from .rows import empty_rows, read_rows

CHECKS_FILE = "checks.parquet"
KEY = "resofilter_checks"  # the Parquet metadata that holds what was checked
OPTIONS = (*(each.name for each in dataclasses.fields(ColumnMapping)), "source")
EARLIER = "content_arrow"  # in the source
READ = "cannot be read"  # begins the reason of a row without a meaning
RARE = 1 / 3  # of the prompts, at most, are empty where an empty one is a fault


@dataclass(frozen=True, eq=False)
class TextChecks(RowRecord):
    """What checks have found, for every row of the user's dataset.

    Attributes:
        table: `sample_id`; a column for each check that was made: the other row that it names, or True, null where it
            has found nothing; `reason`, everything that was found, in words.
        source: where the dataset comes from, and the digest of its rows as `content`; that of an earlier version, which
            scores may have, as `content_arrow`.
        left_out: the checks that were not made, and why.
    """

    table: pa.Table
    source: Mapping[str, Any]
    left_out: Mapping[str, str]

    def __len__(self) -> int:
        return self.table.num_rows

    def __repr__(self) -> str:
        found = ", ".join(f"{count:,} {name}" for name, count in self.counts.items() if count)
        return f"TextChecks({len(self):,} rows: {found or 'nothing found'})"

    def _columns(self) -> Mapping[str, Any]:
        return dict(zip(self.table.column_names, self.table.columns, strict=True))

    def _made_from(self) -> object:
        return dict(self.source), dict(self.left_out)

    @property
    def names(self) -> list[str]:
        """The checks that were made."""
        return [name for name in CHECKS if name in self.table.column_names]

    @property
    def counts(self) -> dict[str, int]:
        """The number of rows in which each check has found something."""
        return {name: len(self) - self.table[name].null_count for name in self.names}

    @property
    def reasons(self) -> list[str | None]:
        """What was found in each row, in words; None for nothing."""
        return self.table["reason"].to_pylist()

    @property
    def unreadable(self) -> list[int]:
        """The rows that have no single meaning; their reason says why."""
        return [row for row, why in enumerate(self.reasons) if why is not None and why.startswith(READ)]

    def rows(self, checks: Sequence[str] | None = None) -> np.ndarray:
        """The rows in which some checks have found something, ascending.

        Args:
            checks: the names of the checks; by default those whose rows are usually dropped (`drops` in `CHECKS`).

        Raises:
            InputError: a check is not known, or was not made.
        """
        chosen = self._chosen(checks)
        for name in chosen:
            if name not in self.names:
                why = self.left_out.get(name, "there is no such check")
                raise InputError(f"The check '{name}' was not made: {why}. There are: {', '.join(self.names)}.")
        found = np.zeros(len(self), dtype=bool)
        for name in chosen:
            found |= self.table[name].is_valid().to_numpy()
        return np.flatnonzero(found)

    def drop(self, scores: ScoreTable, checks: Sequence[str] | None = None) -> ScoreTable:
        """The same scores, in which the rows of some checks have none: every policy drops them, for these reasons.

        Args:
            scores: the scores of all rows of the dataset that was checked.
            checks: as for `rows`.

        Raises:
            InputError: as for `rows`; or the scores are of other rows.
        """
        check_kind("scores", scores, ScoreTable, "a ScoreTable, as score_dataset returns")
        self._check_rows(scores.provenance)
        rows = self.rows(checks)
        ids, reasons = scores.table["sample_id"].to_numpy(), scores.reasons
        hidden = np.isin(ids, rows)
        why = self.reasons
        reasons = [
            why[row] if hide and own is None else own for row, hide, own in zip(ids, hidden, reasons, strict=True)
        ]
        columns = []
        for field in scores.table.schema:
            values = scores.table[field.name]
            if field.name == "reason":
                values = pa.array(reasons, pa.string())
            elif field.name != "sample_id":
                values = pc.if_else(pa.array(hidden), pa.scalar(None, field.type), values)
            columns.append(values)
        provenance = dataclasses.replace(
            scores.provenance, source={**scores.provenance.source, "checks": self._chosen(checks)}
        )
        return ScoreTable(pa.table(columns, schema=scores.table.schema), provenance)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to a Parquet file, or to `checks.parquet` in a folder; whole or not at all. Returns the file."""
        metadata = json.dumps({"source": dict(self.source), "left_out": dict(self.left_out)})
        return save_parquet(self.table, file_at(path, CHECKS_FILE), {KEY: metadata})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TextChecks:
        """Read what `save` wrote. Raises InputError for a missing, damaged or foreign file."""
        table, metadata = load_parquet(file_at(path, CHECKS_FILE), KEY, "checks")
        try:
            values = json.loads(metadata)
            found = cls(table, dict(values["source"]), dict(values["left_out"]))
            if not {"sample_id", "reason"} <= {*table.column_names} or not found.names:
                raise ValueError("columns are missing")
            return found
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"The checks at '{path}' were written by another version. Make them again.") from error

    def _chosen(self, checks: Sequence[str] | None) -> list[str]:
        return [name for name in self.names if CHECKS[name].drops] if checks is None else list(checks)

    def _check_rows(self, provenance: Provenance) -> None:
        """Raise InputError unless scores are of the rows that were checked."""
        if len(self) != provenance.rows:
            raise InputError(
                f"The checks are of {len(self)} rows and the scores of {provenance.rows}: check them again."
            )
        other = provenance.source.get("content", "")
        own = self.source.get(EARLIER if other.startswith(ARROW) else "content") or self.source.get("content", "")
        if shards_in(other):
            raise InputError(
                "Scores of shards do not show that they are of the checked rows: join them with dataset=, the whole "
                "dataset."
            )
        if other and own.partition(":")[0] != other.partition(":")[0]:
            raise InputError(
                "The checks and the scores were written by different versions, so nothing shows that they are of the "
                "same rows: make the older ones again."
            )
        if other and own != other:
            raise InputError("The checks are of other rows than the scores, or in another order: check them again.")


def check_texts(
    dataset: Dataset,
    checks: Sequence[str] | None = None,
    *,
    text_field: str = "text",
    **row_options: Unpack[ColumnOptions],
) -> TextChecks:
    """Look for repeats, contradictions, cut and damaged texts; needs no model.

    Args:
        dataset: the rows as they would be scored, texts or chats.
        checks: the checks to make, by their names in `CHECKS`; by default all. Without `rensa`
            (`pip install "resofilter_trainer[checks]"`), near duplicates are left out.
        text_field: the column in which TRL looks for text.
        **row_options: which columns are prompt and answer, as for `score_dataset`; `source`, where the rows come from.

    Raises:
        InputError: the dataset has no rows or no texts, or a check or option is not known.
    """
    check_keywords(row_options, OPTIONS)
    columns: dict[str, Any] = dict(row_options)
    source = dict(columns.pop("source", None) or {})
    check_kind("checks", checks, (list, tuple, type(None)), "a list of names of checks")
    for name in checks or ():
        if name not in CHECKS:
            raise InputError(f"There is no check '{name}'. There are: {', '.join(CHECKS)}.")
    read = read_rows(dataset, ColumnMapping(**columns), text_field)
    if TOKENS in read.passed:
        raise InputError("The rows are tokens, and checks read texts: pass the rows before they were tokenised.")
    texts, left_out = _texts(read.dataset, text_field), _left_out(read.dataset)
    chosen = [name for name in CHECKS if name not in left_out and (checks is None or name in checks)]
    if not chosen:
        why = "; ".join(f"{name}: {left_out[name]}" for name in checks or ())
        raise InputError(f"There is no check to make. {why or 'Name some, or leave checks out'}.")
    found = {name: CHECKS[name].find(texts) for name in chosen}
    table = _table(found, read.positions, read.refused, len(dataset))
    left_out = {name: why for name, why in left_out.items() if checks is None or name in checks}
    digests = {"content": hash_rows(dataset), EARLIER: hash_rows(dataset, ARROW)}
    return TextChecks(table, {**source, **digests}, left_out)


def _left_out(dataset: Dataset) -> dict[str, str]:
    """The checks that cannot be made of a dataset, and why."""
    found = {}
    if not has_minhash():
        found["near_duplicate"] = "it needs the library rensa, pip install 'resofilter_trainer[checks]'"
    for name in media_columns(dataset):
        why = f"the column '{name}' is not compared, and rows may differ in it alone"
        found |= dict.fromkeys(("exact_duplicate", "near_duplicate", "endings_differ"), why)
    return found


def _texts(dataset: Dataset, text_field: str) -> Texts:
    """The texts of rows under TRL's column names."""
    made = Texts([], [], [], [], dict.fromkeys(empty_rows(dataset, text_field), "has no answer"))
    names = [
        name for name in ("prompt", "completion", "messages", text_field, *RENDERED) if name in dataset.column_names
    ]
    for row in (row for batch in dataset.select_columns(names).iter(1000) for row in _rows(batch)):
        if "completion" in row:
            before, last = row.get("prompt"), row["completion"]
        elif "messages" in row:
            before, last = (row["messages"] or [])[:-1], (row["messages"] or [])[-1:]
        else:
            before, last = None, row[text_field]
        calls = [each["tool_calls"] for each in last if each.get("tool_calls")] if isinstance(last, list) else []
        given = [row[name] for name in RENDERED if row.get(name)]
        made.prompts.append(said(before))
        made.questions.append(said(before[-1:]) if isinstance(before, list) else said(before))
        made.answers.append(said(last) + (f"\n{json.dumps(calls, default=str)}" if calls else ""))
        made.extras.append(json.dumps(given, default=str) if given else "")
    asked = "completion" in names or "messages" in names
    if asked and sum(not each.strip() for each in made.prompts) <= RARE * len(made):
        for number, prompt in enumerate(made.prompts):
            if not prompt.strip():
                made.empty.setdefault(number, "has no prompt")
    return made


def _rows(batch: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _table(
    found: Mapping[str, Mapping[int, Found]], positions: np.ndarray, refused: Mapping[int, str], rows: int
) -> pa.Table:
    """A line for every row of the user's dataset; rows and the rows they name are given their positions there."""
    reasons: list[list[str]] = [[] for _ in range(rows)]
    for row, why in refused.items():
        reasons[row].append(f"{READ}: {why}")
    columns: dict[str, Any] = {"sample_id": np.arange(rows)}
    for name, lines in found.items():
        named = CHECKS[name].names
        values: list[Any] = [None] * rows
        for row, line in lines.items():
            place, other = int(positions[row]), None if line.other is None else int(positions[line.other])
            values[place] = other if named else True
            reasons[place].append(line.reason.replace(OTHER, str(other)))
        columns[name] = pa.array(values, pa.int64() if named else pa.bool_())
    columns["reason"] = pa.array(["; ".join(each) or None for each in reasons], pa.string())
    return pa.table(columns)
