"""Seconds and memory of scoring: this library, plain forwards, and other libraries, with a process for every run.

    python benchmarks/scoring.py --json scoring.json --peers_python peers/bin/python

The model is a Llama shape with random weights; the samples have GSM8K's lengths and random tokens.

    round 1: literal, recorder, ..., torch_func    round 2: literal, recorder, ...    -> medians

Each method of each round is a fresh process (`scoring_worker.py`), which warms up on one batch and then measures the
time of all samples. Memory is the process's largest resident set: the interpreter, the model and the method. The peers
(`scoring_peers.py`) run in an environment of their own, see `requirements.txt`; without one, they are skipped. Only
ratios within one run are meaningful. This file does not import torch, to keep its own memory small.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
OWN = (
    "literal",
    "recorder",
    "recorder_bf16",
    "default",
    "forward",
    "forward_labelled",
    "forward_labelled_bf16",
)
PEERS = ("opacus", "opacus_tuned", "kronfluence", "kronfluence_tuned", "bergson", "bergson_tuned", "torch_func")
EXPECTED = "recorder"  # the method whose scores the others are compared with
LR = 1e-5  # ResonanceConfig's learning rate, at which a score saturates


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama with tied embeddings."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    "tiny": Shape(512, 64, 128, 4, 4, 2),
    "135m": Shape(49152, 576, 1536, 30, 9, 3),
    "350m": Shape(32000, 1024, 2944, 24, 16, 16),
}


def main() -> None:
    args = _arguments()
    if not args.gsm8k.exists():
        sys.exit(f"skipped: there is no GSM8K at '{args.gsm8k}' to take the lengths from; pass --gsm8k train.jsonl")
    methods = chosen_methods(args)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    broken: set[str] = set()
    found: dict[str, Any] = {}
    for number in range(args.rounds):
        for name in methods:
            if name in broken:
                continue
            run = run_method(name, args)
            if run is None:
                broken.add(name)
            else:
                runs[name].append(run)
                print(f"round {number + 1}: {name} {run['seconds']:.2f} s", flush=True)
        found = summarise(args, runs)
        if args.json:
            args.json.write_text(json.dumps(found, indent=2) + "\n")
    report(found)
    if broken:
        sys.exit(f"failed: {', '.join(sorted(broken))}")


def chosen_methods(args: argparse.Namespace) -> list[str]:
    """The methods of `--methods`, without the peers if there is no environment for them."""
    methods = args.methods.split(",") if args.methods else [*OWN, *PEERS]
    unknown = sorted(set(methods) - {*OWN, *PEERS})
    if unknown:
        sys.exit(f"there is no method {', '.join(unknown)}; there are {', '.join([*OWN, *PEERS])}")
    peers = [name for name in methods if name in PEERS]
    if peers and args.peers_python is None:
        print(f"skipped: {', '.join(peers)}: --peers_python is not given, see benchmarks/requirements.txt")
        methods = [name for name in methods if name not in PEERS]
    return methods


def run_method(name: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """The result that the worker's process prints; if it fails, None, after a line that says why."""
    python = args.peers_python if name in PEERS else sys.executable
    worker = Path(__file__).resolve().with_name("scoring_worker.py")
    options = {each: getattr(args, each) for each in ("shape", "samples", "prompts", "threads", "gsm8k", "eps")}
    command = [str(python), str(worker), name, *(str(word) for key in options for word in (f"--{key}", options[key]))]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(worker.parents[1]),  # this checkout of the library, not an installed one
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"failed: {name}: {last}", flush=True)
        return None
    run: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return run


