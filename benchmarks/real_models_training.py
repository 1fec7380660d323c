"""Is training on some of the rows as good as on all? The training parts of `real_models.py`.

Each is a comparison of `resofilter compare`, which says what every arm costs and resumes after the last training that
was completed:

    rate        all rows at some learning rates: that of the least loss on rows that nothing else uses is taken
    as_is       LLM-Adapters' rows as they are, 6 % wrong
    noisy       40 % wrong
    detector    `noisy`, half of the rows by the true labels with noise put in: how good must a detector be?

Right answers alone are an arm of their own comparison, as they are all rows of another dataset.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from real_models_rows import Rows, TrainingRows, named

from resofilter_trainer.compare.cells import Cell, summarise
from resofilter_trainer.compare.config import ComparisonConfig
from resofilter_trainer.compare.run import run
from resofilter_trainer.config import InputError
from resofilter_trainer.selecting.results import FLOPS

RATES = (3e-5, 1e-4, 3e-4)
RATES_OF_LORA = (1e-4, 3e-4, 1e-3)
DETECTORS = (0.6, 0.7, 0.8, 0.9, 1.0)  # AUROC
KEEP = 0.5
NOT_MEASURED = (math.nan,) * 3
BATCH = 8
ANSWER = 128  # tokens at most; the training rows' answers have 70 in the mean
TRAINING = {
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": 100,
    "max_length": 512,
    "train_sampling_strategy": "group_by_length",  # little padding
    "activation_checkpointing": False,
}


def lora_of(rank: int | None) -> dict[str, Any] | None:
    """The fields of LoraConfig for an adapter of a rank on all linear layers; None for none."""
    return None if rank is None else {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}


def memory(batch: int) -> dict[str, int]:
    """The fields of SFTConfig for steps of `BATCH` rows, of which so many are in memory at a time."""
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": BATCH // batch}


class Training:
    """The comparisons of one model.

    Args:
        model: the folder of a model.
        rows: the rows.
        output: a folder for everything.
        settings: fields of SFTConfig, beside `TRAINING`.
        seeds: the seeds.
        rate: the learning rate; by default it is chosen.
        lora: fields of LoraConfig; by default all weights are trained.
    """

    def __init__(
        self, model: str, rows: TrainingRows, output: Path, settings: dict[str, Any], seeds: Sequence[int],
        rate: float | None = None, lora: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.rows, self.seeds, self._rate, self._lora = model, rows, seeds, rate, lora
        self.output, self.settings = output / "training" / named(model), settings
        self.files = {name: self._file(name, getattr(rows, name)) for name in ("validation", "held_out", "test")}

    @cached_property
    def rate(self) -> float:
        """The learning rate at which a training on all rows has the least loss on the rows for validation."""
        if self._rate is not None:
            return self._rate
        losses, rates = {}, RATES if self._lora is None else RATES_OF_LORA
        for rate in rates:
            cells = self._compare(f"rate-{rate:g}", self.rows.as_is, ["full"], seeds=[0], rate=rate, test="validation")
            losses[rate] = cells[0].held_out_loss if cells[0].held_out_loss is not None else float("inf")
        print("loss on rows for validation, by learning rate:", {f"{rate:g}": losses[rate] for rate in rates})
        best = min(losses, key=lambda rate: losses[rate])
        if math.isinf(losses[best]):
            raise InputError(
                f"Every training at a learning rate of {', '.join(f'{rate:g}' for rate in rates)} diverged."
            )
        return best

    def arms(self, name: str, probe: Path | None = None, equal_cost: bool = False) -> list[Cell]:
        """All arms on the rows `as_is` or `noisy`.

        Args:
            name: which rows.
            probe: the folder of a probe of these rows, whose recommendation is an arm; None for none.
            equal_cost: whether to train each half also for so long that it costs what all rows do.
        """
        rows: Rows = getattr(self.rows, name)
        selectors: list[Any] = ["full", "random", "resonance", "low_loss"]
        if probe is not None:
            selectors.append({"probe": str(probe)})
        cells = self._compare(name, rows, selectors, equal_flops=equal_cost)
        right = self._compare(f"{name}-right", [row for row in rows if not row["wrong"]], ["full"])
        return cells + [_renamed(cell, "right rows only", len(rows)) for cell in right]

    def detectors(self) -> list[Cell]:
        """Half of the rows `noisy` by detectors of known AUROC, each seed with noise of its own."""
        found = []
        for seed in self.seeds:
            columns = {f"AUROC {auroc:g}": detector(self.rows.noisy, auroc, seed) for auroc in DETECTORS}
            rows = [
                {**row, **{name: float(values[number]) for name, values in columns.items()}}
                for number, row in enumerate(self.rows.noisy)
            ]
            selectors = [{"score_column": name, "drop": "largest"} for name in columns]
            found += self._compare(f"detectors-{seed}", rows, selectors, seeds=[seed])
        return found

    def _compare(
        self, name: str, rows: Rows, selectors: Sequence[Any], *, seeds: Sequence[int] | None = None,
        rate: float | None = None, test: str = "test", **settings: Any,
    ) -> list[Cell]:  # fmt: skip
        chosen = self.rate if rate is None else rate
        config = ComparisonConfig.of(
            {
                "model": self.model,
                "dataset": self._file(name, rows),
                "wrong_column": "wrong",
                "test_dataset": self.files[test],
                "loss_dataset": self.files["held_out" if test == "test" else test],
                "selectors": list(selectors),
                "keep": [KEEP],
                "seeds": list(self.seeds if seeds is None else seeds),
                "max_new_tokens": ANSWER,
                "training": {**TRAINING, **self.settings, "learning_rate": chosen},
                "lora": self._lora,
                "output": str(self.output / name),
                **settings,
            }
        )
        return run(config)

    def _file(self, name: str, rows: Rows) -> str:
        path = self.output / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)


def detector(rows: Rows, auroc: float, seed: int) -> np.ndarray:
    """(N,) values that are normal for right rows, and so far apart for wrong ones that they detect them this well."""
    wrong = np.array([row["wrong"] for row in rows])
    noise = np.random.default_rng([seed, round(auroc * 1000)]).normal(size=len(rows))
    if auroc == 1:
        return noise + wrong * 2 * np.ptp(noise)
    return noise + wrong * np.sqrt(2) * statistics.NormalDist().inv_cdf(auroc)


def _renamed(cell: Cell, name: str, rows: int) -> Cell:
    return dataclasses.replace(cell, selector=name, rows=rows, scored_by="")


def table(cells: Sequence[Cell]) -> list[str]:
    """A Markdown table with a line for each arm: means over seeds with their 95 % intervals (Student's t)."""
    lines = [
        "| arm | seeds | kept | wrong kept | exact match | over random half | over all rows | held-out loss | cost |",
        "|---" * 9 + "|",
    ]
    for each in summarise(cells):
        failed = f" ({len(each['failures'])} diverged)" if each["failures"] else ""
        equal = ", equal cost" if each["budget"] == FLOPS else ""
        flops = each["selection_flops"] + each["training_flops"]
        lines.append(
            f"| {each['selector']}{equal}{failed} | {each['seeds']} | {each['sdf']:.0%} | {_share(each['wrong_kept'])} "
            f"| {_interval(each['metric'], each['metric_low'], each['metric_high'])} "
            f"| {_interval(*each['over_random'])} | {_interval(*each['over_full'])} "
            f"| {_interval(*each.get('held_out_loss', NOT_MEASURED))} | {flops / 1e15:.2f} |"
        )
    return lines


def _interval(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if math.isnan(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
