"""A selection applied to a million rows: its time with and without the check that these are the rows that were scored.

python benchmarks/applying.py --rows 1000000

rows of 200 characters, in memory, on disk and shuffled -> Selection.apply -> seconds
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset, load_from_disk

from resofilter_trainer import Provenance, Selection
from resofilter_trainer.io.digest import hash_rows

LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", np.uint8)


def kinds(rows: Dataset, folder: str) -> Iterator[tuple[str, Dataset]]:
    rows.save_to_disk(folder)
    on_disk = load_from_disk(folder)
    yield "in memory", rows
    yield "on disk", on_disk
    yield "in memory, shuffled", rows.shuffle(seed=1)
    yield "on disk, shuffled", on_disk.shuffle(seed=1)


def selection_of(rows: Dataset) -> Selection:
    """Every second row of these rows."""
    made: dict[str, Any] = dict.fromkeys(("model", "weights", "tokenizer", "template", "dataset"), "")
    source = {"dataset": "rows", "content": hash_rows(rows)}
    provenance = Provenance(**made, rows=len(rows), config={}, preparation={}, versions={}, source=source)
    keep = np.arange(len(rows)) % 2 == 0
    return Selection(keep, np.where(keep, "kept", "dropped").tolist(), {}, provenance.to_json())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="a file for the seconds")
    args = parser.parse_args()
    pool = np.random.default_rng(0).choice(LETTERS, 1 << 20).tobytes().decode()
    texts = [f"{row:010d}{pool[row % 1_000_000 : row % 1_000_000 + 190]}" for row in range(args.rows)]
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in kinds(Dataset.from_dict({"text": texts}), folder):
            selection = selection_of(rows)
            for check in (True, False) * args.rounds:
                start = time.perf_counter()
                selection.apply(rows, check_rows=check)
                label = f"{name}, {'checked' if check else 'not checked'}"
                found.setdefault(label, []).append(time.perf_counter() - start)
    for label, seconds in found.items():
        print(f"{label:32} {float(np.median(seconds)):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
