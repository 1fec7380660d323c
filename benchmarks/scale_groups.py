"""Groups of processes that hold a sharded model, of which one runs at a tenth of the others' speed; real processes.

    python benchmarks/scale.py groups --batches 400

Three processes score rows of the demo's problems: two of them hold a sharded model together, one holds it alone. The
time of a batch is set: whatever is left of it after the measuring is slept, so it does not depend on what else the
machine does. The perfect share is the time in which all would end together, if work could be divided at will.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

BASE = Path(__file__).resolve().parents[1] / "resofilter_trainer" / "demo" / "base"
GROUPS = {"the two together": (0, 1), "the one alone": (2,)}
TENTH = 0.1


def groups(batches: int, seconds: float) -> None:
    """Print how long three processes measure if none is slow, or one group, over the time of a perfect share."""
    titles = (
        "at a tenth of the speed",
        "batches of each process",
        "seconds",
        "perfect share, s",
        "ratio",
        "longer than its s",
    )
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    scores = []
    for slow, ranks in {"none": (), **GROUPS}.items():
        with tempfile.TemporaryDirectory() as temporary:
            found = run(Path(temporary), batches, seconds, ranks)
            scores.append(np.load(Path(temporary) / "scores.npy"))
        speeds = [TENTH if each["rank"] in ranks else 1.0 for each in found]
        perfect = batches * seconds / sum(speeds)
        taken = max(each["end"] for each in found) - min(each["begin"] for each in found)
        late = sum(each["late"] for each in found)
        counts = ", ".join(str(each["batches"]) for each in found)
        print(f"| {slow} | {counts} | {taken:.1f} | {perfect:.1f} | {taken / perfect:.3f} | {late} |", flush=True)
    print(f"\nThe same scores: {all(np.array_equal(each, scores[0]) for each in scores)}")


def run(place: Path, batches: int, seconds: float, slow: tuple[int, ...]) -> list[dict[str, Any]]:
    """What each of the three processes has measured, and when."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    command = [*launcher, __file__, str(place), str(batches), str(seconds), json.dumps(slow)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return [json.loads((place / f"{rank}.json").read_text()) for rank in range(3)]


def work(place: str, batches: str, seconds: str, slow: str) -> None:
    """A process: each batch has one row and takes its time."""
    from datasets import Dataset

    from resofilter_trainer import score_dataset
    from resofilter_trainer.data.loading import default_arguments
    from resofilter_trainer.scoring.dataset import Pass

    rank = int(os.environ["RANK"])
    least = float(seconds) / (TENTH if rank in json.loads(slow) else 1)
    measure, one, times, late = Pass.measure, Pass._measure_batch, list[float](), list[float]()

    def timed(self: Pass, batches: Any, autocast: bool, label: str) -> Any:
        begin, count = time.time(), 0

        def in_time(self: Pass, rows: np.ndarray, shared: int) -> Any:
            nonlocal count
            begun, count = time.time(), count + 1
            found = one(self, rows, shared)
            left = least - (time.time() - begun)
            time.sleep(max(left, 0))
            late.extend([left] if left < 0 else [])
            return found

        if label != "Scoring":  # a few rows, by which the pass is set up
            return measure(self, batches, autocast, label)
        Pass._measure_batch = in_time  # type: ignore[method-assign]
        found = measure(self, batches, autocast, label)
        Pass._measure_batch = one  # type: ignore[method-assign]
        times.extend((begin, time.time(), count))
        return found

    Pass.measure = timed  # type: ignore[method-assign]
    args = default_arguments()
    args.disable_tqdm = True
    rows = Dataset.from_list([{"prompt": f"{i + 100} + 1 = ", "completion": f"{i + 101}"} for i in range(int(batches))])
    scores = score_dataset(
        str(BASE), rows, args=args, sharded=True, group_size=2, tokens_per_batch=1, precision="float32"
    )
    found = {"rank": rank, "begin": times[0], "end": times[1], "batches": times[2], "late": len(late)}
    (Path(place) / f"{rank}.json").write_text(json.dumps(found))
    if rank == 0:
        np.save(Path(place) / "scores.npy", scores.column("score"))


if __name__ == "__main__":
    work(*sys.argv[1:])
