"""What a pass costs from its start to its first batch: rows in Parquet, prepared by one or more processes, and again.

    python benchmarks/scale.py prepare --rows 1000000 --processes 1 2
    python benchmarks/scale.py prepare --rows 10000000 --processes 2 --folder /data/scale    # 40 GB on the disk

Rows are tokens and labels, 250 each, 2 kB as 32-bit numbers; TRL's own work on a row, which a text's tokenising is part
of, is replaced by handing on the row. `--by_trl` leaves it in. CPU seconds are printed because they do not depend on
what else a machine does.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TOKENS, PROMPT = 250, 60
FILES = 16
AT_ONCE = 10_000
BASE = Path(__file__).resolve().parents[1] / "resofilter_trainer" / "demo" / "base"


def prepare(rows: int, processes: list[int], by_trl: bool, folder: str | None) -> None:
    """Print what each process needs to read the rows, to prepare them, and to start again."""
    print(f"{rows:,} rows; microseconds of CPU are a row of the dataset and a process\n")
    titles = ("processes", "start", "seconds to the first batch", "of these, loading", "CPU s of a process", "us a row")
    print("| " + " | ".join((*titles, "peak MB")) + " |\n" + "|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        place.mkdir(parents=True, exist_ok=True)
        for count in processes:
            file = write(place / f"rows-{count}", rows)
            for start in ("first", "again"):
                show(count, start, rows, run(file, count, by_trl))


def write(folder: Path, rows: int) -> Path:
    """Write rows of random tokens into several files, as datasets of this size are, unless they are there."""
    if folder.exists():
        return folder
    each, part = -(-rows // FILES), folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a start that was killed
    part.mkdir()
    for number, start in enumerate(range(0, rows, each)):
        write_file(part / f"rows-{number:02d}.parquet", min(each, rows - start), number)
    return part.rename(folder)


def write_file(path: Path, rows: int, seed: int) -> None:
    """Write the rows of one file."""
    random, offsets = np.random.default_rng(seed), pa.array(np.arange(AT_ONCE + 1) * TOKENS, pa.int32())
    with pq.ParquetWriter(path, pa.schema({name: pa.list_(pa.int32()) for name in ("input_ids", "labels")})) as file:
        for start in range(0, rows, AT_ONCE):
            ids = random.integers(3, 60, (AT_ONCE, TOKENS), dtype=np.int32)
            labels = ids.copy()
            labels[:, :PROMPT] = -100
            columns = [pa.ListArray.from_arrays(offsets, pa.array(each.ravel())) for each in (ids, labels)]
            file.write_table(pa.table(dict(zip(("input_ids", "labels"), columns, strict=True))).slice(0, rows - start))


def run(file: Path, processes: int, by_trl: bool) -> list[dict[str, float]]:
    """What each process of one start has measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{file}.cache"}
    own = [str(Path(__file__).resolve()), str(file), str(int(by_trl))]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    done = subprocess.run([sys.executable, *launch, *own], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def show(processes: int, start: str, rows: int, found: list[dict[str, float]]) -> None:
    most = {name: max(each[name] for each in found) for name in found[0]}
    each_row = most["preparing"] / rows * 1e6
    cells = [processes, start, f"{most['wall']:.1f}", f"{most['loading']:.1f}", f"{most['preparing']:.1f}"]
    print("| " + " | ".join(map(str, [*cells, f"{each_row:.2f}", f"{most['peak']:.0f}"])) + " |", flush=True)


def worker(file: str, by_trl: bool) -> None:
    """One process: load, prepare, arrange the batches."""
    begun = time.perf_counter()
    import torch
    from accelerate import PartialState

    from resofilter_trainer.data import token_shares
    from resofilter_trainer.data.loading import default_arguments, open_pass
    from resofilter_trainer.data.preparation import ByTrl
    from resofilter_trainer.scoring.batches import arrange

    args = default_arguments()
    if not by_trl:
        token_shares.by_trl = lambda rows, *others: ByTrl(rows, "", {})
    _ = args.device
    loading = time.perf_counter()
    with PartialState().main_process_first():
        dataset = loaded(file)
    loading, cpu = time.perf_counter() - loading, time.process_time()
    _, opened = open_pass(str(BASE), dataset, None, args, {})
    batches = arrange(opened.prepared, 8192, torch.device("cuda"))  # in batches as a GPU has them
    found: dict[str, Any] = {"wall": time.perf_counter() - begun, "loading": loading, "batches": len(batches)}
    found |= {"preparing": time.process_time() - cpu, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}
    print(json.dumps(found), flush=True)


def loaded(file: str) -> Any:
    """The rows, converted to Arrow unless they are already."""
    from resofilter_trainer import load_rows

    return load_rows(file)


if __name__ == "__main__":
    worker(sys.argv[1], bool(int(sys.argv[2])))
