"""The store at millions of rows, its parts by processes, joined shards, rows per second by processes, what comes before
the first batch, streams, a slow group, and simulated stragglers and failures.

    python benchmarks/scale.py store --rows 1000000 10000000
    python benchmarks/scale.py parts --processes 1024 --hours 24
    python benchmarks/scale.py join --rows 100000000 --shards 64
    python benchmarks/scale.py processes --processes 1 2
    python benchmarks/scale.py prepare --rows 1000000 --processes 1 2
    python benchmarks/scale.py streams --rows 1000
    python benchmarks/scale.py groups --batches 400
    python benchmarks/scale.py simulate
    python benchmarks/scale.py plan --rows 1e8 --tokens 500 --parameters 70e9

The simulation assigns batches with the library's `guided_chunks` to processes of which some are slow or fail. `plan`
computes the numbers in SCALE.md.
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scale_groups
import scale_parts
import scale_preparation
import scale_streams

from resofilter_trainer import DataSelector, Provenance, ScoreTable, Selection, Trust, join_scores, select_file
from resofilter_trainer.io.store import UNIT, Store
from resofilter_trainer.scores.shards import SHARD, shard_place, span_of_shard
from resofilter_trainer.scoring.distribution import guided_chunks

ROWS_PER_PART, ROWS_PER_UNIT = 50_000, 16
LAYERS = ("layer_29", "layer_30", "layer_31")
HOUR = 3600.0
FAILURES = 419 / (54 * 24 * 16_384)  # per device and hour: Llama 3 (arXiv 2407.21783, section 3.3.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    store = what.add_parser("store")
    store.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parts = what.add_parser("parts")
    parts.add_argument("--processes", type=int, default=1024)
    parts.add_argument("--hours", type=float, default=24, help="that are counted")
    parts.add_argument("--minutes", type=int, default=11, help="that are simulated with files")
    parts.add_argument("--files", type=int, default=10_000, help="the number of parts that are read")
    join = what.add_parser("join")
    join.add_argument("--rows", type=int, default=10_000_000)
    join.add_argument("--shards", type=int, default=64)
    join.add_argument("--folder", type=Path, help="for the files, 70 bytes a row and twice; by default a temporary one")
    processes = what.add_parser("processes")
    processes.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    processes.add_argument("--rows", type=int, default=4000)
    preparing = what.add_parser("prepare")
    preparing.add_argument("--rows", type=int, default=1_000_000)
    preparing.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    preparing.add_argument("--by_trl", action="store_true", help="with TRL's own work on each row")
    preparing.add_argument("--folder", help="where to write the rows, which stay; by default a temporary folder")
    streams = what.add_parser("streams")
    streams.add_argument("--rows", type=int, default=1000, help="the rows of each of ten files")
    of_groups = what.add_parser("groups")
    of_groups.add_argument("--batches", type=int, default=400)
    of_groups.add_argument("--seconds", type=float, default=0.2, help="the time of a batch; a slow process needs ten")
    simulate = what.add_parser("simulate")
    simulate.add_argument("--hours", type=float, default=24, help="the work of each process, if all are equally fast")
    plan = what.add_parser("plan")
    plan.add_argument("--rows", type=float, default=1e8)
    plan.add_argument("--tokens", type=float, default=500, help="tokens per row")
    plan.add_argument("--parameters", type=float, default=70e9)
    plan.add_argument("--flops", type=float, default=400e12, help="achieved, per second and device")
    plan.add_argument("--over_forward", type=float, default=1.19, help="the cost of scoring over that of a forward")
    args = vars(parser.parse_args())
    commands: dict[str, Callable[..., None]] = {
        "store": at_sizes,
        "parts": scale_parts.parts,
        "join": joined,
        "processes": by_processes,
        "prepare": scale_preparation.prepare,
        "streams": scale_streams.streams,
        "groups": scale_groups.groups,
        "simulate": simulations,
        "plan": costs,
    }
    commands[args.pop("what")](**args)


# ---- the store


def at_sizes(rows: list[int]) -> None:
    print("| rows | " + " | ".join(("append, s", "open, s", "to a table, s", "MB on disk", "load, s", "select half, s",
                                     "memory while appending, MB", "while selecting, MB")) + " |")  # fmt: skip
    print("|---" * 9 + "|")
    for size in rows:
        with tempfile.TemporaryDirectory() as folder:
            found: dict[str, float] = {}
            for step in (append, finish, select):
                found |= in_fresh_process(step, Path(folder), size)
        order = ("append", "open", "table", "disk", "load", "select", "append_memory", "select_memory")
        print(f"| {size:,} | " + " | ".join(f"{found[name]:.2f}" for name in order) + " |", flush=True)


def in_fresh_process(step: Callable[[Path, int], dict[str, float]], folder: Path, rows: int) -> dict[str, float]:
    """The measurements of a step in its own process, whose peak memory is therefore the step's."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_run, args=(step, folder, rows, theirs))
    child.start()
    found: dict[str, float] = ours.recv()
    child.join()
    return found


