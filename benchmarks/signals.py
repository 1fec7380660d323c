"""What the signals of one pass cost beside the recorder alone, in one process: seconds, ratio and memory.

    python benchmarks/signals.py --json signals.json
    python benchmarks/signals.py --model path/to/a/model --bf16

The samples have GSM8K's lengths and random tokens, as in `scoring.py`. In each round every method runs over the same
batches, one after the other and in another order each time; the ratio is the median over the rounds of a method's
seconds divided by those of the recorder alone in that round, of the clock and of the processors' time, which other
programs disturb less. `forward` is the plain forward with the head at learnt positions only. The signals with further
forwards are these forwards alone, which come on top of the recorder: `verdict` only with `--model`, whose tokenizer
writes the question; the reference model is the model itself.

The memory is the largest resident set during a method's first run, and how much more that is than during the recorder's
alone. Linux counts it anew for each method, once freed memory is given back; elsewhere it is that of all so far.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scoring import GSM8K, SHAPES
from scoring_samples import build_model, make_samples, peak_memory, prepared_rows
from scoring_worker import forward_labelled
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from resofilter_trainer import Recorder, ResonanceConfig
from resofilter_trainer.data.loading import default_arguments
from resofilter_trainer.data.preparation import PreparedRows
from resofilter_trainer.model.signals import SIGNALS
from resofilter_trainer.scoring.batches import default_budget
from resofilter_trainer.scoring.dataset import Pass
from resofilter_trainer.scoring.further_passes import FurtherPass
from resofilter_trainer.scoring.further_signals import FORWARDS

ALONE = "recorder"
FREE = ("loss", "resonance")  # what the recorder measures anyway
METHODS: dict[str, Sequence[str]] = {  # by name, the signals
    ALONE: (),
    **{name: [name] for name, signal in SIGNALS.items() if not signal.of_layers and name not in FREE},
    "all": [*SIGNALS],
}
FORWARD = "forward"
FURTHER_METHODS = {  # what is measured, by the names of the forwards
    "ifd, loss_alone": ["alone"],
    "verdict": ["verdict"],
    "jitter": ["jitter"],
    "excess": ["reference"],
    "superfiltering": ["reference", "reference_alone"],
}


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    model = build_model(args.shape) if args.model is None else _loaded(args.model)
    samples = make_samples(args.gsm8k, args.samples, model.config.vocab_size)
    rows = prepared_rows(samples)
    runs: dict[str, Callable[[], object]] = {
        name: partial(measure, model, rows, signals, args.bf16) for name, signals in METHODS.items()
    }
    runs[FORWARD] = partial(forward_labelled, model, samples, ResonanceConfig())
    opened = SimpleNamespace(tokenizer=args.model and AutoTokenizer.from_pretrained(args.model), prepared=rows)
    for name, forwards in FURTHER_METHODS.items():
        if args.model is not None or name != "verdict":
            runs[name] = partial(measure_forwards, model, opened, forwards, args.bf16)
    chosen = args.methods or [*runs]
    if "verdict" in chosen and args.model is None:
        sys.exit("verdict writes a question with a model's tokenizer: pass --model")
    memory = {}
    runs[ALONE]()  # warms up
    for name in chosen:
        start_counting()
        runs[name]()
        memory[name] = peak_since()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for number in range(args.rounds):
        for name in random.Random(number).sample(chosen, len(chosen)):
            start = time.perf_counter(), time.process_time()
            runs[name]()
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    found = {}
    print(
        f"{'':15} {'seconds':>8} {'ratio':>6} {'of CPU':>7} {'lowest':>7} {'highest':>8} {'peak MB':>8} {'beyond':>7}"
    )
    for name in chosen:
        by_clock, by_cpu = np.array(seconds[name]).T / np.array(seconds[ALONE]).T
        ratios = float(np.median(by_clock)), float(np.median(by_cpu))
        beyond = memory[name] - memory[ALONE]
        found[name] = {"seconds": seconds[name], "ratios": ratios, "peak_memory": memory[name], "beyond": beyond}
        print(
            f"{name:15} {np.median(seconds[name], axis=0)[0]:8.3f} {ratios[0]:6.3f} {ratios[1]:7.3f} "
            f"{by_cpu.min():7.3f} {by_cpu.max():8.3f} {memory[name] / 1e6:8.0f} {beyond / 1e6:7.0f}"
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(model: PreTrainedModel, rows: PreparedRows, signals: Sequence[str], autocast: bool) -> object:
    """The library's own pass, in its own batches, without the rows that are measured again for `Trust`."""
    arguments = default_arguments()
    arguments.disable_tqdm = True
    with Recorder(model, ResonanceConfig(), signals) as record:
        return Pass(record, rows, arguments, default_budget(model.device)).measure_all(autocast)


def measure_forwards(model: PreTrainedModel, opened: Any, names: Sequence[str], autocast: bool) -> None:
    """Further forwards over the rows."""
    arguments = default_arguments()
    arguments.disable_tqdm = True
    further = FurtherPass(opened.prepared, arguments, default_budget(model.device), autocast)
    for name in names:
        further.measure(model, name, FORWARDS[name](model, opened))


def start_counting() -> None:
    """Give freed memory back and count the largest resident set anew, on Linux."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_since() -> int:
    """The largest resident set since `start_counting`, in bytes; elsewhere than on Linux that of the whole run."""
    if sys.platform != "linux":
        return peak_memory()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def _loaded(folder: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--model", help="a model's name or folder, instead of a shape")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="a bfloat16 forward")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, FORWARD, *FURTHER_METHODS], help="all by default")
    parser.add_argument("--gsm8k", type=Path, default=GSM8K, help="GSM8K's train.jsonl, for the lengths")
    parser.add_argument("--json", type=Path, help="write every round")
    args = parser.parse_args()
    if args.methods and ALONE not in args.methods:
        parser.error(f"--methods needs {ALONE}, which the others are compared with")
    return args


if __name__ == "__main__":
    main()
