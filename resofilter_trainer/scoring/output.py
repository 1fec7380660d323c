"""The result of a pass: a ScoreTable, in a folder or not, and the parts until then. Does not know what was measured."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import PartialState

from ..config import RESONANCE, NotFiniteError, ScoreWarning
from ..data.loading import Opened
from ..data.sharing import remove_prepared
from ..io.files import file_at
from ..io.store import PARTS, remove_parts
from ..scores.doubts import remarks_of
from ..scores.provenance import Trust
from ..scores.score_table import PROMPT, SCORES_FILE, ScoreTable
from .passes import Parts, locked


@dataclass(frozen=True)
class Measured:
    """What a pass has measured.

    Attributes:
        columns: an array of shape (N,) for each column, by name; one of them is `score`.
        trust: see `Trust`.
        rows: (N,) which of the prepared rows were measured, ascending; by default all of them.
        others: the reason why the other prepared rows have no score.
        seconds: how long each signal took, by name; signals of one pass share it.
        fields: what to say of a column in its metadata, by its name: `direction`, `unit`, `formula`, `source`.
    """

    columns: Mapping[str, np.ndarray]
    trust: Trust | None = None
    rows: np.ndarray | None = None
    others: str = "not measured"
    fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PassOutput:
    """Where the scores of a pass are written.

    Attributes:
        path: a folder or a Parquet file; None where the scores are only returned.
        opened: the rows to score and their provenance.
    """

    path: str | os.PathLike[str] | None
    opened: Opened

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, if there is one, and remove the parts of a pass that can never finish."""
        with locked(folder_of(self.path)):
            try:
                yield
            except NotFiniteError:  # these rows and weights raise it every time
                if PartialState().num_processes == 1:  # otherwise another process may still write there
                    self._remove_parts()
                raise

    def earlier(self) -> ScoreTable | None:
        """The scores that are already there, if any. Raises InputError where they were made from something else."""
        if self.path is None or not file_at(self.path, SCORES_FILE).exists():
            return None
        there = ScoreTable.load(self.path)
        there.provenance.check_same(self.opened.provenance_like(there.provenance.dataset), "scores", self.path)
        self._remove_prepared()
        return there

    def parts(self, tokens_per_batch: int) -> Parts | None:
        """Where to save results until all rows are measured; None where there is no folder."""
        if self._parts_folder is None:
            return None
        made_of = {**self.opened.provenance.compared, "tokens_per_batch": tokens_per_batch}
        if self.opened.provenance.warmup:  # tuning again may differ in the last digits
            made_of["warmup_weights"] = self.opened.provenance.warmup["weights"]
        return Parts(self._parts_folder, "scores", made_of)

    def finish(self, measured: Measured) -> ScoreTable:
        """A table with every row of the user's dataset; the main process writes it and removes the parts."""
        provenance = dataclasses.replace(self.opened.provenance, trust=measured.trust)
        scores = ScoreTable(self._table(measured), provenance, measured.seconds)
        if self.path is not None and PartialState().is_main_process:
            scores.save(self.path)
            self._remove_parts()
        self._remove_prepared()
        return scores

    def _table(self, measured: Measured) -> pa.Table:
        prepared, reasons, rows = self.opened.prepared, self.opened.reasons, self.opened.rows
        if measured.rows is not None:
            reasons = dict.fromkeys(prepared.sample_ids.tolist(), measured.others) | reasons
            prepared = prepared.select(measured.rows)
        ids, missing = prepared.sample_ids, np.ones(rows, dtype=bool)
        missing[ids] = False
        columns = {**measured.columns, "num_tokens": prepared.num_tokens, "length": prepared.lengths}
        prompts = prepared.prompts.column(self.opened.tokenizer.bos_token_id)
        found: dict[str, Any] = {"sample_id": np.arange(rows)}
        for name in dict.fromkeys(("score", "loss", "num_tokens", "length", *measured.columns)):
            if name in columns:
                spread = np.zeros(rows, dtype=columns[name].dtype)
                spread[ids] = columns[name]
                found[name] = pa.array(spread, mask=missing)
            if name == "length":
                index = np.zeros(rows, dtype=np.int64)
                index[ids] = np.arange(len(ids))
                found[PROMPT] = prompts.take(pa.array(index, mask=missing))
        found["reason"] = pa.array([reasons.get(row) if missing[row] else None for row in range(rows)], pa.string())
        schema = pa.schema([each.with_metadata(measured.fields.get(each.name)) for each in pa.table(found).schema])
        return pa.table(found, schema=schema)

    @property
    def _parts_folder(self) -> Path | None:
        """A folder for this criterion alone: the parts of another criterion's interrupted pass stay untouched."""
        folder, criterion = folder_of(self.path), self.opened.provenance.config.get("criterion", RESONANCE)
        return None if folder is None else folder / PARTS / re.sub(r"[^\w.-]", "-", str(criterion))

    def _remove_prepared(self) -> None:
        PartialState().wait_for_everyone()  # another process may still read them
        if PartialState().is_main_process:
            remove_prepared(folder_of(self.path))

    def _remove_parts(self) -> None:
        if self._parts_folder is not None:
            remove_parts(self._parts_folder)


def warn_of_doubts(scores: ScoreTable, stacklevel: int) -> None:
    """Warn of what makes scores doubtful (`ScoreWarning`), in the main process.

    Args:
        scores: the scores, new or read.
        stacklevel: as for `warnings.warn`, counted from here.
    """
    if PartialState().is_main_process:
        for remark in remarks_of(scores).values():
            warnings.warn(remark, ScoreWarning, stacklevel=stacklevel)


def say_left_out(signals: Mapping[str, str]) -> None:
    """Print which of all signals have no column, in the main process.

    Args:
        signals: the reason of each, by its name.
    """
    if signals and PartialState().is_main_process:
        named = "; ".join(f"{name}, because {reason}" for name, reason in signals.items())
        print(f"Signals left out: {named}.")


def folder_of(path: str | os.PathLike[str] | None) -> Path | None:
    """The folder of the scores' file, whether the file exists or not."""
    return None if path is None else file_at(path, SCORES_FILE).parent
