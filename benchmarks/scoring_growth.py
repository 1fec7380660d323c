"""How time and memory of a scoring pass grow with the number of rows: 1,000 to 30,000 by default, in one process.

    python benchmarks/scoring_growth.py --json growth.json

The model is the tiny shape of `scoring.py`; the rows have GSM8K's lengths, repeated, and random tokens. The time is
that of the pass without the rows that are measured again for `Trust`, of which there are at most 64. The slope of log
seconds over log tokens is 1 for linear growth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from scoring import GSM8K
from scoring_samples import as_rows, build_model, make_samples, peak_memory
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from resofilter_trainer import Recorder, ResonanceConfig
from resofilter_trainer.data.loading import default_arguments
from resofilter_trainer.data.preparation import PreparedRows, prepared_already
from resofilter_trainer.scoring.batches import default_budget
from resofilter_trainer.scoring.dataset import Pass


@dataclass
class Size:
    """The rows of one size, and their measurements."""

    rows: PreparedRows
    seconds: list[float] = field(default_factory=list)
    peak_memory: int = 0


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    model = build_model("tiny")
    arguments = default_arguments()
    arguments.disable_tqdm = True
    sizes: dict[int, Size] = {}
    for _ in range(args.rounds):  # in turn, as the machine's speed varies
        for count in sorted(args.rows):
            if count not in sizes:
                sizes[count] = Size(make_rows(args.gsm8k, count, model.config.vocab_size))
            size = sizes[count]
            with Recorder(model, ResonanceConfig()) as record:
                start = time.perf_counter()
                Pass(record, size.rows, arguments, default_budget(model.device)).measure_all(autocast=False)
                size.seconds.append(time.perf_counter() - start)
            size.peak_memory = size.peak_memory or peak_memory()  # of the first round, before a larger size has run
    found = []
    print(f"{'rows':>8} {'tokens':>10} {'seconds':>9} {'tokens/s':>9} {'peak MB':>8}")
    for count, size in sizes.items():
        tokens, median = int(size.rows.lengths.sum()), statistics.median(size.seconds)
        found.append({"rows": count, "tokens": tokens, "seconds": median, "peak_memory": size.peak_memory})
        print(f"{count:8} {tokens:10} {median:9.2f} {tokens / median:9.0f} {size.peak_memory / 1e6:8.0f}")
    tokens_of, seconds_of = (np.log([each[name] for each in found]) for name in ("tokens", "seconds"))
    slope = float(np.polyfit(tokens_of, seconds_of, 1)[0])
    print(f"slope of log seconds over log tokens: {slope:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"slope": slope, "sizes": found}, indent=2) + "\n")


def make_rows(gsm8k: Path, count: int, vocabulary: int) -> PreparedRows:
    """`count` rows; the lengths repeat after the end of the file."""
    samples = make_samples(gsm8k, count, vocabulary)
    once = Dataset.from_list(as_rows(samples))
    rows = concatenate_datasets([once] * -(-count // len(once))).select(range(count))
    return prepared_already(rows, DataCollatorForLanguageModeling(pad_token_id=0))


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 3000, 10_000, 30_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gsm8k", type=Path, default=GSM8K, help="GSM8K's train.jsonl, for the lengths")
    parser.add_argument("--json", type=Path, help="write the sizes and the slope")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
