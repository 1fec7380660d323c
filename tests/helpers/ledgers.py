"""Ledgers without a run: lines by the schema, in parts. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resofilter_trainer.ledger.schema import KEY, LEDGER, PROCESS, VERSION, part_name, schema_of
from resofilter_trainer.selecting.results import NAME

LAYERS = (3, 5)
Line = dict[str, Any]


def part(lines: Sequence[Line], layers: Sequence[int] = LAYERS) -> pa.Table:
    """Lines as a table; what a line leaves out is 0, its weight 1."""
    schema = schema_of(layers)
    usual = {**dict.fromkeys(schema.names, 0), "weight": 1.0, "num_tokens": 1, "learning_rate": 0.5, "loss": 1.0}
    usual["left_out"] = False
    return pa.Table.from_pylist([{**usual, **line} for line in lines], schema)


def write_part(
    output_dir: Path,
    table: pa.Table,
    first: int,
    last: int,
    process: int = 0,
    processes: int = 1,
    run: str = "r0",
    layers: Sequence[int] = LAYERS,
    **options: Any,
) -> Path:
    """A part as a run writes it; `options` are those of `pyarrow.parquet.write_table`."""
    folder = output_dir / NAME / LEDGER / f"{PROCESS}{process}"
    folder.mkdir(parents=True, exist_ok=True)
    about = {"version": VERSION, "run": run, "process": process, "processes": processes, "layers": [*layers]}
    pq.write_table(table.replace_schema_metadata({KEY: json.dumps(about)}), folder / part_name(first, last), **options)
    return folder / part_name(first, last)


def write_ledger(output_dir: Path, lines: Sequence[Line], every: int = 10, processes: int = 1) -> Path:
    """Lines of one or several processes in parts of `every` steps. Returns `output_dir`."""
    last = max(line["step"] for line in lines)
    for process in range(processes):
        for first in range(1, last + 1, every):
            end = min(first + every - 1, last)
            own = [line for line in lines if first <= line["step"] <= end and line.get("process", 0) == process]
            write_part(output_dir, part(own), first, end, process, processes)
    return output_dir


def drawn(steps: int, rows: int = 4, seed: int = 0, processes: int = 1, epochs: int = 1) -> list[Line]:
    """Lines of `steps` steps of `rows` rows in each process, whose losses fall as they are learnt."""
    draw = np.random.default_rng(seed)
    per_step = rows * processes
    count = steps * per_step
    ids = np.concatenate([draw.permutation(count // epochs) for _ in range(epochs)])
    found = []
    for at, row in enumerate(ids.tolist()):
        step, place = at // per_step + 1, at % per_step
        loss = 1.5 + 3 * np.exp(-step / 20) + 0.3 * draw.standard_normal()
        tokens = int(draw.integers(5, 40))
        found.append(
            {
                "step": step,
                "epoch": at * epochs // count,
                "process": place // rows,
                "sample_id": row,
                "loss": float(np.float32(loss)),
                "num_tokens": tokens,
                "grad_norm": float(np.float32(1 + 0.1 * draw.standard_normal() ** 2)),
                "learning_rate": 0.5 / step,
                "layer_3": 1e-3 * (1 + 0.1 * draw.random()),
                "layer_5": 2e-3,
            }
        )
    for step in range(1, steps + 1):
        own = found[(step - 1) * per_step : step * per_step]
        total = sum(line["num_tokens"] for line in own)
        for line in own:
            line["weight"] = float(np.float32(line["num_tokens"] / total))
            line["grad_norm"] = own[0]["grad_norm"]
    return found
