"""The whole method in a few minutes: make noisy data, score, select, train, compare. Needs no network.

problems, 40 % wrong -> score with the base model -> drop the larger half
fine-tune the base model on: all rows | a random half | the kept half | the clean rows -> held-out accuracy
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from ..config import ColumnMapping, compatibility
from ..data.row_texts import RowTexts
from ..evaluation.generate import exact_match
from ..report import Contents, write_report
from ..scores.doubts import trust_lines
from ..scores.score_table import ScoreTable
from ..scores.statistics import auroc
from ..scoring.dataset import score_dataset
from ..selecting.data_selector import DataSelector
from ..selecting.selection import Selection
from .picture import Outcome, draw
from .problems import Problem, make_problems

BASE = Path(__file__).parent / "base"
ROWS = 2000
WRONG_SHARE = 0.4
HELD_OUT = 400
HELD_OUT_SEED = 1_000_000
KEEP = 0.5
TRAINING: dict[str, Any] = {
    "num_train_epochs": 2,
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "max_length": 256,
    "bf16": False,
    "activation_checkpointing": False,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
}


def run(output: Path, seed: int, rows: int = ROWS) -> dict[str, object]:
    """Run the demo, print its table, and write scores, selection, `results.json`, picture and report to `output`."""
    started = time.perf_counter()
    stages = Stages(6)
    dataset, wrong, held_out = make_data(seed, rows)
    args = training_arguments(output, seed)

    stages.next(f"scoring {rows:,} rows")
    scores = score_dataset(str(BASE), dataset, args=args, output=output)
    selection = DataSelector(keep=KEEP).select(scores)
    selection.save(output)
    outcomes = []
    for name, chosen in row_sets(selection, wrong, seed).items():
        stages.next(f"training on {name}, {len(chosen):,} rows, and answering {len(held_out)} problems")
        accuracy = train_with(dataset.select(chosen), held_out, args, [])
        outcomes.append(Outcome(name, len(chosen), float(wrong[chosen].mean()), accuracy))
    stages.next("writing the report")
    detectors = detect(scores, wrong)
    results = {"rows": [dataclasses.asdict(outcome) for outcome in outcomes], "auroc": detectors, "seed": seed}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(scores, selection, wrong, outcomes, output / "picture.png")
    kinds = ["wrong" if each else "right" for each in wrong]
    texts = RowTexts(dataset, ColumnMapping())
    report = write_report(Contents(scores, selection), output, texts, kinds, title="The demo")
    print("\n".join(trust_lines(scores)))
    print(f"Report, with the reason for each dropped row: {report.path}")
    print(f"Scores, selection, results.json and picture.png: {output}  ({time.perf_counter() - started:.0f} s)")
    print(table(outcomes, detectors))
    return results


class Stages:
    """The stages of the demo as lines, `2 of 6: training on all`, and one bar at a time: that of the stage.

    Args:
        total: the number of stages.
    """

    def __init__(self, total: int) -> None:
        self._total, self._begun = total, 0
        datasets.disable_progress_bars()  # of the many short passes over the rows, and of loading the model
        logging.disable_progress_bar()

    def next(self, text: str) -> None:
        """Say what is done now."""
        self._begun += 1
        print(f"{self._begun} of {self._total}: {text}", flush=True)


def make_data(
    seed: int, rows: int = ROWS, wrong_share: float = WRONG_SHARE, held_out: int = HELD_OUT
) -> tuple[Dataset, np.ndarray, list[Problem]]:
    """Make the rows to train on, a mask of the wrong ones, (N,) bool, and held-out problems with other prompts."""
    problems = make_problems(rows, wrong_share, seed)
    others = make_problems(held_out, seed=HELD_OUT_SEED + seed, exclude={problem.prompt for problem in problems})
    wrong = np.array([problem.kind != "clean" for problem in problems])
    return as_dataset(problems), wrong, others


def as_dataset(problems: Sequence[Problem]) -> Dataset:
    """The problems as a dataset with the columns `prompt` and `completion`."""
    return Dataset.from_list([{"prompt": p.prompt, "completion": p.completion} for p in problems])


def training_arguments(output: Path, seed: int) -> SFTConfig:
    """The arguments of all four trainings and of the scoring."""
    return SFTConfig(
        output_dir=str(output),
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        **compatibility.training_arguments(TRAINING),
    )


def row_sets(selection: Selection, wrong: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The rows of each training, in the order of the dataset."""
    kept = selection.sample_ids
    random = np.random.default_rng(seed).choice(len(wrong), size=len(kept), replace=False)
    return {"all": np.arange(len(wrong)), "random": np.sort(random), "kept": kept, "oracle": np.flatnonzero(~wrong)}


def train_with(rows: Dataset, held_out: Sequence[Problem], args: SFTConfig, callbacks: list[TrainerCallback]) -> float:
    """Fine-tune a new copy of the base model with SFTTrainer. Returns the exact match on the held-out problems."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks)
    trainer.train()
    prompts, references = [p.prompt for p in held_out], [p.completion for p in held_out]
    return exact_match(model, tokenizer, prompts, references, max_new_tokens=56, batch_size=200)


def detect(scores: ScoreTable, wrong: np.ndarray) -> dict[str, float]:
    """The AUROC of score, loss and length as detectors of the wrong rows."""
    columns = {"resonance": "score", "loss": "loss", "length": "num_tokens"}
    return {name: auroc(scores.column(column), wrong) for name, column in columns.items()}


def table(outcomes: Sequence[Outcome], detectors: dict[str, float]) -> str:
    """The results as a text table."""
    lines = [f"{'trained on':12}{'rows':>6}{'wrong rows':>12}{'accuracy':>10}"]
    lines += [f"{each.name:12}{each.rows:6}{each.wrong_share:12.1%}{each.accuracy:10.3f}" for each in outcomes]
    found = ", ".join(f"{name} {value:.3f}" for name, value in detectors.items())
    return "\n".join(["", *lines, "", f"AUROC as detectors of the wrong rows: {found}"])