def _run(step: Callable[[Path, int], dict[str, float]], folder: Path, rows: int, answer: Any) -> None:
    answer.send(step(folder, rows))


def append(folder: Path, rows: int) -> dict[str, float]:
    store = Store(folder / "parts", "scores", {"weights": "0" * 32})
    store.open()
    begun = time.perf_counter()
    for results in made(rows):
        store.append(results)
    seconds, memory = time.perf_counter() - begun, peak()
    disk = sum(path.stat().st_size for path in store.folder.iterdir()) / 1e6
    return {"append": seconds, "append_memory": memory, "disk": disk}


def made(rows: int) -> Iterator[pa.Table]:
    """Results as a pass makes them, one part at a time."""
    random = np.random.default_rng(0)
    for start in range(0, rows, ROWS_PER_PART):
        count = min(ROWS_PER_PART, rows - start)
        unit = (start + np.arange(count)) // ROWS_PER_UNIT
        numbers = {name: random.random(count) for name in ("loss", *LAYERS)}
        yield pa.table({UNIT: unit, **numbers, "num_tokens": random.integers(1, 500, count)})


def finish(folder: Path, rows: int) -> dict[str, float]:
    store = Store(folder / "parts", "scores", {"weights": "0" * 32})
    begun = time.perf_counter()
    store.open()
    done = store.done()
    opened = time.perf_counter() - begun
    assert len(done) == -(-rows // ROWS_PER_UNIT)
    begun = time.perf_counter()
    lines = store.lines()
    layers = {name: lines[name] for name in LAYERS}
    score = np.mean([layers[name].to_numpy() for name in LAYERS], axis=0)
    columns = {"sample_id": np.arange(rows), "score": score, "loss": lines["loss"], "num_tokens": lines["num_tokens"]}
    table = pa.table({**columns, "length": lines["num_tokens"], **layers, "reason": pa.nulls(rows, pa.string())})
    ScoreTable(table, Provenance("m", "w", "t", "", "d", rows, {}, {}, {})).save(folder)
    return {"open": opened, "table": time.perf_counter() - begun}


def select(folder: Path, rows: int) -> dict[str, float]:
    begun = time.perf_counter()
    scores = ScoreTable.load(folder)
    loaded = time.perf_counter()
    selection = DataSelector(keep=0.5).select(scores)
    selected = time.perf_counter()
    assert selection.keep.sum() == rows - rows // 2
    return {"load": loaded - begun, "select": selected - loaded, "select_memory": peak()}


def peak() -> float:
    """The peak memory of this process, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# ---- shards that are joined


def joined(rows: int, shards: int, folder: Path | None) -> None:
    """Synthetic scores of shards: joined, selected from, and compared with the selection in memory where that fits."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        in_fresh_process(partial(make_shards, shards=shards), Path(place), rows)
        print(f"{rows:,} scores of {shards} shards\n\n| | seconds | of one core | peak memory, MB | MB on disk |")
        print("|---" * 5 + "|")
        order = ("seconds", "cpu", "memory", "disk")
        total = np.zeros(2)
        for step in (join_shards, select_half):
            found = in_fresh_process(step, Path(place), rows)
            total += [found["seconds"], found["cpu"]]
            print(f"| {step.__doc__} | " + " | ".join(f"{found[name]:.1f}" for name in order) + " |", flush=True)
        print(f"| together | {total[0]:.1f} | {total[1]:.1f} | | |")


def make_shards(folder: Path, rows: int, shards: int) -> dict[str, float]:
    """Scores as passes over the shards write them: nearly all rows scored, a few left out for a reason."""
    config = {"update": "adamw", "lr": 1e-5, "eps": 1e-8, "n_layers": 3}
    for number in range(shards):
        random, place = np.random.default_rng(number), shard_place(rows, number, shards)
        count = len(span_of_shard(rows, number, shards))
        scored = random.random(count) > 0.001
        layers = {name: 1e-5 * random.random(count) for name in LAYERS}
        numbers = {"score": np.mean(list(layers.values()), axis=0), "loss": random.random(count), **layers}
        columns = {name: pa.array(values, mask=~scored) for name, values in numbers.items()}
        length = pa.array(random.integers(1, 500, count), mask=~scored)
        reason = pa.array(np.full(count, "empty completion"), pa.string(), mask=scored)
        order = ["sample_id", "score", "loss", "num_tokens", "length", *LAYERS, "reason"]
        columns |= {"sample_id": np.arange(count), "num_tokens": length, "length": length, "reason": reason}
        source = {"dataset": "rows", SHARD: place, "content": f"arrow:{number:032x}"}
        trust = Trust(0.999, 64, float(np.ptp(numbers["score"]) / 1e-5))
        made = Provenance("m", "w", "t", "", f"{number:032x}", count, config, {}, {}, source, trust)
        ScoreTable(pa.table({name: columns[name] for name in order}), made).save(folder / f"shard-{number}")
    return {}


def join_shards(folder: Path, rows: int) -> dict[str, float]:
    """join"""
    begun = time.perf_counter(), time.process_time()
    path = join_scores(sorted(folder.glob("shard-*")), folder / "scores")
    return since(*begun) | {"memory": peak(), "disk": path.stat().st_size / 1e6}


def select_half(folder: Path, rows: int) -> dict[str, float]:
    """select half"""
    begun = time.perf_counter(), time.process_time()
    path = select_file(folder / "scores", folder / "kept", DataSelector(keep=0.5))
    found = since(*begun) | {"memory": peak(), "disk": path.stat().st_size / 1e6}
    selection = Selection.load(path)
    scored = rows - sum(reason == "empty completion" for reason in selection.reason)
    assert selection.keep.sum() == scored - scored // 2
    if rows <= 10_000_000:
        assert DataSelector(keep=0.5).select(ScoreTable.load(folder / "scores")) == selection
    return found


def since(seconds: float, cpu: float) -> dict[str, float]:
    """The seconds since then: of the clock, and of this process on all cores."""
    return {"seconds": time.perf_counter() - seconds, "cpu": time.process_time() - cpu}


# ---- processes


def by_processes(processes: list[int], rows: int) -> None:
    """Rows per second of the pass, from the difference of two runs, which has no fixed costs."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from resofilter_trainer.demo.problems import make_problems

    base = Path(__file__).resolve().parents[1] / "resofilter_trainer" / "demo" / "base"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    print("| processes | rows per second | over one process |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = LlamaConfig.from_pretrained(base, num_hidden_layers=12, hidden_size=384, intermediate_size=1024,
                                             num_attention_heads=6, num_key_value_heads=2, head_dim=64)  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        for file in base.glob("token*"):
            (folder / "model" / file.name).write_bytes(file.read_bytes())
        sizes = (rows // 8, rows)
        for size in sizes:
            data = [{"prompt": each.prompt, "completion": each.completion} for each in make_problems(size, seed=0)]
            (folder / f"{size}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        first = 0.0
        for run, count in enumerate(processes):
            seconds = []
            for size in sizes:
                command = ["score", "--model", folder / "model", "--dataset", folder / f"{size}.jsonl"]
                command += ["--output", folder / f"{run}-{size}", "--precision", "float32", "--num_processes", count]
                begun = time.perf_counter()
                whole = [sys.executable, "-m", "resofilter_trainer.cli", *map(str, command)]
                subprocess.run(whole, check=True, env=environment, capture_output=True)
                seconds.append(time.perf_counter() - begun)
            rate = (sizes[1] - sizes[0]) / (seconds[1] - seconds[0])
            first = first or rate
            print(f"| {count} | {rate:.0f} | {rate / first:.2f} |", flush=True)


# ---- stragglers and failures


def simulations(hours: float) -> None:
    print("Slow processes: the time of the pass over its time with perfectly divided work\n")
    print("| processes | slow ones | their speed | next chunk to a free process | equal shares |")
    print("|---" * 5 + "|")
    random = np.random.default_rng(0)
    for processes in (8, 64, 512):
        tokens = np.sort(random.lognormal(5.2, 0.6, processes * 2000 * 4).reshape(-1, 4).sum(1))[::-1]
        for slow, speed in ((1, 0.5), (1, 0.1), (max(processes // 8, 2), 0.5)):
            speeds = np.ones(processes)
            speeds[:slow] = speed
            ideal = tokens.sum() / speeds.sum()
            free = end_of(tokens, speeds) / ideal
            equal = max(tokens[rank::processes].sum() / speeds[rank] for rank in range(processes)) / ideal
            print(f"| {processes} | {slow} | {speed} | {free:.3f} | {equal:.2f} |")
    print(f"\nFailures: {hours:g} h of work for each process; a failure stops all, which resume ten minutes later\n")
    print("| processes | failures | time over that without failures | if nothing were saved |\n|---|---|---|---|")
    for processes in (64, 1024, 16_384):
        kept = [with_failures(hours * HOUR, processes, seed) for seed in range(2000)]
        failures, seconds = np.mean(kept, axis=0)
        rate = processes * FAILURES
        nothing = (np.expm1(rate * hours) / rate) / hours if rate * hours < 50 else np.inf
        print(f"| {processes:,} | {failures:.1f} | {seconds / (hours * HOUR):.3f} | {nothing:.3g} |")


def end_of(tokens: np.ndarray, speeds: np.ndarray) -> float:
    """When the last process ends, if a free process takes the next chunk."""
    free = [(0.0, process) for process in range(len(speeds))]
    end = 0.0
    until = np.concatenate([[0], np.cumsum(tokens)])
    for chunk in guided_chunks(tokens, len(speeds)):
        now, process = heapq.heappop(free)
        now += (until[chunk.stop] - until[chunk.start]) / speeds[process]
        end = max(end, now)
        heapq.heappush(free, (now, process))
    return end


def with_failures(work: float, processes: int, seed: int, restart: float = 600.0) -> tuple[int, float]:
    """Failures and seconds of a pass that saves its results as `passes` does, and resumes after each failure."""
    from resofilter_trainer.scoring.passes import _interval

    random, clock, done, failures = np.random.default_rng(seed), 0.0, 0.0, 0
    while True:
        until = random.exponential(HOUR / (processes * FAILURES))
        if done + until >= work:
            return failures, clock + work - done
        failures += 1
        lost = min(random.uniform(0, _interval(until, processes)), until)  # since each process has saved its last part
        done, clock = done + until - lost, clock + until + restart


# ---- the plan


def costs(rows: float, tokens: float, parameters: float, flops: float, over_forward: float) -> None:
    forward = 2 * parameters * rows * tokens
    scoring = forward * over_forward
    training = 6 * parameters * rows * tokens
    hours = scoring / flops / HOUR
    columns = 8 * (5 + 3)  # sample_id, score, loss, num_tokens, length and three layers
    print(f"tokens                         {rows * tokens:.3g}")
    print(f"FLOPs of scoring               {scoring:.3g}; of an epoch of training {training:.3g}")
    print(f"device hours at {flops:.3g} FLOP/s  {hours:,.0f}; on 1,024 devices {hours / 1024:.1f} h")
    print(f"weights in bfloat16            {2 * parameters / 1e9:.0f} GB; gathered W_up of three layers: see SCALE.md")
    print(f"scores                         {rows * columns / 1e9:.1f} GB, {columns} bytes per row, uncompressed")
    print(f"tokenised rows (int32 x 2)     {rows * tokens * 8 / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
