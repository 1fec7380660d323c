"""Time and memory of a training step with ResonanceCallback or a token rule, over one without, in each way of training.

    python benchmarks/callback.py                        # plain, sharded, packing, compile: one row of a table for each
    python benchmarks/callback.py sharded --pairs 12
    python benchmarks/callback.py --compare ledger       # over the callback without its ledger
    python benchmarks/callback.py --compare token_rule   # TokenWeights with each rule over plain training
    python benchmarks/callback.py --compare nothing      # twice the same: what the ratio is by chance

The model is a Llama of 135M parameters with random weights, trained by SFTTrainer on rows of GSM8K's lengths and random
tokens. Both trainings (`callback_worker.py`) run at once, each in its own process or processes, and make their steps in
turn, so that the two steps of a pair are on the same rows and a moment apart:

    with, without | without, with | with, without | ...

Time is that of whole steps, loading included, without the first pairs, which allocate and compile. Two equal processes
can differ by several per cent for as long as they run, so the pairs are divided among several starts, in which each
training is in turn the first to start. Memory is the largest resident set of the first process; on a GPU, the most that
is allocated. Only ratios are meaningful. This file does not import torch, to keep its own memory small.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from scoring import GSM8K, SHAPES

WORKER = Path(__file__).with_name("callback_worker.py")
CONFIGURATIONS = ("plain", "sharded", "packing", "compile")
PROCESSES = {"sharded": 2}
KINDS = ("with", "without")
TOKEN_RULE = "token_rule"
RULES = ("eaft", "profit", "stm", "conflict", "random")  # that need no forward of their own
HEADER = (
    "| | pairs | step time with over without: median, range | seconds a step with, without "
    "| peak MB with, without | ratio | seconds at the end with, without |\n|---|---|---|---|---|---|---|"
)

Found = dict[str, dict[str, Any]]


class Training:
    """A training in other processes, which makes a step when it is told to.

    Args:
        kind: `"with"` or `"without"`.
        configuration: the way of training.
        args: the settings.
        folder: a place for its files.
        rule: the token rule that is compared; None where none is.
    """

    def __init__(
        self, kind: str, configuration: str, args: argparse.Namespace, folder: Path, rule: str | None = None
    ) -> None:
        self.kind, self._errors = kind, folder / f"{kind}.txt"
        turns = folder / f"{kind}.fifo"
        os.mkfifo(turns)
        self._turns = os.fdopen(os.open(turns, os.O_RDWR), "r+b", buffering=0)  # before anyone reads
        processes = PROCESSES.get(configuration, 1)
        settings = {
            **{name: getattr(args, name) for name in ("shape", "batch_size", "bf16", "checkpointing", "compare")},
            "rule": rule,
            "steps": args.warmup + args.pairs,
            "threads": max(1, args.threads // processes),
            "processes": processes,
            "gsm8k": str(args.gsm8k),
            "folder": str(folder / kind),
        }
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), str(WORKER)]
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [*command, kind, configuration, str(turns), json.dumps(settings)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def turn(self) -> Any:
        """Let it make a step; returns what it then says: the seconds, or at the end its results."""
        self._turns.write(b"\n")
        return self.listen()

    def listen(self) -> Any:
        """What it says next. Exits where it has ended."""
        output: TextIO = self._process.stdout  # type: ignore[assignment]  # it is a pipe
        for line in output:
            if line.startswith(">"):
                return json.loads(line[1:])
        self._process.wait()
        return sys.exit(f"the training {self.kind} has ended:\n{self._errors.read_text()[-3000:]}")

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()
        self._turns.close()


def main() -> None:
    args = _arguments()
    if not args.gsm8k.exists():
        sys.exit(f"skipped: there is no GSM8K at '{args.gsm8k}' to take the lengths from; pass --gsm8k train.jsonl")
    print(HEADER, flush=True)
    found = {}
    rules = args.compare == TOKEN_RULE
    for configuration in args.configurations or (CONFIGURATIONS[:1] if rules else CONFIGURATIONS):
        for rule in args.rules if rules else [None]:
            name = configuration if rule is None else f"{configuration}, {rule}"
            found[name] = run_pairs(configuration, args, rule)
            print(row(name, found[name]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=2) + "\n")


def run_pairs(configuration: str, args: argparse.Namespace, rule: str | None = None) -> Found:
    """Both trainings in all starts: the seconds of every step after the warm-up, and the medians of the results."""
    starts = [_run_pairs(configuration, args, KINDS[:: 1 - 2 * (number % 2)], rule) for number in range(args.starts)]
    return {
        kind: {
            "seconds": [seconds for start in starts for seconds in start[kind]["seconds"]],
            **{name: statistics.median(start[kind][name] for start in starts) for name in ("loss", "peak_mb", "end")},
        }
        for kind in KINDS
    }


def _run_pairs(configuration: str, args: argparse.Namespace, kinds: Sequence[str], rule: str | None) -> Found:
    """Both trainings of one start, the first of `kinds` first, step by step."""
    with tempfile.TemporaryDirectory() as folder:
        trainings = [Training(kind, configuration, args, Path(folder), rule) for kind in kinds]
        try:
            for each in trainings:
                each.listen()  # it is ready
            seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
            for number in range(args.warmup + args.pairs):
                for each in trainings if number % 2 == 0 else trainings[::-1]:
                    seconds[each.kind].append(each.turn())
            results = {each.kind: each.turn() for each in trainings}
        finally:
            for each in trainings:
                each.close()
    losses = [results[kind]["loss"] for kind in KINDS]
    if rule is None and abs(losses[0] - losses[1]) > 1e-4 * abs(losses[1]):  # a rule's loss is another one
        sys.exit(f"the steps of '{configuration}' were on other rows: the losses are {losses[0]} and {losses[1]}")
    return {kind: {"seconds": seconds[kind][args.warmup :], **results[kind]} for kind in KINDS}


def row(configuration: str, found: Found) -> str:
    """A row of the table."""
    one, other = (found[kind] for kind in KINDS)
    ratios = [a / b for a, b in zip(one["seconds"], other["seconds"], strict=True)]
    steps = [f"{statistics.median(each['seconds']):.2f}" for each in (one, other)]
    memory = [f"{each['peak_mb']:,.0f}" for each in (one, other)]
    ends = [f"{each['end']:.2f}" for each in (one, other)]
    return (
        f"| {configuration} | {len(ratios)} | {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f} "
        f"| {', '.join(steps)} | {', '.join(memory)} | {one['peak_mb'] / other['peak_mb']:.3f} | {', '.join(ends)} |"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configurations", nargs="*", metavar="configuration", help=f"{', '.join(CONFIGURATIONS)}")
    parser.add_argument(
        "--compare", choices=["callback", "ledger", TOKEN_RULE, "nothing"], default="callback", help="with, without"
    )
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES, help="with --compare token_rule")
    parser.add_argument("--pairs", type=int, default=12, help="of each start")
    parser.add_argument("--starts", type=int, default=1, help="of both trainings anew")
    parser.add_argument("--warmup", type=int, default=2, help="pairs of steps that are not counted")
    parser.add_argument(
        "--batch_size", type=int, default=4, help="rows of a step; with packing, a quarter as many packs"
    )
    parser.add_argument("--threads", type=int, default=2, help="of each training, divided among its processes")
    parser.add_argument("--shape", choices=list(SHAPES), default="135m")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--gsm8k", type=Path, default=GSM8K)
    parser.add_argument("--json", type=Path, help="write all seconds and memory here")
    args = parser.parse_args()
    unknown = set(args.configurations) - set(CONFIGURATIONS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(CONFIGURATIONS)}")
    return args


if __name__ == "__main__":
    main()
