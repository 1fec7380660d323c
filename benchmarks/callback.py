"""Time and memory of a training step with ResonanceCallback over one without it.

    python benchmarks/callback.py --json callback.json

The model is a 30-layer Llama shape of 135M parameters with random weights, trained by SFTTrainer on rows of GSM8K's
lengths and random tokens, in a fixed order. Every run is a process of its own; runs with and without the callback
alternate, and each step is compared with the same step of the run beside it. Only ratios mean anything.
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
from scoring import GSM8K, build_model, make_samples
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from resofilter_trainer import ResonanceCallback


class Clock(TrainerCallback):
    """Seconds of every step, from its first forward to the end of its optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The rows are there."""
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights have moved, and what was measured is taken in."""
        self.seconds.append(time.perf_counter() - self._begun)


def main() -> None:
    args = _arguments()
    if not args.gsm8k.exists():
        sys.exit(f"skipped: there is no GSM8K at '{args.gsm8k}' to take the lengths from; pass --gsm8k train.jsonl")
    if args.run:
        print(json.dumps(run(args, args.run == "with")))
        return
    found: dict[str, list[dict[str, Any]]] = {"without": [], "with": []}
    for round_ in range(args.rounds):
        for kind in ("without", "with") if round_ % 2 == 0 else ("with", "without"):
            found[kind].append(in_a_process(kind))
    report(found, args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def run(args: argparse.Namespace, with_callback: bool) -> dict[str, Any]:
    """One training; the first step, which allocates, is left out."""
    torch.set_num_threads(args.threads)
    model = build_model()
    samples = make_samples(args.gsm8k, args.steps * args.batch_size, model.config.vocab_size)
    rows = [{name: tensor.tolist() for name, tensor in sample.items()} for sample in samples]
    clock = Clock()
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
            callbacks=[*([ResonanceCallback()] if with_callback else []), clock],
        )
        trainer.train()
    return {"seconds": clock.seconds[1:], "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def in_a_process(kind: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, *sys.argv, "--run", kind], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    pairs = [
        one / other
        for with_, without in zip(found["with"], found["without"], strict=True)
        for one, other in zip(with_["seconds"], without["seconds"], strict=True)
    ]
    totals = [
        sum(with_["seconds"]) / sum(without["seconds"])
        for with_, without in zip(found["with"], found["without"], strict=True)
    ]
    memory = {kind: statistics.median(each["peak_mb"] for each in runs) for kind, runs in found.items()}
    seconds = {kind: statistics.median(s for each in runs for s in each["seconds"]) for kind, runs in found.items()}
    print(f"batch {args.batch_size}, {args.rounds} rounds of {args.steps - 1} steps, bf16 {args.bf16}")
    for kind in found:
        print(f"{kind:8} {seconds[kind]:7.3f} s a step (median), peak memory {memory[kind]:7.0f} MB")
    print(f"step time with over without: median of the pairs {statistics.median(pairs):.3f}, ", end="")
    print(f"of the rounds {', '.join(f'{total:.3f}' for total in totals)}")
    print(f"peak memory with over without: {memory['with'] / memory['without']:.3f}")


def _tokenizer() -> PreTrainedTokenizerFast:
    """SFTTrainer wants one; the rows are tokens already."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1})), pad_token="<pad>", eos_token="<eos>"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--gsm8k", type=Path, default=GSM8K)
    parser.add_argument("--json", type=Path, help="write all seconds and memory here")
    parser.add_argument("--run", choices=["with", "without"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
