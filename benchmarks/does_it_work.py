"""Every method on the demo's problems, of which 0, 20 and 40 % have wrong answers: is any of them worth its cost?

    python recipes/pretrain_demo_base.py --start resofilter_trainer/demo/base --steps 200 --lr 1e-3 --seed 3000000000 \
        --output runs/base80
    python benchmarks/does_it_work.py --base runs/base80 --output runs/works          # hours; resumes
    python benchmarks/does_it_work.py --base runs/base80 --output runs/works --report

    for each share of wrong answers, seed, share to keep, method:
        score, select, train the base, test on 400 new problems -> tables

`comparison` has the settings. `--report` prints the finished cells, also while others are trained. Several processes
can share the work, each with other `--wrong_shares` and one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from resofilter_trainer.compare import run as comparison_run
from resofilter_trainer.compare.cells import Cell, summarise
from resofilter_trainer.compare.config import DEMO, ComparisonConfig
from resofilter_trainer.compare.methods import METHODS
from resofilter_trainer.demo.run import TRAINING, make_data
from resofilter_trainer.evaluation.generate import exact_match
from resofilter_trainer.selecting.results import FULL, RANDOM

LESS = {
    "method": "less",
    "settings": {"lora_r": 8, "dimensions": 1024},
}  # rank 128 has more parameters than this base
HELD_OUT, NEW_TOKENS = 400, 56
SKIPPED = {
    "column": "needs the user's own scores",
    "perplexity": "selects the same rows as low_loss",
    **dict.fromkeys(("signal", "dynamics", "token_rule"), "needs a setting: measured elsewhere"),
}
LEARNING_RATE = 1e-4  # clean rows then improve a base of 80 %; at the demo's 3e-4, any training makes it worse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the model that is trained")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--wrong_shares", type=float, nargs="+", default=[0.0, 0.2, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="print the tables of the finished cells")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for share in args.wrong_shares:
        output = args.output / f"wrong-{share:g}"
        if not args.report:
            comparison_run.run(comparison(args, share, output))
        cells = [each for each in read(output) if each.seed in args.seeds]
        print(report(share, cells, accuracy(args.base, args.seeds, args.rows, share)))


def comparison(args: argparse.Namespace, wrong_share: float, output: Path) -> ComparisonConfig:
    """Every method, three shares; the demo's base, which is worse, is the small model of superfiltering."""
    return ComparisonConfig.of(
        {
            "model": args.base,
            "proxy_model": DEMO,
            "demo": {"rows": args.rows, "wrong_share": wrong_share, "held_out": HELD_OUT},
            "selectors": [LESS if name == "less" else name for name in METHODS if name not in SKIPPED],
            "keep": [0.25, 0.5, 0.75],
            "seeds": args.seeds,
            "max_new_tokens": NEW_TOKENS,
            "training": {**TRAINING, "learning_rate": LEARNING_RATE, "per_device_eval_batch_size": 200},
            "output": str(output),
        }
    )


def read(output: Path) -> list[Cell]:
    """All finished cells."""
    return [comparison_run.read_cell(path, {}) for path in sorted(output.glob("cells/*/*.json"))]


def accuracy(model: str, seeds: Sequence[int], rows: int, wrong_share: float) -> list[float]:
    """The exact match of the untrained model on each seed's held-out problems."""
    found = []
    for seed in seeds:
        _, _, problems = make_data(seed, rows, wrong_share, HELD_OUT)
        base, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        texts = [each.prompt for each in problems], [each.completion for each in problems]
        found.append(exact_match(base, tokenizer, *texts, NEW_TOKENS, 200))
    return found


def report(wrong_share: float, cells: Sequence[Cell], untrained: Sequence[float]) -> str:
    """A table in Markdown: differences to random rows by share, with intervals; the best at one half first."""
    lines = {(line["selector"], line["keep"]): line for line in summarise(cells)}
    if (FULL, 1.0) not in lines:
        return f"### {wrong_share:.0%} wrong\n\nNo cell is finished yet."
    shares = sorted({keep for name, keep in lines if name != FULL})
    names = sorted({name for name, _ in lines} - {FULL, RANDOM}, key=lambda name: -over_random(lines.get((name, 0.5))))
    full = lines[FULL, 1.0]
    random = ", ".join(f"{lines[RANDOM, keep]['metric']:.3f} of {keep:g}" for keep in shares if (RANDOM, keep) in lines)
    columns = [f"keep {keep:g}" for keep in shares] + ["half over all", "AUROC", "wrong in half", "GFLOPs"]
    rows = [
        f"### {wrong_share:.0%} wrong",
        "",
        f"{full['seeds']} seeds. The base itself {np.mean(untrained):.3f}; after all rows "
        f"{full['metric']:.3f} [{full['metric_low']:.3f}, {full['metric_high']:.3f}]; "
        f"random rows {random}. Over as large a random share:",
        "",
        f"| selector | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in names:
        columns = [over_random_or_metric(lines.get((name, keep))) for keep in shares]
        half = lines.get((name, 0.5))
        if half is not None:
            cost = (half["selection_flops"] + half["training_flops"]) / 1e9
            columns += [shown(half["over_full"]), number(half["auroc"]), number(half["wrong_kept"]), f"{cost:.0f}"]
        rows.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(rows) + "\n"


def over_random(line: dict[str, Any] | None) -> float:
    """The difference to random rows, to sort by; -1 if it is unknown."""
    difference = -1.0 if line is None else line["over_random"][0]
    return difference if difference == difference else -1.0


def over_random_or_metric(line: dict[str, Any] | None) -> str:
    """The difference to random rows, or the metric itself if another share of rows was trained on."""
    if line is None:
        return ""
    return shown(line["over_random"]) or f"({line['metric']:.3f} of {line['sdf']:.2f})"


def shown(interval: Sequence[float]) -> str:
    """A mean with its interval; "" if it is unknown."""
    mean, low, high = interval
    if mean != mean:
        return ""
    return f"{mean:+.3f}" if low != low else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
