"""Seconds to score: the literal procedure, the recorder, and a plain forward, on the same samples in one run.

    python benchmarks/scoring.py --json scoring.json

The model is a 30-layer Llama shape of 135M parameters with random weights; the samples have GSM8K's lengths and random
tokens. The rounds alternate between the methods, and the medians are compared: only ratios mean anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from resofilter_trainer import Recorder, ResonanceConfig, literal
from resofilter_trainer.losses import IGNORE

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
CHARACTERS_PER_TOKEN = 3  # about what a large vocabulary makes of GSM8K, its digits one by one


def main() -> None:
    args = _arguments()
    if not args.gsm8k.exists():
        sys.exit(f"skipped: there is no GSM8K at '{args.gsm8k}' to take the lengths from; pass --gsm8k train.jsonl")
    torch.set_num_threads(args.threads)
    model = build_model()
    samples = make_samples(args.gsm8k, args.samples, model.config.vocab_size)
    batches = make_batches(samples, args.batch_size)
    methods: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(model, batches),
        "recorder": lambda: record(model, batches),
        "literal": lambda: literal(model, samples, ResonanceConfig()),
    }
    forward(model, batches[:1])
    record(model, batches[:1])
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(args.rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    report(medians, samples, model.num_parameters())
    if args.json:
        args.json.write_text(json.dumps(medians, indent=2) + "\n")


def forward(model: LlamaForCausalLM, batches: Sequence[dict[str, Tensor]]) -> None:
    """What a loss alone costs: `model(**batch).loss`, without gradients."""
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def record(model: LlamaForCausalLM, batches: Sequence[dict[str, Tensor]]) -> None:
    with Recorder(model, ResonanceConfig()) as recorder:
        for batch in batches:
            recorder(batch)


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def make_samples(gsm8k: Path, count: int, vocab_size: int) -> list[dict[str, Tensor]]:
    """Random tokens; each sample as long as a GSM8K question, not learnt, and its answer, learnt."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for line in gsm8k.read_text().splitlines()[:count]:
        row = json.loads(line)
        prompt, answer = (len(row[name]) // CHARACTERS_PER_TOKEN for name in ("question", "answer"))
        ids = torch.randint(10, vocab_size, (prompt + answer,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = IGNORE
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def make_batches(samples: Sequence[dict[str, Tensor]], size: int) -> list[dict[str, Tensor]]:
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    rows = [{name: tensor.tolist() for name, tensor in sample.items()} for sample in samples]
    rows.sort(key=lambda row: -len(row["input_ids"]))
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def report(medians: dict[str, float], samples: Sequence[dict[str, Tensor]], parameters: int) -> None:
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    learnt = sum(int((sample["labels"] != IGNORE).sum()) for sample in samples)
    print(f"{parameters / 1e6:.0f}M parameters, {len(samples)} samples, {tokens} tokens, {learnt} of them learnt")
    print(f"{'':10} {'seconds':>8} {'/ forward':>10} {'literal /':>10}")
    for name, value in sorted(medians.items(), key=lambda item: item[1]):
        print(f"{name:10} {value:8.2f} {value / medians['forward']:10.2f} {medians['literal'] / value:10.2f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gsm8k", type=Path, default=GSM8K, help="GSM8K's train.jsonl, for the lengths")
    parser.add_argument("--json", type=Path, help="write the medians, in seconds by name")
    return parser.parse_args()


if __name__ == "__main__":
    main()
