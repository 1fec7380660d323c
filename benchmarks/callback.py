"""Time and memory of a training step with ResonanceCallback, over one without it.

    python benchmarks/callback.py --json callback.json

The model is a 30-layer Llama shape of 135M parameters with random weights, trained by SFTTrainer on rows of GSM8K's
lengths and random tokens, in a fixed order. It is measured in two ways, as the machine's noise is larger than the
difference:

- memory, and time of whole runs: every run has its own process; runs with and without the callback alternate, and each
  step is compared with the same step of the neighbouring run;
- time of pairs: within one run, every batch comes twice, once measured and once not, in alternating order.

Only ratios are meaningful.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scoring import GSM8K
from scoring_samples import as_rows, build_model, make_samples
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from resofilter_trainer import ResonanceCallback


class Clock(TrainerCallback):
    """Seconds of every step but the first, from the end of one step to the end of the next, loading included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._ended: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped, and the callback has recorded."""
        now = time.perf_counter()
        if self._ended is not None:
            self.seconds.append(now - self._ended)
        self._ended = now


class Toggle(Clock):
    """Every batch comes twice in a row: measures the first, the second, the second, the first, and so on."""

    def __init__(self, callback: ResonanceCallback) -> None:
        super().__init__()
        self._callback = callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The callback has attached its recorder."""
        self._recorder = self._callback._running._watch._recorder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach or detach the recorder for the next step."""
        super().on_step_end(args, state, control, **kwargs)
        watch = self._callback._running._watch
        wanted, recorder = measures(state.global_step), self._recorder
        if recorder is not None and wanted != (watch._recorder is not None):
            watch._recorder = recorder if wanted else None
            recorder.attach() if wanted else recorder.detach()


def measures(step: int) -> bool:
    """Whether a step, counted from 0, is measured: 1, 0, 0, 1, 1, 0, 0, 1, ..."""
    return step % 4 in (0, 3)


def main() -> None:
    args = _arguments()
    if not args.gsm8k.exists():
        sys.exit(f"skipped: there is no GSM8K at '{args.gsm8k}' to take the lengths from; pass --gsm8k train.jsonl")
    if args.run:
        print(json.dumps(run(args, args.run)))
        return
    found: dict[str, list[dict[str, Any]]] = {"without": [], "with": [], "paired": []}
    for _ in range(args.paired_rounds):
        found["paired"].append(in_a_process("paired"))
    for round_ in range(args.rounds):
        for kind in ("without", "with") if round_ % 2 == 0 else ("with", "without"):
            found[kind].append(in_a_process(kind))
    report(found, args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def run(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """One training, without its first step, which allocates, or without its first pair of steps."""
    torch.set_num_threads(args.threads)
    model = build_model()
    samples = make_samples(args.gsm8k, args.steps * args.batch_size, model.config.vocab_size)
    rows = as_rows(samples)
    if kind == "paired":
        batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
        rows = [row for batch in batches for _ in range(2) for row in batch]
    callbacks = [ResonanceCallback()] if kind != "without" else []
    clock = Toggle(callbacks[0]) if kind == "paired" else Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=1,
            bf16=args.bf16,
            activation_checkpointing=args.checkpointing,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(),
            callbacks=[*callbacks, clock],
        )
        trainer.train()
    return {
        "seconds": clock.seconds[1:] if kind == "paired" else clock.seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_a_process(kind: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, *sys.argv, "--run", kind], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    pairs = [ratio for each in found["paired"] for ratio in pair_ratios(each["seconds"])]
    print(f"step time with over without, {len(pairs)} pairs: median {statistics.median(pairs):.3f}", end="")
    print(f", quartiles {', '.join(f'{each:.3f}' for each in statistics.quantiles(pairs, n=4)[::2])}")
    runs = list(zip(found["with"], found["without"], strict=True))
    if not runs:
        return
    steps = [one / other for a, b in runs for one, other in zip(a["seconds"], b["seconds"], strict=True)]
    totals = [sum(a["seconds"]) / sum(b["seconds"]) for a, b in runs]
    found = {kind: found[kind] for kind in ("without", "with")}
    memory = {kind: statistics.median(each["peak_mb"] for each in runs) for kind, runs in found.items()}
    seconds = {kind: statistics.median(s for each in runs for s in each["seconds"]) for kind, runs in found.items()}
    for kind in found:
        print(f"{kind:8} {seconds[kind]:7.3f} s a step (median), peak memory {memory[kind]:7.0f} MB")
    print(f"step time with over without, runs: median of the steps {statistics.median(steps):.3f}, ", end="")
    print(f"of the rounds {', '.join(f'{total:.3f}' for total in totals)}")
    print(f"peak memory with over without: {memory['with'] / memory['without']:.3f}")


def pair_ratios(seconds: list[float]) -> list[float]:
    """The measured step of each pair over the other one; the first two steps are not in `seconds`."""
    firsts = range(0, len(seconds) - 1, 2)
    return [seconds[i] / seconds[i + 1] if measures(i + 2) else seconds[i + 1] / seconds[i] for i in firsts]


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for SFTTrainer; the rows are tokens already."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1})), pad_token="<pad>", eos_token="<eos>"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--paired_rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--gsm8k", type=Path, default=GSM8K)
    parser.add_argument("--json", type=Path, help="write all seconds and memory here")
    parser.add_argument("--run", choices=["with", "without", "paired"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
