"""Jobs that are killed at random moments and started again must write the same bytes as jobs that are not killed.

    python tests/kills.py --runs 60

Kills one or all processes of a job by SIGKILL, while it scores, selects, cleans tokens, or trains with the callback.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
from datasets import load_from_disk
from helpers.tokenizers import make_tokenizer
from helpers.training import arguments, llama, rows, train
from helpers.versions import older_than

from resofilter_trainer import ResonanceCallback, TokenCleaning, score_dataset
from resofilter_trainer.cli.entry import main as resofilter
from resofilter_trainer.data import shared_rows, sharing, surveys
from resofilter_trainer.data.files import load_stream
from resofilter_trainer.io import digest, store
from resofilter_trainer.scoring import passes, stream
from resofilter_trainer.tokens.cleaning import clean_dataset
from resofilter_trainer.training.checkpoints import last_complete

SILENCE = 6  # seconds after which the other process counts a killed one as lost
LIMIT = 180  # seconds for one start of a job, which takes a few
STARTS = 20
KEEP = [1.0, 0.6, 0.3]  # of the rows, epoch by epoch
FORK = multiprocessing.get_context("fork")  # a child does not import everything again


@dataclass(frozen=True)
class Job:
    """Something that writes files.

    Attributes:
        run: takes a folder of inputs and an output folder, and resumes from what is there.
        results: globs of its result's files in the output folder.
        processes: the number of its processes.
    """

    run: Callable[[Path, Path], None]
    results: tuple[str, ...]
    processes: int = 1


def prepare(inputs: Path) -> None:
    """Write a base model, a reference model and rows."""
    tokenizer = make_tokenizer()
    for name, seed in (("base", 0), ("reference", 1)):
        llama(len(tokenizer), seed=seed).save_pretrained(inputs / name)
        tokenizer.save_pretrained(inputs / name)
    rows(120).save_to_disk(inputs / "rows")
    for shard in range(4):
        rows(120).shard(4, shard).to_parquet(inputs / "shards" / f"{shard}.parquet")


def score(inputs: Path, output: Path) -> None:
    args = arguments(output, ddp_timeout=SILENCE)
    options = {"output": output, "tokens_per_batch": 48, "signals": ["ifd", "jitter"]}
    dataset = load_from_disk(own_copy(inputs / "rows", output / "rows"))  # beside which prepared rows are kept
    score_dataset(str(inputs / "base"), dataset, args=args, **options)


def score_a_stream(inputs: Path, output: Path) -> None:
    args, pieces = arguments(output, ddp_timeout=SILENCE), stream._pieces
    stream._pieces = lambda shard, size: pieces(shard, 20)
    rows = load_stream(str(inputs / "shards"))
    stream.score_stream(str(inputs / "base"), rows, output, args=args, tokens_per_batch=48)


def own_copy(folder: Path, place: Path) -> Path:
    """A copy of a folder, made by whichever process is first."""
    if not place.exists():
        copy = Path(shutil.copytree(folder, place.with_name(f"{place.name}-{os.getpid()}")))
        with contextlib.suppress(OSError):  # another process was first
            copy.rename(place)
    return place


def select(inputs: Path, output: Path) -> None:
    shutil.copytree(inputs / "scored", output / "scores", dirs_exist_ok=True)
    command = ["select", str(output / "scores"), "--dataset", str(inputs / "rows"), "--output", str(output / "kept")]
    resofilter([*command, "--keep", "0.4"])


def clean(inputs: Path, output: Path) -> None:
    args = arguments(output, ddp_timeout=SILENCE)
    cleaning = TokenCleaning(reference=str(inputs / "reference"), tokens_per_batch=48)
    clean_dataset(str(inputs / "base"), load_from_disk(inputs / "rows"), cleaning, args=args, output=output)


def train_with_callback(inputs: Path, output: Path) -> None:
    train_often_saved(output, ResonanceCallback(keep=KEEP))


def train_on_packs(inputs: Path, output: Path) -> None:
    callback = ResonanceCallback(keep=KEEP, dataset=rows(40))
    train_often_saved(output, callback, packing=True, gradient_accumulation_steps=2)


def train_on_split_rows(inputs: Path, output: Path) -> None:
    callback = ResonanceCallback(keep=KEEP, dataset=rows(40))
    train_often_saved(output, callback, packing=True, packing_strategy="bfd_split", max_length=9)


def train_on_a_stream(inputs: Path, output: Path) -> None:
    """A stream that is shuffled anew in every pass."""
    stream = rows(40).add_column("name", list(range(0, 280, 7))).to_iterable_dataset()
    callback = ResonanceCallback(keep=KEEP, id_column="name")
    train_often_saved(output, callback, dataset=stream.shuffle(seed=3, buffer_size=8), max_steps=15)


def train_in_two_processes(inputs: Path, output: Path) -> None:
    """By plain DDP, in which each process writes a ledger of its own."""
    train_often_saved(output, ResonanceCallback(keep=KEEP), ddp_timeout=SILENCE)


def train_sharded(inputs: Path, output: Path) -> None:
    from helpers import sharded  # which counts the processes of its environment

    sharded.shard_on_cpu()
    train_often_saved(output, ResonanceCallback(keep=KEEP), ddp_timeout=SILENCE, **sharded.by_fsdp2())


def train_often_saved(output: Path, callback: ResonanceCallback, **changes: Any) -> None:
    """Train, from the last complete checkpoint if there is one."""
    often = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 3, "gradient_accumulation_steps": 3}
    settings = {"dataset": rows(40), **often, **changes}
    train(output, make_tokenizer(), callback, resume=last_complete(output), **settings)


LEDGER = "resofilter/ledger/*/*.parquet"
TRAINED = (
    "checkpoint-*/model.safetensors",
    "resofilter/scores.parquet",
    "resofilter/selection-epoch-*.parquet",
    LEDGER,
)
JOBS = {
    "scoring": Job(score, ("scores.parquet",)),
    "scoring in two processes": Job(score, ("scores.parquet",), 2),
    "scoring a stream in two processes": Job(score_a_stream, ("scores.parquet",), 2),
    "selecting": Job(select, ("kept/selection.parquet", "kept/dataset/*.arrow", "kept/dataset/README.md")),
    "cleaning": Job(clean, ("token_scores.arrow", "data-*.arrow", "summary.json")),
    "cleaning in two processes": Job(clean, ("token_scores.arrow", "data-*.arrow", "summary.json"), 2),
    "training": Job(train_with_callback, TRAINED),
    "training in two processes": Job(train_in_two_processes, TRAINED, 2),
    "training on packs": Job(train_on_packs, TRAINED),
    "training on split rows": Job(train_on_split_rows, TRAINED),
    "training on a stream": Job(train_on_a_stream, (*TRAINED, "resofilter/rows.parquet")),
}
if not older_than("transformers", "5.0"):  # which takes FSDP2's settings from the environment
    JOBS["training in shards"] = Job(train_sharded, TRAINED, 2)


def start(job: Job, inputs: Path, output: Path) -> list[multiprocessing.process.BaseProcess]:
    """Start the processes of a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [FORK.Process(target=_child, args=(job, inputs, output, rank, port)) for rank in range(job.processes)]
    for child in children:
        child.start()
    return children


