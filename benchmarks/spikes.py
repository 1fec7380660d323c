"""Is one row of garbage named first? Planted in real trainings with a ledger.

    python benchmarks/spikes.py --output runs/spikes --json spikes.json

For each seed, the demo's base is trained for one epoch on 5,000 of the demo's problems, one of which is answered by
random letters; then the row that `Ledger.spikes` names first is compared with the planted one. `--wrong_share` makes
some of the other answers wrong, too, as the demo does: such rows stand out by themselves.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from resofilter_trainer import Ledger, ResonanceCallback
from resofilter_trainer.demo.problems import make_problems
from resofilter_trainer.demo.run import BASE, as_dataset, training_arguments
from resofilter_trainer.io.files import remove_folder

GARBAGE = 60  # letters: about as many tokens as an answer has


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    found = []
    print(
        "| seed | planted row | step | named first | rank of its step | loss | level | seconds |\n" + "|---" * 8 + "|"
    )
    for seed in args.seeds:
        found.append(measure(seed, args))
        print("| " + " | ".join(str(each) for each in found[-1].values()) + " |", flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    named = sum(each["named_first"] for each in found)
    print(f"\nThe planted row is named first at {named} of {len(found)} seeds.")


def measure(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train with a planted row, and say what the ledger's spikes name.

    Args:
        seed: of the problems, the planted row and the training.
        args: `rows`, `wrong_share`, `batch_size`, `output`.
    """
    dataset, planted = with_garbage(args.rows, args.wrong_share, seed)
    output = args.output / f"seed-{seed}"
    started = time.perf_counter()
    train(dataset, output, seed, args.batch_size)
    ledger = Ledger.load(output)
    spikes = ledger.spikes()
    step = int(ledger.row(planted)["step"].iloc[0])
    ranks = [rank for rank, spike in enumerate(spikes, 1) if spike.step == step]
    steps = ledger.steps().set_index("step")
    result = {
        "seed": seed,
        "planted": planted,
        "step": step,
        "named_first": bool(spikes) and int(spikes[0].rows["sample_id"].iloc[0]) == planted,
        "rank": ranks[0] if ranks else None,
        "loss": round(float(steps["loss"][step]), 3),
        "level": round(float(steps["loss"].loc[step - 50 : step + 50].median()), 3),
        "seconds": round(time.perf_counter() - started),
    }
    remove_folder(output)
    return result


def with_garbage(rows: int, wrong_share: float, seed: int) -> tuple[Dataset, int]:
    """The demo's problems, one of them answered by random letters, and the position of that one."""
    draw = random.Random(seed)
    dataset = as_dataset(make_problems(rows, wrong_share, seed))
    planted = draw.randrange(rows)
    garbage = "".join(draw.choices(string.ascii_letters, k=GARBAGE))
    completions = [*dataset["completion"]]
    completions[planted] = garbage
    return dataset.remove_columns("completion").add_column("completion", completions), planted


def train(dataset: Dataset, output: Path, seed: int, batch_size: int) -> None:
    """One epoch with a ledger, as the demo trains."""
    args = training_arguments(output, seed)
    args.num_train_epochs, args.per_device_train_batch_size, args.disable_tqdm = 1, batch_size, True
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    callback = ResonanceCallback(keep=1.0)
    SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback]).train()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(20))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--wrong_share", type=float, default=0.0, help="of the other answers")
    parser.add_argument("--output", type=Path, default=Path("spikes"), help="a folder for the trainings")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
