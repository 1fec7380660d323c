"""Writes the lines of one process to a ledger, in parts that are whole or absent. Knows no values, no model.

add -> ... -> end_step -> ... -> flush: a part          a kill loses what is in memory, and a resumed run adds it again
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..io.files import load_parquet, remove_folder, save_parquet
from .schema import COLUMNS, KEY, PROCESS, VERSION, part_name, schema_of, steps_of

MOST_LINES, MOST_STEPS = 1 << 17, 1000  # in memory: some 10 MB
OF_STEP = ("step", "learning_rate", "grad_norm", "left_out")  # the columns that are known when a step ends
REPEATED = ("step", "epoch", "micro_batch", "process", "num_tokens", "learning_rate", "grad_norm")
WHAT = "part of a run's ledger"


class LedgerWriter:
    """Adds the lines of one process to a run's ledger.

    Args:
        folder: the folder of the ledger.
        run: what the parts of this run are known by, a text.
        process, processes: the number of this process, and how many there are.
        layers: the indices of the measured layers.
    """

    def __init__(self, folder: Path, run: str, process: int, processes: int, layers: Sequence[int]) -> None:
        self._folder, self._process, self._run = folder / f"{PROCESS}{process}", process, run
        self._schema = schema_of(layers)
        self._about = {"version": VERSION, "run": run, "process": process, "processes": processes}
        self._about["layers"] = list(layers)
        own = [each for each in self._schema if each.name not in OF_STEP]
        self._columns = {each.name: np.empty(0, each.type.to_pandas_dtype()) for each in own}
        self._lines = 0  # in memory, of which those of the present step come last
        self._ended = 0  # of them, those of steps that have ended
        # number, lines, learning rate, norm of the gradient, whether the update was left out
        self._steps: list[tuple[int, int, float, Any, bool]] = []
        self._written = 0  # the last step of the last part

    def begin(self, step: int) -> None:
        """Begin after a step, 0 for a new run; lines of later steps, and of other runs, are removed."""
        keep_until(self._folder, step, self._run)
        self._written = step

    def add(self, layers: np.ndarray, **columns: Any) -> None:
        """Add lines of the present step.

        Args:
            layers: (N, L) the resonance of each row in each layer.
            **columns: the columns that do not belong to the whole step, (N,) or one number each.
        """
        there, self._lines = self._lines, self._lines + len(layers)
        spread = zip([each.name for each in self._schema][len(COLUMNS) :], layers.T, strict=True)
        for name, values in {**columns, "process": self._process, **dict(spread)}.items():
            column = self._columns[name]
            if len(column) < self._lines:
                column = self._columns[name] = np.resize(column, max(2 * len(column), self._lines, 1024))
            column[there : self._lines] = values

    def end_step(self, step: int, learning_rate: float, grad_norm: Any, left_out: bool = False) -> None:
        """End a step; lines that were added since the last one are its own.

        Args:
            step: its number, counted from 1.
            learning_rate: the learning rate of the step.
            grad_norm: the norm of its gradient, a number or a tensor of one, which is read when it is written.
            left_out: whether its update was left out.
        """
        self._steps.append((step, self._lines - self._ended, learning_rate, grad_norm, left_out))
        self._ended = self._lines
        if self._ended >= MOST_LINES or step - self._written >= MOST_STEPS:
            self.flush()

    def flush(self) -> None:
        """Write the lines of all steps that have ended as a part, also where there are none, as of fillers alone."""
        if not self._steps:
            return
        first, last = self._written + 1, self._steps[-1][0]
        numbers, lines, rates, norms, left_out = zip(*self._steps, strict=True)
        of_steps = {"step": numbers, "learning_rate": rates, "grad_norm": [float(each) for each in norms]}
        of_steps["left_out"] = left_out
        values: Mapping[str, Any] = {name: np.repeat(own, lines) for name, own in of_steps.items()}
        values = {**{name: own[: self._ended] for name, own in self._columns.items()}, **values}
        arrays = [pa.array(np.asarray(values[each.name]), each.type, from_pandas=False) for each in self._schema]
        write_part(pa.table(arrays, self._schema), self._folder / part_name(first, last), self._about)
        waiting = self._lines - self._ended  # lines of a step that has not ended
        for own in self._columns.values():
            own[:waiting] = own[self._ended : self._lines].copy()
        self._written, self._lines, self._ended, self._steps = last, waiting, 0, []


def write_part(table: pa.Table, path: Path, about: Mapping[str, Any]) -> None:
    """Write a part, whole or not at all.

    Args:
        table: its lines.
        path: its file.
        about: its metadata.
    """
    repeated = [name for name in table.column_names if name in REPEATED]
    spread = [name for name in table.column_names if name not in REPEATED]
    floats = [name for name in spread if pa.types.is_floating(table.schema.field(name).type)]
    save_parquet(
        table,
        path,
        {KEY: json.dumps(about)},
        compression="zstd",
        use_dictionary=repeated,
        use_byte_stream_split=[*floats, "sample_id"],
    )


def keep_until(folder: Path, step: int, run: str) -> None:
    """Remove the lines of later steps, and those of other runs, from a process's folder.

    A part that reaches beyond the step is cut: first its content is replaced, then its name.

    Raises:
        InputError: a part that has to be cut is damaged.
    """
    if not step:
        remove_folder(folder)
        return
    for path in sorted(folder.glob("*.parquet")):
        try:
            first, last = steps_of(path)
        except ValueError:  # a temporary file, or not a part
            continue
        if first > step or _run_of(path) not in (None, run):
            path.unlink()
        elif last > step:
            table, about = load_parquet(path, KEY, WHAT)
            kept = table.filter(pa.array(table["step"].to_numpy() <= step))
            write_part(kept.replace_schema_metadata(None), path, json.loads(about))
            path.rename(folder / part_name(first, step))
    for path in folder.glob(".*.part"):  # of a killed process
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _run_of(path: Path) -> str | None:
    """The run of a part; None where it is damaged, which those who read it say."""
    try:
        about = json.loads((pq.read_schema(path, memory_map=True).metadata or {})[KEY.encode()])
        return str(about["run"])
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError):
        return None
