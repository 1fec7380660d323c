"""Which signal finds wrong rows, with which model? The detection part of `real_models.py`.

For each model, rows and state (as it comes, or after a short warm-up on clean rows of GSM8K's training set), one pass
measures all signals and the resonance at other eps; a second one the resonance of every layer. The
tables of scores are kept, and a pass that was interrupted resumes. An AUROC has a 95 % interval over questions, as
rows of one question are not independent (Obuchowski, Biometrics 53, 1997).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from real_models_rows import DATA, Rows, gsm8k_training, named
from transformers import AutoConfig
from trl import SFTConfig

from resofilter_trainer import ResonanceConfig, ScoreTable, Warmup, score_dataset
from resofilter_trainer.compare.cost import timed
from resofilter_trainer.config import Precision
from resofilter_trainer.model import signals as of_the_pass
from resofilter_trainer.probe.statistics import Auroc, clustered_auroc, length_out
from resofilter_trainer.scores.score_table import LAYER
from resofilter_trainer.scoring.further_signals import ALL_SIGNALS

EPS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)  # beside the default, 1e-8
STATES = {"as it comes": None, "warmed up": 640}  # clean rows of the warm-up
LENGTH = "num_tokens"
VIEWS = ("plain", "length out", "within question")


def detect(model: str, name: str, state: str, data: Path, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The AUROC of every signal for wrong rows: `{signal: {view: [value, low, high]}}`, and the seconds it took.

    Args:
        model: the folder of a model.
        name: which rows, a name in `DATA`.
        state: a name in `STATES`.
        data: the folder of the data.
        output: a folder for the scores.
        settings: `rows`, the number of rows; `signals`, as for `score_dataset`; `bf16`.
    """
    rows = first_questions(DATA[name](data), settings["rows"])
    dataset = Dataset.from_list([{key: row[key] for key in ("prompt", "completion")} for row in rows])
    args = SFTConfig(output_dir="unused", bf16=settings["bf16"], report_to="none", max_length=512, **settings["device"])
    folder = output / "detection" / f"{named(model)}-{name}-{state.replace(' ', '-')}"
    warmup: dict[str, Any] = {}
    if STATES[state] is not None:
        kept = output / "detection" / f"{named(model)}-warmup"
        clean = Dataset.from_list(gsm8k_training(data)).select_columns(["prompt", "completion"])
        warmup = {"warmup": Warmup(rows=STATES[state], cache=kept), "warmup_dataset": clean}
    precision: Precision = "bfloat16" if settings["bf16"] else "float32"
    layers = AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers
    with at_other_eps() as eps:
        signals = [*settings["signals"], *eps]
        scores, seconds = timed(
            folder,
            lambda: score_dataset(
                model, dataset, args=args, output=folder, precision=precision, signals=signals, **warmup
            ),
            resumes=True,
        )
    every, more = timed(
        Path(f"{folder}-layers"),
        lambda: score_dataset(
            model, dataset, args=args, config=ResonanceConfig(n_layers=layers), output=Path(f"{folder}-layers"),
            precision=precision, **warmup,
        ),
        resumes=True,
    )  # fmt: skip
    columns = {each: scores.column(each) for each in [*signals, LENGTH] if each in scores.table.column_names}
    columns |= {f"{LAYER}{layer}": every.column(f"{LAYER}{layer}") for layer in range(layers)}
    columns["resonance, all layers"] = every.column("score")
    found = {each: aurocs(values, rows, scores) for each, values in columns.items()}
    return {"signals": found, "rows": len(rows), "seconds": seconds + more}


def first_questions(rows: Rows, count: int) -> Rows:
    """The rows of the first questions, about `count` of them, with all rows of each question."""
    if len(rows) <= count:
        return rows
    taken = {row["question"] for row in rows[:count]}
    return [row for row in rows if row["question"] in taken]


def aurocs(values: np.ndarray, rows: Rows, scores: ScoreTable) -> dict[str, list[float]]:
    """The AUROC of some values for wrong rows, as they are, with length taken out, and within questions."""
    known = np.isfinite(values)
    wrong = np.array([row["wrong"] for row in rows])[known]
    questions = np.unique([row["question"] for row in rows], return_inverse=True)[1][known]
    values, lengths = values[known], scores.column(LENGTH)[known]
    found = {
        "plain": clustered_auroc(values, wrong, questions),
        "length out": clustered_auroc(length_out(values, lengths), wrong, questions),
        "within question": clustered_auroc(values, wrong, questions, questions),
    }
    return {view: _bounds(each) for view, each in found.items() if each.pairs}


def _bounds(found: Auroc) -> list[float]:
    return [found.value, found.low, found.high]


@contextmanager
def at_other_eps() -> Iterator[list[str]]:
    """A context in which `score_dataset` knows the resonance at other eps as further signals; their names."""
    forms = {
        f"resonance, eps {eps:g}": of_the_pass.Signal(f"the score at eps {eps:g}", "ResoFilter", form={"eps": eps})
        for eps in EPS
    }
    tables = (of_the_pass.SIGNALS, of_the_pass.MEASURED, ALL_SIGNALS)
    for table in tables:
        table.update(forms)
    try:
        yield [*forms]
    finally:
        for table in tables:
            for name in forms:
                del table[name]


def table(found: dict[str, Any], shown_layers: int) -> list[str]:
    """A Markdown table, the best signals first; of the single layers those that are best by these labels."""

    def best(views: dict[str, list[float]]) -> float:
        return max(abs(views[view][0] - 0.5) for view in views)

    order = sorted(found["signals"].items(), key=lambda each: -best(each[1]))
    layers = [name for name, _ in order if name.removeprefix(LAYER).isdecimal()]
    shown = [(name, views) for name, views in order if name not in layers[shown_layers:]]
    views = [view for view in VIEWS if any(view in each for _, each in shown)]
    lines = [f"| signal | {' | '.join(views)} |", "|---" * (len(views) + 1) + "|"]
    for name, each in shown:
        title = f"{name}, picked afterwards" if name in layers else name
        lines.append(f"| {title} | {' | '.join(_shown(each.get(view)) for view in views)} |")
    return lines


def _shown(bounds: list[float] | None) -> str:
    return "-" if bounds is None else "{:.2f} [{:.2f}, {:.2f}]".format(*bounds)