def _child(job: Job, inputs: Path, output: Path, rank: int, port: int) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    passes.LEAST_LOST = passes.LOST_SHARE = passes.GATHERED = 0.0  # a write for every batch; the main one merges all
    store.GROWS, store.LARGE = 3000, 9000  # parts of a few batches are left, some grow
    sharing.LEAST = digest.BLOCK = surveys.BLOCK = shared_rows.BLOCK = 16  # several shares of rows to prepare
    if job.processes > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.processes, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"}
    job.run(inputs, output)


def ended_well(children: list[multiprocessing.process.BaseProcess]) -> bool:
    """Whether all processes succeed. Raises AssertionError where one hangs."""
    until = time.monotonic() + LIMIT
    for child in children:
        child.join(max(until - time.monotonic(), 0))
    hanging = [child for child in children if child.is_alive()]
    for child in hanging:
        child.kill()
    assert not hanging, f"{len(hanging)} of {len(children)} processes hang"
    return all(child.exitcode == 0 for child in children)


def results_of(job: Job, output: Path) -> dict[str, bytes]:
    """The bytes of every file of a job's result; of several checkpoints, those of the last."""
    files = [path for pattern in job.results for path in output.glob(pattern)]
    last = last_complete(output)
    files = [path for path in files if not path.parent.name.startswith("checkpoint-") or str(path.parent) == last]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def kill_and_resume(job: Job, inputs: Path, output: Path, duration: float, moments: random.Random) -> int:
    """Start a job until it succeeds, and kill it every other time; returns the number of kills."""
    killed = 0
    for attempt in range(STARTS):
        children = start(job, inputs, output)
        if attempt % 2 == 0:
            children[0].join(moments.uniform(0.05, 1.0) * duration)
            victims = children if moments.random() < 0.5 else [moments.choice(children)]
            alive = [child for child in victims if child.is_alive()]
            for child in alive:
                os.kill(child.pid or 0, signal.SIGKILL)
            killed += bool(alive)
        if ended_well(children):
            return killed
        assert any(child.exitcode != 0 for child in children)
        assert attempt % 2 == 0, f"it does not resume: exit codes {[child.exitcode for child in children]}"
    raise AssertionError(f"not finished after {STARTS} starts")


def check(name: str, runs: int, seed: int, place: Path) -> int:
    """Kill a job in each of some runs; returns the number of kills. Raises AssertionError where a result differs."""
    job, inputs, moments = JOBS[name], place / "inputs", random.Random(f"{seed} {name}")
    duration, truth = float("inf"), dict[str, bytes]()
    for number in range(2):  # the first is slower, on a cold machine
        begun = time.monotonic()
        assert ended_well(start(job, inputs, place / f"{name}-undisturbed-{number}")), f"{name} fails without a kill"
        duration = min(duration, time.monotonic() - begun)
        found = results_of(job, place / f"{name}-undisturbed-{number}")
        assert found, f"{name} writes nothing"
        assert number == 0 or found == truth, f"{name} writes other bytes the second time"
        truth = found
    kills = 0
    for run in range(runs):
        output = place / f"{name}-{run}"
        for _ in range(STARTS):
            killed = kill_and_resume(job, inputs, output, duration, moments)
            if killed:
                break
            shutil.rmtree(output)  # it ended before it was killed
        kills += killed
        found = results_of(job, output)
        assert found.keys() == truth.keys(), f"{name}, run {run}: {sorted(found)} for {sorted(truth)}"
        differing = [path for path in truth if found[path] != truth[path]]
        assert not differing, f"{name}, run {run}: {differing} differ"
        shutil.rmtree(output)
    assert kills >= runs, f"{name} ends sooner than it is killed"
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60, help="the number of runs of all jobs together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        maker = FORK.Process(target=prepare, args=(place / "inputs",))
        maker.start()
        maker.join()
        if "selecting" in args.jobs:
            assert ended_well(start(JOBS["scoring"], place / "inputs", place / "inputs" / "scored"))
        for number, name in enumerate(args.jobs):
            runs = len(range(number, args.runs, len(args.jobs)))
            begun = time.monotonic()
            kills = check(name, runs, args.seed, place)
            print(f"{name}: {runs} runs, {kills} kills, same bytes ({time.monotonic() - begun:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
