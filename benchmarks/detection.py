"""Which score finds wrong solutions that a language model has written?

    python benchmarks/detection.py --shared ../shared --seeds 0 1 2 --json detection.json

A small model (stories260K) is fine-tuned on GSM8K's training set, then scores solutions to arithmetic problems from
LLM-Adapters' data, whose final answers are known to be right or wrong. Questions of GSM8K's test set are left out, and
a hundred rows of GSM8K's training set are reserved for the methods that select for a validation set.

    GSM8K train -> model -> score of each solution by every method -> AUROC for "wrong", with its interval

The model before the fine-tuning is the small model of superfiltering. Intervals are over rows (bootstrap); the table
has the means of their bounds over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from resofilter_trainer.compare.choosing import row_values, token_row_values
from resofilter_trainer.compare.config import SelectorConfig
from resofilter_trainer.compare.method_scores import Request, tune_reference
from resofilter_trainer.compare.methods import METHODS
from resofilter_trainer.data.loading import load_model
from resofilter_trainer.scores.statistics import auroc, rank_correlation
from resofilter_trainer.scores.token_scores import TokenScores
from resofilter_trainer.selecting.data_selector import DataSelector
from resofilter_trainer.training.fine_tuning import save_model

SHARED = Path(__file__).resolve().parents[2] / "shared"
RESERVED = 100
VALIDATION = 16
RESAMPLES = 1000
MAX_LENGTH = {"selectit": 400, "nuggets": 240}  # of a row, as these add text to it: the model has 512 positions
SETTINGS = {"less": {"lora_r": 8, "dimensions": 1024}}  # LoRA of rank 128 has three times this model's parameters
LEFT_OUT = {
    "column",
    "full",
    "random",
    "shortest",
    "high_loss",
    "perplexity",
    "token_rho",
}  # nothing new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=SHARED, help="a folder with data/ and models/")
    parser.add_argument("--output", type=Path, default=Path("runs/detection"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--limit", type=int, help="the number of solutions to score; all by default")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data = args.shared / "data"
    if not data.is_dir():
        sys.exit(f"skipped: there is no data at '{data}'; pass --shared")
    train, solutions, wrong = load(data, args.limit)
    print(f"{len(wrong)} solutions, {wrong.mean():.1%} wrong; {len(train)} rows of GSM8K", flush=True)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        folder = args.output / f"{args.epochs:g}-epochs-seed-{seed}"
        start = args.shared / "models" / "stories260K"
        tune(start, train.select(range(RESERVED, len(train))), folder, seed, args.epochs)
        for name, numbers in detect(start, folder, solutions, wrong, shortest(train), seed).items():
            found.setdefault(name, []).append(numbers)
            print(f"seed {seed}: {name} {numbers['auroc']:.3f}", flush=True)
        print(report(found), flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=2) + "\n")


def load(data: Path, limit: int | None) -> tuple[Dataset, Dataset, np.ndarray]:
    """GSM8K's training set; solutions to questions that are not in its test set; which of them are wrong, (N,) bool."""
    train = [json.loads(line) for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in next((data / "math_data").glob("*.jsonl")).read_text().splitlines()]
    rows = [row for row in rows if not row["in_gsm8k_test"]][:limit]
    pairs = [{"prompt": f"{row['question']}\n", "completion": row["answer"]} for row in train]
    solutions = [{"prompt": f"{row['question']}\n", "completion": row["solution"]} for row in rows]
    return Dataset.from_list(pairs), Dataset.from_list(solutions), np.array([not row["correct"] for row in rows])


def shortest(train: Dataset) -> Dataset:
    """The shortest of the reserved rows, so that a sample fits in front of them."""
    reserved = train.select(range(RESERVED))
    sizes = [len(row["prompt"]) + len(row["completion"]) for row in reserved]
    return reserved.select(np.argsort(sizes, kind="stable")[:VALIDATION])


def arguments(folder: Path, seed: int, epochs: float) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder / "trainer"),
        num_train_epochs=epochs,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        per_device_train_batch_size=16,
        max_length=512,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )


def tune(start: Path, rows: Dataset, folder: Path, seed: int, epochs: float) -> None:
    """Fine-tune the model on GSM8K, unless it is done already."""
    if (folder / "model").is_dir():
        return
    began, args = time.perf_counter(), arguments(folder, seed, epochs)
    model, tokenizer = load_model(str(start), None, args)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    loss = trainer.train().training_loss
    save_model(model, tokenizer, folder / "model")
    print(f"seed {seed}: tuned in {time.perf_counter() - began:.0f} s, mean training loss {loss:.3f}", flush=True)


def detect(
    proxy: Path, folder: Path, solutions: Dataset, wrong: np.ndarray, validation: Dataset, seed: int
) -> dict[str, dict[str, float]]:
    """For every method that scores rows: AUROC, its bootstrap interval, and Spearman's correlation with length."""
    found = {}
    for name, method in METHODS.items():
        if name in LEFT_OUT or method.in_run:
            continue
        args, selector = arguments(folder, seed, 1), SelectorConfig(name, settings=SETTINGS.get(name, {}))
        args.max_length = MAX_LENGTH.get(name, args.max_length)
        model, tokenizer = load_model(str(proxy if method.model == "proxy" else folder / "model"), None, args)
        where = folder / "scores" / f"{method.model}-{method.scores}"
        request = Request(model, tokenizer, solutions, args, where, selector, validation)
        if method.by_reference:
            request = replace(request, reference=str(folder / "reference" / "model"))
            if not (folder / "reference" / "model").is_dir():
                tuned = replace(request, model=load_model(str(folder / "model"), None, args)[0])
                tune_reference(tuned, folder / "reference")
        scores = method.score(request)
        if isinstance(scores, TokenScores):
            rows, values, tokens = scores.sample_id, token_row_values(scores), scores.num_tokens
        else:
            policy = method.policy(0.5, seed, selector)
            assert isinstance(policy, DataSelector)
            everything = row_values(scores, policy)
            rows = np.flatnonzero(np.isfinite(everything))
            values, tokens = everything[rows], scores.column("num_tokens")[rows]
        low, high = bootstrap(values, wrong[rows])
        length = rank_correlation(values, tokens)
        found[name] = {"auroc": auroc(values, wrong[rows]), "low": low, "high": high, "length": length}
    return found


def bootstrap(values: np.ndarray, wrong: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the AUROC over resampled rows."""
    random = np.random.default_rng(0)
    draws = [random.integers(0, len(wrong), len(wrong)) for _ in range(RESAMPLES)]
    low, high = np.quantile([auroc(values[rows], wrong[rows]) for rows in draws], [0.025, 0.975])
    return float(low), float(high)


def report(found: dict[str, list[dict[str, float]]]) -> str:
    """A table in Markdown, best first."""
    rows = ["| method | AUROC | over seeds | with length |", "|---|---|---|---|"]
    for name, seeds in sorted(found.items(), key=lambda item: -np.mean([each["auroc"] for each in item[1]])):
        mean = {key: np.mean([each[key] for each in seeds]) for key in ("auroc", "low", "high", "length")}
        values = [each["auroc"] for each in seeds]
        shown = f"{mean['auroc']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"
        rows.append(f"| {name} | {shown} | {min(values):.3f} to {max(values):.3f} | {mean['length']:+.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
