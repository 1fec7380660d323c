"""Is a probe's recommendation right? Against real errors whose labels the probe does not see.

    python benchmarks/probe.py --models SmolLM2/ gemma-3/ --data gsm8k math --output probes/ --json probe.json

For each model and data set, `probe_dataset` draws rows and recommends a signal without labels. Then the labels tell how
well each signal finds the rows that are really wrong, among the drawn ones: the recommended signal's AUROC beside the
best signal's. Data: four models' solutions of GSM8K's test questions (about two thirds wrong), and solutions of
arithmetic problems from LLM-Adapters (a fifth wrong; those of GSM8K's test set left out). A probe that is there already
is read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl import SFTConfig

from resofilter_trainer import ProbeResult, ScoreTable, probe_dataset
from resofilter_trainer.model.signals import SIGNALS
from resofilter_trainer.probe.drawing import draw, kinds_of
from resofilter_trainer.scores.statistics import auroc

SHARED = Path(__file__).resolve().parents[2] / "shared"
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def main() -> None:
    args = _arguments()
    data = args.shared / "data"
    if not data.is_dir():
        sys.exit(f"skipped: there is no data at '{data}'; pass --shared")
    torch.set_num_threads(args.threads)
    found = []
    print("| model | data | rows | wrong | evidence | recommended | its AUROC | best | its AUROC | minutes |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for model in args.models:
        for name in args.data:
            case = measure(model, name, DATA[name](data), args)
            found.append(case)
            print(
                f"| {Path(model).name} | {name} | {case['rows']} | {case['wrong']:.0%} | {case['evidence']} | "
                f"{case['drop'] or ''} {case['signal']} | {case['found']:.3f} | {case['best']} | {case['most']:.3f} | "
                f"{case['minutes']:.1f} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def measure(model: str, name: str, rows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Probe rows without their labels, and compare what is recommended with what the labels say."""
    wrong = np.array([row.pop("wrong") for row in rows])
    dataset = Dataset.from_list(rows)
    training = SFTConfig(output_dir="unused", bf16=False, use_cpu=True, report_to="none", max_length=512)
    folder = args.output / f"{Path(model).name}-{name}"
    begun = time.monotonic()
    result: ProbeResult = probe_dataset(
        model, dataset, args=training, output=folder, rows=args.rows, self_made=not args.no_self_made,
        precision="float32", signals=args.signals,
    )  # fmt: skip
    minutes = (time.monotonic() - begun) / 60
    drawn = draw(dataset, training, args.rows, kinds_of("all", ()), None, None, 0)
    labels = wrong[[each.row for each in drawn.examples]]
    scores = ScoreTable.load(folder / "scores")
    names = [each for each in scores.table.column_names if scores.direction(each) is not None]
    real = {each: auroc(scores.column(each)[: len(labels)], labels) for each in [*names, "num_tokens"]}
    best = max(real, key=lambda each: max(real[each], 1 - real[each]))
    chosen = result.recommendation
    its = 0.5 if chosen.signal is None else real[chosen.signal]
    return {
        "model": model,
        "data": name,
        "rows": len(labels),
        "wrong": float(labels.mean()),
        "evidence": chosen.evidence,
        "signal": chosen.signal,
        "drop": chosen.drop,
        "length_out": chosen.length_out,
        "found": its if chosen.drop != "smallest" else 1 - its,
        "best": best if real[best] >= 0.5 else f"-{best}",
        "most": max(real[best], 1 - real[best]),
        "real": real,
        "minutes": minutes,
    }


def gsm8k(data: Path) -> list[dict[str, Any]]:
    """Solutions by four models, question after question."""
    lines = (data / "gsm8k" / "example_model_solutions.jsonl").read_text().splitlines()
    found = []
    for line in map(json.loads, lines):
        prompt = f"Question: {line['question']}\nAnswer:"
        found += [
            {"prompt": prompt, "completion": f" {line[solver]['solution']}", "wrong": not line[solver]["is_correct"]}
            for solver in SOLVERS
            if solver in line and line[solver]["solution"].strip()
        ]
    return found


def arithmetic(data: Path) -> list[dict[str, Any]]:
    """One solution for each problem."""
    lines = (data / "math_data" / "llm_adapters_math_labelled.jsonl").read_text().splitlines()
    rows = [each for each in map(json.loads, lines) if not each["in_gsm8k_test"] and each["solution"].strip()]
    return [
        {
            "prompt": f"Question: {each['question']}\nAnswer:",
            "completion": f" {each['solution']}",
            "wrong": not each["correct"],
        }
        for each in rows
    ]


DATA: dict[str, Callable[[Path], list[dict[str, Any]]]] = {"gsm8k": gsm8k, "math": arithmetic}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders of models")
    parser.add_argument("--data", nargs="+", choices=[*DATA], default=[*DATA])
    parser.add_argument("--shared", type=Path, default=SHARED, help="a folder with data/")
    parser.add_argument("--output", type=Path, default=Path("probes"), help="a folder for the probes")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--signals", nargs="+", default=[*SIGNALS], help="by default those of the one pass")
    parser.add_argument("--no_self_made", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
