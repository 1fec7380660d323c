"""What each process reads of a stream of several files, and what it costs to resume when nine tenths are scored.

    python benchmarks/scale.py streams --rows 1000

A stream of ten Parquet files, each with so many rows, is scored by the demo's base model: by two processes; and by one,
which stops before the last file and is started again. CPU seconds are printed because they do not depend on what else a
machine does. The last lines are of datasets' own `state_dict` on one Parquet file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, load_dataset

FILES = 10
BASE = Path(__file__).resolve().parents[1] / "resofilter_trainer" / "demo" / "base"
MARK = "RESULT "


def streams(rows: int) -> None:
    """Print rows read and CPU seconds, of each process and of a start after nine tenths."""
    print("| | process | rows read | CPU s until the missing rows are scored | CPU s of all |\n" + "|---" * 5 + "|")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for number in range(FILES):
            write(place / "rows" / f"{number}.parquet", number * rows, rows)
        for name, processes, output, stop in (
            ("two processes", 2, "two", False),
            ("one process, until nine tenths", 1, "one", True),
            ("started again", 1, "one", False),
        ):
            for found in run(place, processes, output, rows * (FILES - 1), stop):
                before = f"{found['before']:.1f}" if name == "started again" else ""
                print(f"| {name} | {found['rank']} | {found['rows']:,} | {before} | {found['cpu']:.1f} |", flush=True)
        same = (place / "one" / "scores.parquet").read_bytes() == (place / "two" / "scores.parquet").read_bytes()
        print(f"\nThe same bytes: {same}\n")
    state()


def write(path: Path, first: int, rows: int) -> None:
    """Write rows that differ in their numbers."""
    path.parent.mkdir(exist_ok=True)
    numbers = range(first, first + rows)
    columns = {"prompt": [f"{i} + {i % 7} = " for i in numbers], "completion": [f"{i + i % 7}" for i in numbers]}
    pq.write_table(pa.table(columns), path)


def run(place: Path, processes: int, output: str, missing: int, stop: bool) -> list[dict[str, Any]]:
    """What each process of a pass has read and needed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, __file__, str(place / "rows"), str(place / output), str(missing), str(int(stop))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = [json.loads(line.partition(MARK)[2]) for line in done.stderr.splitlines() if MARK in line]
    if len(found) != processes or done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return sorted(found, key=lambda each: each["rank"])


def work(rows: str, output: str, missing: str, stop: str) -> None:
    """A process of a pass."""
    from resofilter_trainer import score_stream
    from resofilter_trainer.data.files import load_stream
    from resofilter_trainer.data.loading import default_arguments
    from resofilter_trainer.scoring import stream as streaming

    pieces, score, read, before = streaming._pieces, streaming.score_dataset, [0], [0.0]

    def counted(stream: IterableDataset, size: int) -> Iterator[Dataset]:
        for piece in pieces(stream, size):
            read[0] += len(piece)
            yield piece

    def timed(model: Any, piece: Dataset, *args: Any, **options: Any) -> Any:
        if piece[0]["prompt"].startswith(f"{missing} + "):
            before[0] = time.process_time() - begun
            if int(stop):
                raise KeyboardInterrupt
        return score(model, piece, *args, **options)

    vars(streaming).update(_pieces=counted, score_dataset=timed)
    args = default_arguments()
    args.disable_tqdm = True
    begun = time.process_time()
    with contextlib.suppress(KeyboardInterrupt):
        score_stream(str(BASE), load_stream(rows), output, args=args, rows_per_piece=1000)
    found = {"rank": int(os.environ["RANK"]), "rows": read[0], "before": before[0]}
    print(MARK + json.dumps(found | {"cpu": time.process_time() - begun}), file=sys.stderr, flush=True)


def state(rows: int = 300_000) -> None:
    """Seconds to the next row with datasets' own state, after nine tenths of one file; and whether it is that row."""
    print("| datasets' state_dict, one Parquet file | CPU s to read nine tenths | CPU s to resume | the next row |")
    print("|---" * 4 + "|")
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary) / "rows" / "0.parquet", 0, rows)
        files = [str(Path(temporary) / "rows" / "0.parquet")]
        for name, size in (("as Arrow, 1,000 rows at a time", 1000), ("filtered, row by row", 1)):
            first, second = (load_dataset("parquet", data_files=files, split="train", streaming=True) for _ in range(2))
            if size == 1:
                first, second = (each.filter(lambda row: True) for each in (first, second))
            else:
                first, second = (each.with_format("arrow") for each in (first, second))
            begun = time.process_time()
            rest = first.iter(batch_size=size)
            for _ in itertools.islice(rest, (rows * 9 // 10 + size) // size):
                pass
            read = time.process_time() - begun
            second.load_state_dict(first.state_dict())
            begun = time.process_time()
            found = next(second.iter(batch_size=size), None)
            resumed = time.process_time() - begun
            right = "right" if found == next(rest) else "none" if found is None else "another one"
            print(f"| {name} | {read:.2f} | {resumed:.2f} | {right} |")


if __name__ == "__main__":
    work(*sys.argv[1:])
