"""The ledger of a run, read lazily: a step's rows, a row's life, the spikes. Knows numbers, no text or model."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ..config import InputError, one_of, whole_number
from ..scores.score_table import SCORES_FILE, ScoreTable
from ..selecting.results import selection_file
from ..selecting.selection import Selection
from . import steps
from .dynamics import dynamics_of
from .parts import Part, common_end, folder_of, missing_steps, parts_in
from .schema import COLUMNS, schema_of
from .spikes import THRESHOLD, WINDOW, Spike, ranked, shares, spikes_of

if TYPE_CHECKING:
    import pandas as pd


class Ledger:
    """Which rows were behind each step of a run, and how each row was learnt.

    Made by `Ledger.load`. Opening reads names of files; lines are read when they are asked for, and only the columns
    and steps that an answer needs.

    Columns of a line, one for each row and time it was trained, or with packing for each piece of a row:
        step: counted from 1, as the Trainer logs it.
        epoch: the true epoch, counted from 0.
        micro_batch: the micro-batch of the step, in its process, counted from 0.
        process: the process that trained the row.
        sample_id: the position of the row in the user's dataset.
        loss: the mean over the row's learnt tokens, in nats; NaN without one.
        num_tokens: the number of learnt tokens.
        weight: of the row's loss in that of the step, which is the sum of weight * loss over all lines.
        learning_rate: of the step.
        grad_norm: of the step, before clipping; NaN where it is not known.
        left_out: whether the step's update was left out; nullable, as ledgers of earlier versions do not say it.
        layer_<i>: the resonance of the row in each measured layer.

    Attributes:
        folder: the folder of the parts.
        first, last: the steps that the ledger has.
        processes: the number of processes whose parts are there.
        layers: the measured layers.
        unfinished: the number of steps at the end that only some processes have written, as when a run was killed.
    """

    def __init__(self, folder: Path, parts: dict[int, list[Part]]) -> None:
        self.folder, self._parts = folder, parts
        about = next(iter(parts.values()))[0].about
        self._run, self.layers = str(about["run"]), [int(layer) for layer in about["layers"]]
        self.processes = len(parts)
        self.first = min(each[0].first for each in parts.values())
        self.last = common_end(parts)
        self.unfinished = max(each[-1].last for each in parts.values()) - self.last

    @classmethod
    def load(cls, run: str | os.PathLike[str], partial: bool = False) -> Ledger:
        """Open the ledger of a run.

        Args:
            run: the run's output_dir, the folder of its results in it, or the ledger itself.
            partial: whether to open a ledger that lacks steps or processes. Losses of its steps are then too small.

        Raises:
            InputError: there is no ledger, its parts are of two runs, or some are missing.
        """
        folder = folder_of(run)
        ledger = cls(folder, parts_in(folder))
        ledger._check_run()
        if not partial:
            ledger._check_whole()
        return ledger

    def __len__(self) -> int:
        """The number of lines."""
        if self.unfinished:
            return sum(table.num_rows for table in self.batches(["step"]))
        return sum(part.rows for part in self._all())

    def __repr__(self) -> str:
        processes = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return f"Ledger(steps {self.first:,} to {self.last:,}, {processes}, {len(self._all()):,} parts)"

    # ---- lines

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(schema_of(self.layers).names)

    def batches(
        self, columns: Sequence[str] | None = None, first: int | None = None, last: int | None = None
    ) -> Iterator[pa.Table]:
        """Read the lines in tables of limited size, process after process, each by ascending step.

        Args:
            columns: the columns to read, by default all. `step` is always there.
            first, last: the steps to read, by default all.

        Raises:
            InputError: a part is damaged or of another run, a column does not exist, or a step is no whole number.
        """
        wanted, (start, end) = self._known(columns), self._span(first, last)
        parts = [part for part in self._all() if part.first <= end and part.last >= start]
        return itertools.chain.from_iterable(part.tables(wanted, start, end, self._run) for part in parts)

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All lines, by ascending step and process, in the order of training. Arguments as for `batches`."""
        return self._in_order(self.batches(columns), columns)

    def to_pandas(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """All lines, by ascending step and process, in the order of training. Arguments as for `batches`."""
        return frame_of(self.to_arrow(columns))

    # ---- answers

    def steps(self, first: int | None = None, last: int | None = None) -> pd.DataFrame:
        """A line for each step.

        Args:
            first, last: the steps to read, by default all.

        Returns:
            `step`; `epoch`; `loss`, the sum of weight * loss, as the Trainer logs it; `grad_norm`; `learning_rate`;
            `lines`, the number of rows or pieces; `tokens`, the number of learnt ones; and `left_out`, whether its
            update was left out. A step without a line has no loss and the epoch -1.
        """
        if first is None and last is None:
            return self._steps.copy()
        start, end = self._span(first, last)
        return steps.step_lines(self.batches(steps.READ, start, end), start, end)

    def step(self, step: int) -> pd.DataFrame:
        """The lines of one step.

        Returns:
            All columns, and for each line `resonance`, the mean over the measured layers; `share_of_loss`, its part of
            the step's loss, `weight * loss / sum(weight * loss)`; and `share_of_update`, its part of the step's update,
            `weight * resonance / sum(weight * resonance)`, what the row would move by itself. Both shares are NaN where
            nothing was measured.

        Raises:
            InputError: the ledger has no such step.
        """
        step = whole_number("step", step)
        if not self.first <= step <= self.last:
            raise InputError(f"Step {step} is not in the ledger, which has steps {self.first:,} to {self.last:,}.")
        rows = frame_of(self._in_order(self.batches(first=step, last=step)))
        return rows.assign(resonance=self._resonance(rows), **shares(rows, self._resonance(rows)))

    def row(self, row: int) -> pd.DataFrame:
        """A row's life: a line for each time that it was trained, with packing for each of its pieces.

        Args:
            row: the position of the row in the user's dataset.

        Returns:
            All columns, and `resonance`, the mean over the measured layers.

        Raises:
            InputError: the row was never trained.
        """
        row = whole_number("row", row, least=0)
        found = [*self._lines_of(row)]
        if not found:
            raise InputError(f"Row {row} was not trained in steps {self.first:,} to {self.last:,}{self._why_not(row)}.")
        rows = frame_of(self._in_order(iter(found)))
        return rows.assign(resonance=self._resonance(rows))

    def decisions(self, row: int) -> list[tuple[int, bool, str]]:
        """Whether each epoch was to train on a row, and why: epoch (counted from 0), kept, reason.

        Epochs whose selection the run has not saved are left out.

        Raises:
            InputError: the dataset has no such row.
        """
        row, found, epoch = whole_number("row", row, least=0), [], 0
        while (self.folder.parent / selection_file(epoch)).is_file():
            selection = Selection.load(self.folder.parent / selection_file(epoch))
            if row >= len(selection):
                raise InputError(f"There is no row {row}: the run's dataset has {len(selection):,} rows.")
            found.append((epoch, bool(selection.keep[row]), str(selection.reason[row])))
            epoch += 1
        return found

    def spikes(self, threshold: float = THRESHOLD, window: int = WINDOW, most: int = 20) -> list[Spike]:
        """The steps whose loss or gradient norm stands out, and the rows that explain them, largest first.

        Args:
            threshold: how far a step stands out, in robust standard deviations; see `spikes.stands_out`.
            window: the number of steps that a step is compared with, itself among them.
            most: the number of spikes to return.

        Raises:
            InputError: the window has fewer than 11 steps.
        """
        found = spikes_of(self._steps, threshold, window, whole_number("most", most, least=1))
        return [spike.explained(ranked(self.step(spike.step), spike)) for spike in found]

    def dynamics(self, clusters: int = 100, seed: int = 0) -> ScoreTable:
        """How each row was learnt: the run's scores with the columns of `dynamics.DYNAMICS`.

        Args:
            clusters: the number of clusters of trajectories.
            seed: the seed of the clusters, and of the order of rows within them.

        Raises:
            InputError: the run has not saved scores, which it does at the end of each epoch.
        """
        scores = self.scores()
        if scores is None:
            raise InputError(
                f"'{self.folder.parent}' has no {SCORES_FILE}, which a run writes at the end of each epoch: how rows "
                "are learnt is told from whole epochs."
            )
        lines = self.batches(["epoch", "sample_id", "loss", "num_tokens"])
        return dynamics_of(lines, scores, whole_number("clusters", clusters, least=1), seed)

    def scores(self) -> ScoreTable | None:
        """The scores that the run has saved; None before its first epoch has ended."""
        path = self.folder.parent / SCORES_FILE
        return ScoreTable.load(path) if path.is_file() else None

    # ---- parts

    @cached_property
    def _steps(self) -> pd.DataFrame:
        return steps.step_lines(self.batches(steps.READ), self.first, self.last)

    def _all(self) -> list[Part]:
        return [part for parts in self._parts.values() for part in parts]

    def _lines_of(self, row: int) -> Iterator[pa.Table]:
        """The lines of a row, found by a column of numbers before the others are read."""
        for part in self._all():
            there: list[int] = []
            for table in part.tables(["sample_id"], self.first, self.last, self._run):
                there += table["step"].to_numpy()[table["sample_id"].to_numpy() == row].tolist()
            if there:
                for lines in part.tables(self.columns, there[0], there[-1], self._run):
                    yield lines.filter(pa.array(lines["sample_id"].to_numpy() == row))

    def _resonance(self, rows: pd.DataFrame) -> np.ndarray:
        """(R,) the mean over the measured layers; NaN without one."""
        names = [name for name in schema_of(self.layers).names if name not in COLUMNS]
        if not names:
            return np.full(len(rows), np.nan)
        mean: np.ndarray = rows[names].to_numpy(np.float64).mean(axis=1)
        return mean

    def _in_order(self, tables: Iterator[pa.Table], columns: Sequence[str] | None = None) -> pa.Table:
        """The tables as one, by ascending step; the lines of a step by process, and as they were trained there."""
        schema = schema_of(self.layers)
        empty = pa.schema([schema.field(name) for name in self._known(columns)]).empty_table()
        whole = pa.concat_tables([empty, *(table.replace_schema_metadata(None) for table in tables)])
        if self.processes == 1:
            return whole
        return whole.take(pa.array(np.argsort(whole["step"].to_numpy(), kind="stable")))

    def _known(self, columns: Sequence[str] | None) -> list[str]:
        """The names of the columns to read, `step` first. Raises InputError for one that does not exist."""
        if isinstance(columns, str):
            raise InputError(f"columns is a list of names, got {columns!r}: pass [{columns!r}].")
        for name in columns or ():
            one_of("columns", name, self.columns)
        return self.columns if columns is None else list(dict.fromkeys(("step", *columns)))

    def _span(self, first: int | None, last: int | None) -> tuple[int, int]:
        """The first and the last of the steps to read. Raises InputError for what is no number of a step."""
        start = self.first if first is None else max(whole_number("first", first), self.first)
        return start, self.last if last is None else min(whole_number("last", last), self.last)

    def _why_not(self, row: int) -> str:
        """Why a row was not trained, as far as the run's selections tell."""
        why = next((reason for _, kept, reason in self.decisions(row) if not kept), None)
        return "" if why is None else f": it was dropped ({why})"

    def _check_run(self) -> None:
        """Raise InputError if two processes' first parts are of different runs."""
        for parts in self._parts.values():
            if str(parts[0].about["run"]) != self._run:
                raise InputError(
                    f"'{self.folder}' holds parts of two runs: that of '{parts[0].path}' is not that of "
                    f"'{self._all()[0].path}'. Remove those of one."
                )

    def _check_whole(self) -> None:
        """Raise InputError if steps or processes are missing."""
        for process, start, end in missing_steps(self._parts, self.last):
            what = f"steps {start:,} to {end:,}" if end > start else f"step {start:,}"
            raise InputError(
                f"'{self.folder}' lacks {what} of process {process}. Copy its parts there, or pass partial=True for "
                "what the others have."
            )


def frame_of(lines: pa.Table) -> pd.DataFrame:
    """The lines as a data frame, with nullable booleans, whether any is null or not."""
    import pandas as pd

    return lines.to_pandas(types_mapper={pa.bool_(): pd.BooleanDtype()}.get)
