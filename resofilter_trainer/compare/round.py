"""All cells of one model and seed of a comparison: each is scored, selected, trained and tested.

    data -> scores, kept in the folder -> rows or tokens -> training -> held-out metric and loss -> Cell

Does not know the other seeds, nor where cells are kept.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Any

import numpy as np

from ..config import NotFiniteError, TokenCleaning
from ..data.preparation import PreparedRows
from ..scores.score_table import ScoreTable
from ..selecting.results import FLOPS
from .cells import Cell
from .choosing import Chosen, choose
from .config import ComparisonConfig, SelectorConfig
from .cost import longer_by, trained_flops
from .data import Data
from .held_out_loss import held_out_loss, held_out_tokens
from .insight import relations, wrong_kept
from .methods import method_of
from .selector_scores import SelectorScores
from .training import (
    Trained,
    epochs_of,
    held_out_metrics,
    lengthened,
    lora_config,
    model_path,
    sft_config,
    train,
    try_tasks,
)

ROUNDING = 1e-6  # of a budget
COSTS = ("selection_seconds", "selection_flops", "training_seconds", "training_flops")


class Round:
    """All cells of one model and one seed.

    Args:
        config: the comparison.
        model: the model that is trained.
        seed: the seed of the training.
        data: the data of that seed.

    Raises:
        InputError: the settings of the training cannot work, or a selector needs a longer one.
    """

    def __init__(self, config: ComparisonConfig, model: str, seed: int, data: Data) -> None:
        self.config, self.model, self.seed, self.data = config, model, seed, data
        self.args, self.adapter = sft_config(config, model, seed), lora_config(config)
        self.scores = SelectorScores(config, model, seed, data)
        self.scores.check_epochs()
        self._tasks_tried = False

    def try_tests(self) -> None:
        """Prepare the tests, once, so that an error comes before anything is scored or trained.

        One document of each task is run, and the rows of the held-out loss become tokens.
        """
        _ = self._loss_tokens
        if self.config.tasks and not self._tasks_tried:
            self._tasks_tried = True
            try_tasks(self.config, self.model, self.args)

    @cached_property
    def _loss_tokens(self) -> PreparedRows | None:
        """The rows of the held-out loss as tokens; None if there are none."""
        rows = self.data.loss_rows
        return None if rows is None else held_out_tokens(rows, model_path(self.model), self.args)

    def cell(self, selector: SelectorConfig, keep: float, factor: float = 1.0) -> Cell:
        """Score, select, train and test.

        Args:
            selector: the selector.
            keep: the share to keep.
            factor: the length of the training over the one in the settings.
        """
        try:
            return self._cell(selector, keep, factor)
        except NotFiniteError as error:
            about = {"model": self.model, "method": _described(selector), "failure": f"diverged: {error}"}
            rows, costs = len(self.data.rows), dict.fromkeys(COSTS, 0.0)
            return Cell(selector.name, keep, self.seed, rows, 0, None, **costs, **about)  # type: ignore[arg-type]

    def _cell(self, selector: SelectorConfig, keep: float, factor: float) -> Cell:
        method, scored, rows = method_of(selector), self.scores.of(selector), self.data.rows
        in_stages = isinstance(method.policy(keep, self.seed, selector), TokenCleaning)
        args = lengthened(self.args, factor, len(rows), in_stages)
        chosen = choose(selector, keep, scored.table, rows, args, self.model)
        if chosen.values is not None:
            _ = self.scores.of_trained_model  # may load another model, for which there is memory before the training
        trained = train(self.model, chosen.rows, chosen.callback, args, self.adapter)
        chosen = chosen.decided(trained.epochs)
        epochs = trained.epochs if method.in_run else epochs_of(self.args, len(rows))
        cost = method.cost(self.config, selector, epochs)
        seen = scored.table if isinstance(scored.table, ScoreTable) else self.scores.of_trained_model
        failure = self._failure(trained)
        tests = {} if failure else held_out_metrics(trained, self.config, self.data, self.args)
        loss_rows = None if failure else self._loss_tokens
        return Cell(
            selector=selector.name,
            keep=keep,
            seed=self.seed,
            rows=chosen.size,
            kept=chosen.kept,
            metric=float(np.mean(list(tests.values()))) if tests else None,
            selection_seconds=scored.seconds if cost and not method.in_run else 0.0,
            selection_flops=2 * cost * scored.parameters * float(np.nansum(seen.column("length"))) + scored.flops,
            training_seconds=trained.seconds,
            training_flops=trained_flops(trained.model) * trained.tokens,
            model=self.model,
            scored_by=self.scores.scorer(selector) if cost else "",
            method=_described(selector),
            failure=failure,
            tasks=tests if self.config.tasks else {},
            held_out_loss=None if loss_rows is None else held_out_loss(trained.model, loss_rows, self.args),
            **self._insight(chosen),
        )

    def at_equal_flops(self, selector: SelectorConfig, keep: float, cell: Cell, full: Cell) -> Cell:
        """The cell of a training so long that selecting and training cost as much as training on all rows.

        Args:
            selector, keep: the selector and the share to keep.
            cell: their cell with as many epochs as the training on all rows.
            full: the cell of the training on all rows.
        """
        method, epochs = method_of(selector), epochs_of(self.args, len(self.data.rows))
        once = cell.selection_flops
        if method.in_run and once:  # the rest of the cost of selecting grows with the epochs
            once *= method.cost(self.config, selector, 0) / method.cost(self.config, selector, epochs)
        left, grows = full.training_flops - once, cell.selection_flops - once
        rounding = ROUNDING * full.training_flops
        if left <= rounding or cell.metric is None:
            than = "more than" if left < -rounding else "as much as"
            failure = cell.failure or f"selecting alone costs {than} training on all rows"
            nothing: dict[str, Any] = {"training_seconds": 0.0, "training_flops": 0.0, "held_out_loss": None}
            return dataclasses.replace(cell, budget=FLOPS, metric=None, failure=failure, tasks={}, **nothing)
        cost = cell.training_flops + grows
        first = (full.training_flops + grows if method.in_run else cost) / epochs  # in the run, it has all rows
        return dataclasses.replace(self.cell(selector, keep, longer_by(left, cost, epochs, first)), budget=FLOPS)

    def _failure(self, trained: Trained) -> str:
        """Why a training has failed: its last loss is above guessing and above every row's before it; or ""."""
        guessing = math.log(trained.model.config.get_text_config().vocab_size)
        if trained.loss <= guessing:
            return ""
        before = float(np.nanmax(self.scores.of_trained_model.column("score")))
        if trained.loss <= before:
            return ""
        return f"diverged: the loss is {trained.loss:.3g} at the end, and was at most {before:.3g} for any row before"

    def _insight(self, chosen: Chosen) -> dict[str, Any]:
        """How the scores relate to length, loss and wrong rows, as far as these are known."""
        wrong, found = self.data.wrong, dict[str, float]()
        if wrong is not None and chosen.of_rows is not None:
            found["wrong_kept"] = wrong_kept(chosen.of_rows, wrong)
        if chosen.values is not None:
            found |= relations(chosen.values, self.scores.of_trained_model, wrong)
        return found


def _described(selector: SelectorConfig) -> str:
    return " ".join([selector.method, *(f"{name}={value}" for name, value in selector.settings.items())])
