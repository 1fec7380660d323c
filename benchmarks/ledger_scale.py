"""A ledger of many lines: the time and memory to open it, to read one step, a row's life, and the spikes.

python benchmarks/ledger_scale.py --lines 100000000 --json ledger_scale.json

synthetic lines -> parts -> a fresh process for each question -> seconds, peak memory of the process

One line is planted with a high loss; the spikes have to name its row first. The parts have just been written, so they
are read from memory where that holds them.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resofilter_trainer import Ledger
from resofilter_trainer.ledger.schema import KEY, LEDGER, PROCESS, VERSION, part_name, schema_of
from resofilter_trainer.selecting.results import NAME

LAYERS = (25, 26, 27)
OF_STEP = ("step", "epoch", "micro_batch", "process", "learning_rate", "grad_norm", "num_tokens", "left_out")
MB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows_per_step", type=int, default=64)
    parser.add_argument("--part", type=int, default=1 << 17, help="lines of a part")
    parser.add_argument("--folder", type=Path, help="where to keep the ledger; by default it is removed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        started = time.perf_counter()
        planted = write(folder, args.lines, args.epochs, args.rows_per_step, args.part)
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        print(
            f"{args.lines:,} lines written in {time.perf_counter() - started:.0f} s, {size / args.lines:.1f} bytes each"
        )
        found: dict[str, Any] = {"lines": args.lines, "bytes_a_line": size / args.lines}
        print("| question | seconds | peak memory, MB |\n|---|---|---|")
        for name, ask in QUESTIONS.items():
            seconds, memory, answer = measured(ask, folder, planted)
            found[name] = {"seconds": seconds, "peak_mb": memory, "answer": answer}
            print(f"| {name} | {seconds:.3f} | {memory:,.0f} |")
        print(f"named first: row {found['spikes']['answer']}; planted: row {planted['row']}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def write(folder: Path, lines: int, epochs: int, rows_per_step: int, part: int) -> dict[str, int]:
    """Write the ledger of one process. Returns the planted row and its step.

    Row i of an epoch is at place `stride * i + epoch` modulo the number of rows: an order that needs no memory.
    """
    rows, draw = max(lines // epochs, 1), np.random.default_rng(0)
    stride = next(number for number in range(int(0.618 * rows) | 1, 2 * rows + 3) if math.gcd(number, rows) == 1)
    planted = lines // 2
    step_of_planted = planted // rows_per_step + 1
    per_part = max(part // rows_per_step, 1) * rows_per_step
    row = 0
    for start in range(0, lines, per_part):
        at = np.arange(start, min(start + per_part, lines))
        step, epoch = at // rows_per_step + 1, np.minimum(at // rows, epochs - 1)
        ids = (stride * (at - epoch * rows) + epoch) % rows
        tokens = draw.integers(20, 400, len(at))
        loss = (0.8 + 1.5 * np.exp(-step / 2000)) * draw.lognormal(0, 0.35, len(at))
        if at[0] <= planted <= at[-1]:
            loss[planted - start], row = 60.0, int(ids[planted - start])
        of_step = (at - start) // rows_per_step
        columns = {
            "step": step,
            "epoch": epoch,
            "micro_batch": at % rows_per_step // 8,
            "process": np.zeros(len(at)),
            "sample_id": ids,
            "loss": loss,
            "num_tokens": tokens,
            "weight": tokens / np.add.reduceat(tokens, np.arange(0, len(at), rows_per_step))[of_step],
            "learning_rate": 1e-5 * (1 - step * rows_per_step / lines),
            "grad_norm": draw.lognormal(0, 0.2, len(at) // rows_per_step + 1)[of_step],
            "left_out": np.zeros(len(at)),
            **{f"layer_{layer}": 9e-6 * (1 + 0.05 * draw.random(len(at))) for layer in LAYERS},
        }
        schema = schema_of(LAYERS)
        arrays = [pa.array(columns[field.name].astype(field.type.to_pandas_dtype())) for field in schema]
        save(pa.table(arrays, schema), folder / NAME / LEDGER / f"{PROCESS}0" / part_name(int(step[0]), int(step[-1])))
    return {"row": row, "step": step_of_planted}


def save(table: pa.Table, path: Path) -> None:
    """Write a part, encoded as a run writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"version": VERSION, "run": "synthetic", "process": 0, "processes": 1, "layers": [*LAYERS]}
    pq.write_table(
        table.replace_schema_metadata({KEY: json.dumps(about)}),
        path,
        compression="zstd",
        use_dictionary=list(OF_STEP),
        use_byte_stream_split=[name for name in table.column_names if name not in OF_STEP],
        write_page_checksum=True,
    )


def opened(ledger: Ledger, planted: dict[str, int]) -> Any:
    """What opening gives."""
    return ledger.last


def one_step(ledger: Ledger, planted: dict[str, int]) -> Any:
    """The number of rows of the planted step."""
    return len(ledger.step(planted["step"]))


def life(ledger: Ledger, planted: dict[str, int]) -> Any:
    """The number of visits of the planted row."""
    return len(ledger.row(planted["row"]))


def spikes(ledger: Ledger, planted: dict[str, int]) -> Any:
    """The row that the spikes name first."""
    found = ledger.spikes()
    return int(found[0].rows["sample_id"][0]) if found else None


QUESTIONS: dict[str, Callable[[Ledger, dict[str, int]], Any]] = {
    "open": opened,
    "step": one_step,
    "row": life,
    "spikes": spikes,
}


def measured(ask: Callable[..., Any], folder: Path, planted: dict[str, int]) -> tuple[float, float, Any]:
    """Seconds (of opening and the question), peak memory in MB and answer, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (ask, folder, planted))


def _measured(ask: Callable[..., Any], folder: Path, planted: dict[str, int]) -> tuple[float, float, Any]:
    import pandas  # noqa: F401, as a session of Python has it

    started = time.perf_counter()
    answer = ask(Ledger.load(folder), planted)
    seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB, answer


if __name__ == "__main__":
    main()
