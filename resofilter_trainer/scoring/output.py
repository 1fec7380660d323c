"""What becomes of a pass: a ScoreTable, in a folder or not, and until then its parts. Knows not what was measured."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import PartialState

from ..config import RESONANCE, NotFiniteError
from ..data.loading import Opened
from ..io.files import file_at
from ..io.store import PARTS, remove_parts
from ..scores.provenance import Trust
from ..scores.score_table import SCORES_FILE, ScoreTable
from .passes import Parts, held


@dataclass(frozen=True)
class PassOutput:
    """Where the scores of a pass are written.

    Attributes:
        path: a folder or a Parquet file; None where the scores are returned only.
        opened: what is scored.
    """

    path: str | os.PathLike[str] | None
    opened: Opened

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, if there is one; parts of this pass that will never be whole are not left there."""
        with held(folder_of(self.path)):
            try:
                yield
            except NotFiniteError:  # with these rows and weights it will be no other
                if PartialState().num_processes == 1:  # else others may still write there
                    self._remove_parts()
                raise

    def earlier(self) -> ScoreTable | None:
        """Scores that are there already; None where there are none. Raises InputError where they are of another."""
        if self.path is None or not file_at(self.path, SCORES_FILE).exists():
            return None
        there = ScoreTable.load(self.path)
        there.provenance.check_same(self.opened.provenance, "scores", self.path)
        return there

    def parts(self, tokens_per_batch: int) -> Parts | None:
        """Where what is done is kept until the scores are whole."""
        if self._parts_folder is None:
            return None
        made_of = {**self.opened.provenance.compared, "tokens_per_batch": tokens_per_batch}
        return Parts(self._parts_folder, "scores", made_of)

    def finish(self, columns: Mapping[str, np.ndarray], trust: Trust | None = None) -> ScoreTable:
        """What was measured of the prepared rows, an (N,) array for each column, as a line for every row of the user's.

        The main process writes it.
        """
        prepared, names, rows = self.opened.prepared, list(columns), self.opened.rows
        ids, missing = prepared.sample_ids, np.ones(rows, dtype=bool)
        missing[ids] = False
        columns = {**columns, "num_tokens": prepared.num_tokens, "length": prepared.lengths}
        found: dict[str, Any] = {"sample_id": np.arange(rows)}
        beside = (each for each in names if each not in ("score", "loss"))
        for name in ("score", "loss", "num_tokens", "length", *beside):
            if name in columns:
                spread = np.zeros(rows, dtype=columns[name].dtype)
                spread[ids] = columns[name]
                found[name] = pa.array(spread, mask=missing)
        found["reason"] = pa.array([self.opened.reasons.get(row) for row in range(rows)], pa.string())
        scores = ScoreTable(pa.table(found), dataclasses.replace(self.opened.provenance, trust=trust))
        if self.path is not None and PartialState().is_main_process:
            scores.save(self.path)
            self._remove_parts()
        return scores

    @property
    def _parts_folder(self) -> Path | None:
        """Of one criterion: those of another pass that was interrupted are none of its business."""
        folder, criterion = folder_of(self.path), self.opened.provenance.config.get("criterion", RESONANCE)
        return None if folder is None else folder / PARTS / re.sub(r"[^\w.-]", "-", str(criterion))

    def _remove_parts(self) -> None:
        if self._parts_folder is not None:
            remove_parts(self._parts_folder)


def folder_of(path: str | os.PathLike[str] | None) -> Path | None:
    """The folder in which the scores' file lies, or will."""
    return None if path is None else file_at(path, SCORES_FILE).parent
