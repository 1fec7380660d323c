"""The ledger of a run as it is on the disk, part by part, and the losses that the Trainer has logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from transformers import Trainer

from resofilter_trainer.io.files import load_parquet
from resofilter_trainer.ledger.schema import KEY, LEDGER, PROCESS, schema_of, steps_of


def parts_of(output: Path, process: int = 0) -> list[Path]:
    """The parts of a process, in order."""
    return sorted((output / "resofilter" / LEDGER / f"{PROCESS}{process}").glob("*"))


def lines(output: Path, processes: int = 1) -> pd.DataFrame:
    """All lines, of which each part holds those of its own steps, in their order."""
    tables, runs = [], set()
    for process in range(processes):
        end = 0
        for path in parts_of(output, process):
            table, about = load_parquet(path, KEY, "part of a ledger")
            found, (first, last), steps = json.loads(about), steps_of(path), table["step"].to_numpy()
            assert end < first <= last
            assert ((steps >= first) & (steps <= last)).all()  # there may be none, as of fillers alone
            assert (np.diff(steps) >= 0).all()
            assert table.schema.remove_metadata() == schema_of(found["layers"])
            assert (found["process"], found["processes"]) == (process, processes)
            assert (table["process"].to_numpy() == process).all()
            runs.add(found["run"])
            tables.append(table)
            end = last
    assert len(runs) == 1
    return pa.concat_tables(tables).to_pandas()


def losses(found: pd.DataFrame) -> np.ndarray:
    """The loss of each step, as the lines of all processes make it."""
    return (found["loss"].astype(float) * found["weight"].astype(float)).groupby(found["step"]).sum().to_numpy()


class Unrounded:
    """What a trainer logs of each step, before transformers 4 rounds the loss to four digits."""

    def __init__(self, trainer: Trainer) -> None:
        self.steps: list[dict[str, Any]] = []
        inner: Any = trainer._maybe_log_save_evaluate

        def see(loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
            logs = trainer.control.should_log
            mean = trainer.accelerator.gather(loss.detach().reshape(1)).mean().item()
            inner(loss, grad_norm, *args, **kwargs)
            if logs:
                norm = float("nan") if grad_norm is None else float(grad_norm)
                self.steps.append({"loss": mean, "grad_norm": norm, "learning_rate": kwargs["learning_rate"]})

        trainer.__dict__["_maybe_log_save_evaluate"] = see

    def column(self, name: str) -> np.ndarray:
        return np.array([each[name] for each in self.steps])
