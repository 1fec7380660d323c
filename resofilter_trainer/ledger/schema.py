"""What the ledger of a run consists of: its files and its columns. Knows no values.

output_dir/resofilter/ledger/process-0/00000001-00000250.parquet    lines of steps 1 to 250, of the first process
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from ..scores.score_table import LAYER

LEDGER = "ledger"  # the folder, in that of the run's results
KEY = "resofilter_ledger"  # the metadata key of a part: JSON with `version`, `run`, `process`, `processes`, `layers`
VERSION = 1
PROCESS = "process-"
COLUMNS = {
    "step": pa.int32(),  # counted from 1, as the Trainer logs it; lines are in the order of the steps
    "epoch": pa.int32(),  # the true epoch, counted from 0
    "micro_batch": pa.int32(),  # of the step, in this process, counted from 0
    "process": pa.int32(),
    "sample_id": pa.int64(),  # the position of the row in the user's dataset
    "loss": pa.float32(),  # the mean over the row's learnt tokens, in nats, as the Trainer trains on it
    "num_tokens": pa.int32(),  # learnt tokens
    "weight": pa.float32(),  # of the row's loss in that of the step: the sum of weight * loss is what is logged
    "learning_rate": pa.float32(),  # of the first group of parameters
    "grad_norm": pa.float32(),  # of the step, before clipping, as the Trainer logs it; NaN where it is not known
    "left_out": pa.bool_(),  # whether the step's update was left out, by `on_spike`, `skip_update` or fp16
}  # and, for each measured layer, a float32 `layer_<i>`: the resonance of the row there

ADDED = ("left_out",)  # columns that the parts of earlier versions lack: their values are null


def schema_of(layers: Sequence[int]) -> pa.Schema:
    """The columns of a ledger with these measured layers."""
    return pa.schema([*COLUMNS.items(), *((f"{LAYER}{layer}", pa.float32()) for layer in layers)])


def part_name(first: int, last: int) -> str:
    """The file of the steps from `first` to `last`."""
    return f"{first:08d}-{last:08d}.parquet"


def steps_of(part: Path) -> tuple[int, int]:
    """The first and the last step of a file. Raises ValueError for another file's name."""
    first, last = part.stem.split("-")
    return int(first), int(last)
