"""The rows of `real_models.py`: solutions by language models whose final answers are known to be right or wrong.

    GSM8K's test questions, four solutions each by OpenAI's models         detection, the probe
    LLM-Adapters' arithmetic problems, one solution each                   detection, the probe, training
    SVAMP, questions and answers                                           the test after training

800 of SVAMP's 1,000 questions are among LLM-Adapters' problems, word for word. So rows with such a question are never
trained on: the right ones among them are the held-out rows whose loss is measured.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resofilter_trainer.compare.config import slug

SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
VALIDATION = 100  # right rows, on whose loss the learning rate is chosen
Rows = list[dict[str, Any]]


def data_folder(shared: Path) -> Path:
    """The folder of data in another one. Exits with a line that says how to make it, where it is not there."""
    data = shared / "data"
    if not data.is_dir():
        sys.exit(f"skipped: there is no data at '{data}'; pass --shared, or build it by real_models_data.py")
    return data


def gsm8k_solutions(data: Path) -> Rows:
    """Solutions of GSM8K's test questions by four models, question after question, about two thirds of them wrong."""
    found = []
    for line in _lines(data / "gsm8k" / "example_model_solutions.jsonl"):
        found += [
            _row(line["question"], line[solver]["solution"], wrong=not line[solver]["is_correct"])
            for solver in SOLVERS
            if solver in line and line[solver]["solution"].strip()
        ]
    return found


def arithmetic_solutions(data: Path) -> Rows:
    """One solution of each of LLM-Adapters' problems, without GSM8K's test questions; about a tenth are wrong."""
    return [row for row in _arithmetic(data) if not row["of_gsm8k_test"]]


DATA: dict[str, Callable[[Path], Rows]] = {"gsm8k": gsm8k_solutions, "math": arithmetic_solutions}


def gsm8k_training(data: Path) -> Rows:
    """GSM8K's training set, as people wrote it."""
    return [_row(line["question"], line["answer"]) for line in _lines(data / "gsm8k" / "train.jsonl")]


@dataclass(frozen=True)
class TrainingRows:
    """What models are trained and tested on. No question is in two of these, but for those of `as_is` and `noisy`, and
    of `held_out` and `test`.

    Attributes:
        as_is: LLM-Adapters' rows whose question is none of GSM8K's test set nor of SVAMP, about 6 % wrong.
        noisy: the rows on GSM8K's test questions, 40 % of them wrong, and as many right ones of `as_is` for its wrong
            ones that the share is the same there: so a wrong row is not told by where its question comes from.
        validation: right rows of the kind of `as_is`, on whose loss the learning rate is chosen.
        held_out: right rows on SVAMP's questions, whose loss is measured.
        test: SVAMP's questions with their answers.
    """

    as_is: Rows
    noisy: Rows
    validation: Rows
    held_out: Rows
    test: Rows


def training_rows(data: Path, trained: int | None = None, tested: int | None = None) -> TrainingRows:
    """The rows for training, the same every time.

    Args:
        data: the folder of the data.
        trained: at most so many rows of `as_is`, and of `noisy`; by default all.
        tested: at most so many rows of `held_out`, and of `test`; by default all.
    """
    svamp = json.loads((data / "svamp" / "SVAMP.json").read_text())
    asked = [f"{each['Body'].rstrip('. ')}. {each['Question']}" for each in svamp]
    test = [_row(question, f"The answer is {each['Answer']:g}.") for question, each in zip(asked, svamp, strict=True)]
    questions = {_plain(f"{each['Body']} {each['Question']}") for each in svamp}
    rows = _arithmetic(data)
    of_gsm8k = [row for row in rows if row["of_gsm8k_test"]]
    others = [row for row in rows if not row["of_gsm8k_test"]]
    held_out = [row for row in others if _plain(row["question"]) in questions and not row["wrong"]]
    others = [row for row in others if _plain(row["question"]) not in questions]
    generator = np.random.default_rng(0)
    drawn = [others[number] for number in generator.permutation(len(others)) if not others[number]["wrong"]]
    validated = {_plain(row["question"]) for row in drawn[:VALIDATION]}  # some questions have several rows
    as_is = [row for row in others if _plain(row["question"]) not in validated]
    share, wrong = np.mean([row["wrong"] for row in of_gsm8k]), [row for row in as_is if row["wrong"]]
    right = [row for row in as_is if not row["wrong"]]
    beside = generator.permutation(len(right))[: round(len(wrong) / share) - len(wrong)]
    noisy = [*of_gsm8k, *wrong, *(right[number] for number in beside)]
    return TrainingRows(
        as_is=_drawn(as_is, trained),
        noisy=[noisy[number] for number in generator.permutation(len(noisy))][:trained],
        validation=drawn[:VALIDATION],
        held_out=_drawn(held_out, tested),
        test=_drawn(test, tested),
    )


def _drawn(rows: Rows, most: int | None) -> Rows:
    """So many of the rows, in their order; all if there are no more, or with None."""
    if most is None or most >= len(rows):
        return rows
    return [rows[number] for number in np.sort(np.random.default_rng(0).permutation(len(rows))[:most])]


def _arithmetic(data: Path) -> Rows:
    lines = _lines(data / "math_data" / "llm_adapters_math_labelled.jsonl")
    return [
        _row(line["question"], line["solution"], wrong=not line["correct"], of_gsm8k_test=line["in_gsm8k_test"])
        for line in lines
        if line["solution"].strip()
    ]


def _row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}", "question": question, **more}


def named(model: str) -> str:
    """A model's name in those of files: the last two parts of its path."""
    return slug("-".join(Path(model).resolve().parts[-2:]))


def _plain(question: str) -> str:
    """A question's words, in which the same question is written alike everywhere."""
    return " ".join(re.findall(r"[a-z0-9]+", question.lower()))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