def summarise(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each method's medians, its scores compared with the float32 recorder's, and what was measured as `about`."""
    runs = {name: each for name, each in runs.items() if each}
    if not runs:
        sys.exit("no method ran")
    first = next(iter(runs.values()))[0]
    expected = runs[EXPECTED][0]["scores"] if EXPECTED in runs else None
    about = {
        "machine": machine(),
        "shape": args.shape,
        "parameters": first["parameters"],
        "samples": args.samples,
        "prompts": args.prompts,
        "tokens": sum(length for length, _ in first["lengths"]),
        "learnt": sum(learnt for _, learnt in first["lengths"]),
        "threads": args.threads,
        "rounds": max(map(len, runs.values())),
        "eps": args.eps,
        "flop_floor": flop_floor(SHAPES[args.shape], first["lengths"]),
    }
    return {"about": about, **{name: summary(each, expected) for name, each in runs.items()}}


def summary(runs: Sequence[dict[str, Any]], expected: Sequence[float] | None) -> dict[str, Any]:
    """One method's medians and runs, and how well its scores, if any, agree with the expected ones."""
    scores, seconds = runs[0]["scores"], [run["seconds"] for run in runs]
    memory = [run["peak_memory"] for run in runs]
    agreement: dict[str, float | None] = {"rank_correlation": None, "error": None}
    if scores is not None and expected is not None:
        agreement = {"rank_correlation": rank_correlation(scores, expected), "error": error(scores, expected)}
    return {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "peak_memory": statistics.median(memory),
        "all_peak_memory": memory,
        **agreement,
        "versions": runs[0]["versions"],
        "scores": scores,
    }


def error(scores: Sequence[float], expected: Sequence[float]) -> float:
    """The largest error of a score over the median distance of the expected scores from saturation, lr - score."""
    largest = max(abs(score - right) for score, right in zip(scores, expected, strict=True))
    return largest / statistics.median(LR - right for right in expected)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's correlation; None if all values of one side are equal."""
    if min(len(set(a)), len(set(b))) < 2:
        return None
    return statistics.correlation(ranks(a), ranks(b))


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share their mean rank."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def flop_floor(shape: Shape, lengths: Sequence[Sequence[int]]) -> float:
    """The fewest FLOPs of a score over those of a forward, both with the head at the learnt positions only.

    Args:
        shape: the model's shape.
        lengths: (tokens, learnt tokens) of each sample.

    A score needs the forward, without the last feed-forward where no token is learnt; the input gradients of the head,
    of the last two blocks and of the third block's down-projection, above the last attention only where tokens are
    learnt; and three products b^T a, the last of them over learnt tokens. A product of (n, k) and (k, m) has 2nkm
    FLOPs; attention is causal; padding and everything that is not a matrix product count nothing.
    """
    tokens, learnt = (sum(each[place] for each in lengths) for place in (0, 1))
    pairs = sum(length * (length + 1) // 2 for length, _ in lengths)
    projection = 2 * shape.hidden * shape.intermediate  # per token: up, gate or down; forward, backward or b^T a
    square = 2 * shape.hidden * shape.hidden  # queries, or the output
    narrow = 2 * shape.hidden * (shape.hidden // shape.heads) * shape.kv_heads  # keys, or values
    attention = 4 * pairs * shape.hidden  # queries with keys, weights with values
    head = 2 * learnt * shape.hidden * shape.vocabulary
    block = tokens * (3 * projection + 2 * square + 2 * narrow) + attention
    forward = shape.layers * block + head
    last = learnt * (3 * projection + 2 * square) + tokens * 2 * narrow + 2 * attention
    backward = head + last + (block + attention) + tokens * projection  # products of two activations have two gradients
    spared = (tokens - learnt) * 3 * projection
    return (forward - spared + backward + (2 * tokens + learnt) * projection) / forward


def report(found: dict[str, Any]) -> None:
    about, methods = found["about"], {name: each for name, each in found.items() if name != "about"}
    print(
        f"\n{about['parameters'] / 1e6:.0f}M parameters, {about['samples']} samples, {about['tokens']} tokens, "
        f"{about['learnt']} of them learnt, {about['threads']} threads, medians of {about['rounds']} rounds\n"
        f"{about['machine']}"
    )
    columns = ("seconds", "/ forward", "literal /", "MB", "/ forward", "ranks", "error")
    print(f"{'':22}" + "".join(f"{column:>11}" for column in columns))
    literal = methods.get("literal")
    for name, each in sorted(methods.items(), key=lambda item: item[1]["seconds"]):
        plain = methods.get("forward_labelled_bf16" if name.endswith("bf16") else "forward_labelled")
        cells = (
            cell(each["seconds"], ".2f"),
            cell(plain and each["seconds"] / plain["seconds"], ".3f"),
            cell(literal and literal["seconds"] / each["seconds"], ".2f"),
            cell(each["peak_memory"] / 1e6, ".0f"),
            cell(plain and each["peak_memory"] / plain["peak_memory"], ".2f"),
            cell(each["rank_correlation"], ".4f"),
            cell(each["error"], ".1e"),
        )
        print(f"{name:22}" + "".join(cells))
    print(
        "/ forward: forward_labelled, or for a bfloat16 forward forward_labelled_bf16. "
        f"Fewest FLOPs of a score over those of forward_labelled: {about['flop_floor']:.3f}"
    )


def cell(value: float | None, form: str) -> str:
    """A number in the table's column, or an empty cell for None."""
    return f"{'' if value is None else format(value, form):>11}"


def machine() -> str:
    """The processor, its cores, the system and the version of Python."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="a file for the results, written after every round")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument(
        "--prompts",
        choices=("own", "repeated", "system"),
        default="own",
        help="each sample's own prompt, one for every four samples, or the same 200 tokens before each own one",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", help=f"some of {','.join([*OWN, *PEERS])}")
    parser.add_argument("--peers_python", type=Path, help="the interpreter of the peers' environment")
    parser.add_argument("--gsm8k", type=Path, default=GSM8K, help="GSM8K's train.jsonl, for the lengths")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eps", type=float, default=1e-8, help="AdamW's eps; 1e-4 to exclude numerical noise")
    return parser.parse_args()


if __name__ == "__main__":
    main()
