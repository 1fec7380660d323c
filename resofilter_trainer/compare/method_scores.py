"""How the methods of a comparison score rows: one function for each, `Request -> scores`. Knows no policies.

Each function saves its scores in the request's folder, and returns the scores that are there already.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import (
    SELF,
    ColumnMapping,
    InputError,
    Norm,
    NotFiniteError,
    ResonanceConfig,
    ScoreWarning,
    TokenCleaning,
    UpdateName,
)
from ..criteria.criterion import Criterion
from ..criteria.prompted import RATING_PROMPTS, Nuggets, SelectIT
from ..data.loading import Opened, check_model, usable_rows
from ..data.preparation import PreparedRows, prepare
from ..scores.score_table import LENGTH, ScoreTable
from ..scores.token_scores import STATISTICS, TokenScores
from ..scoring.criterion import score_by
from ..scoring.dataset import score_dataset
from ..scoring.less import LessConfig, less_scores
from ..scoring.output import Measured, PassOutput
from ..scoring.run_pass import run_pass
from ..selecting.token_rules import EARLIER_LOSS, TokenRule
from ..tokens.cleaning import measure_tokens
from ..training.fine_tuning import fine_tune, save_model
from .config import SelectorConfig
from .signals import SignalSettings
from .token_rules import TokenRuleSettings

REFERENCE_SHARE = 0.2  # the share of the rows that the reference model is tuned on, the paper's 10k of 50k


@dataclass(frozen=True)
class Request:
    """What to score, and with which model.

    Attributes:
        model: the scoring model.
        tokenizer: its tokenizer.
        dataset: the rows, with `prompt`, `completion` and the user's other columns.
        args: the training arguments, which say how rows become tokens.
        folder: the folder of the scores.
        selector: the selector.
        validation: `prompt` and `completion` of the validation rows; None if there are none.
        reference: the name or folder of the reference model; None for methods without one.
        path: the name or folder that the scoring model was loaded from.
        adapter: the adapter that methods train which train something; None where all weights are.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    args: SFTConfig
    folder: Path
    selector: SelectorConfig
    validation: Dataset | None = None
    reference: str | None = None
    path: str = ""
    adapter: PeftConfig | None = None

    @cached_property
    def validation_tokens(self) -> PreparedRows:
        """The validation rows as tokens."""
        assert self.validation is not None, "check() requires them"
        return as_tokens(self.validation, self.tokenizer, self.args)


def by_criterion(name: str) -> Callable[[Request], ScoreTable]:
    """Scores by one of `criteria.CRITERIA`."""

    def score(request: Request) -> ScoreTable:
        return score_by(
            name, request.model, request.dataset, request.tokenizer, request.args, request.folder, drop_empty=True
        )

    return score


def by_resonance(update: UpdateName = "adamw", norm: Norm = "mean_abs") -> Callable[[Request], ScoreTable]:
    """ResoFilter's scores."""

    def score(request: Request) -> ScoreTable:
        return score_dataset(
            request.model,
            request.dataset,
            request.tokenizer,
            request.args,
            ResonanceConfig(update=update, norm=norm),
            request.folder,
            drop_empty=True,
        )

    return score


def by_signal(request: Request) -> ScoreTable:
    """The signals of one pass, among them the one to rank by."""
    settings = SignalSettings(**request.selector.settings)
    if settings.by == LENGTH:
        return by_criterion("length")(request)
    with warnings.catch_warnings():
        if not settings.of_resonance:
            warnings.simplefilter("ignore", ScoreWarning)  # of doubts about the resonance
        scores = score_dataset(
            request.model,
            request.dataset,
            request.tokenizer,
            request.args,
            output=request.folder,
            signals=settings.measured,
            reference=request.reference,
            warmup=settings.tuning,
            drop_empty=True,
        )
    if settings.by not in scores.table.column_names:
        raise InputError(
            f"The selector '{request.selector.name}' ranks by {settings.by}, which cannot be measured on this model "
            "(the pass has printed why): choose another signal."
        )
    return scores


def by_nuggets(request: Request) -> ScoreTable:
    """Nuggets' golden score on the validation rows."""
    tasks = request.validation_tokens
    anchors = [{name: torch.tensor(row[name]) for name in ("input_ids", "labels")} for row in tasks.dataset]
    between = request.tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    criterion = Criterion(Nuggets(anchors, between), drop="smallest", settings={"validation": tasks.fingerprint})
    return score_by(
        criterion, request.model, request.dataset, request.tokenizer, request.args, request.folder, drop_empty=True
    )


def by_selectit(request: Request) -> ScoreTable:
    """SelectIT's rating of each row by the model."""
    criterion = Criterion(
        SelectIT(request.tokenizer), drop="smallest", settings={"prompts": RATING_PROMPTS}, of_prompt=True
    )
    return score_by(
        criterion, request.model, request.dataset, request.tokenizer, request.args, request.folder, drop_empty=True
    )


def by_less(request: Request) -> ScoreTable:
    """Influence on the validation rows."""
    own, validation = LessConfig(**{"seed": request.args.seed, **request.selector.settings}), request.validation_tokens
    settings = {**dataclasses.asdict(own), "validation": validation.fingerprint}
    config = {"criterion": "less", "drop": "smallest", **settings}

    def measure(model: PreTrainedModel, opened: Opened, target: PassOutput) -> Measured:
        check_model(model, validation)
        values = less_scores(model, request.tokenizer, opened.prepared, validation, request.args, own)
        if not np.isfinite(values).all():
            raise NotFiniteError(
                "LESS's warm-up gave gradients that are not finite: try a smaller learning_rate in its settings."
            )
        return Measured({"score": values})

    return run_pass(
        request.model, request.dataset, request.tokenizer, request.args, config, request.folder, measure,
        drop_empty=True,
    )  # fmt: skip


def by_column(request: Request) -> ScoreTable:
    """The user's own scores, from a column of the dataset."""
    name, dataset = str(request.selector.score_column), request.dataset
    if name not in dataset.column_names:
        raise InputError(f"score_column '{name}' is not a column of the dataset: {', '.join(dataset.column_names)}.")
    config = {"score_column": name, "values": xxhash.xxh3_128_hexdigest(repr(dataset[name][:]).encode())}

    def read(model: PreTrainedModel, opened: Opened, target: PassOutput) -> Measured:
        sample_ids = opened.prepared.sample_ids
        values = np.array([_number(value, row, name) for row, value in enumerate(dataset[name])])[sample_ids]
        if not np.isfinite(values).all():
            row = sample_ids[int(np.argmin(np.isfinite(values)))]
            raise InputError(f"Row {row} has no finite number in score_column '{name}'.")
        return Measured({"score": values})

    return run_pass(
        request.model, dataset, request.tokenizer, request.args, config, request.folder, read,
        place=None, drop_empty=True,
    )  # fmt: skip


def _number(value: Any, row: int, name: str) -> float:
    """A number of a column, of CSV as text; NaN for a missing one."""
    try:
        return float("nan") if value in (None, "") else float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"score_column '{name}' must hold numbers only: row {row} has {value!r}.") from error


def by_token_losses(request: Request) -> TokenScores:
    """Every learnt token's loss under the base model and under the reference model."""
    assert request.reference is not None, "a comparison tunes a reference model where none is given"
    cleaning = TokenCleaning(keep=1.0, reference=request.reference)
    _, scores = measure_tokens(
        request.model, request.dataset, cleaning, request.tokenizer, request.args, request.folder, drop_empty=True
    )
    return scores


def by_token_statistics(request: Request) -> TokenScores:
    """Every learnt token's loss and the statistics that some rules need, from one forward."""
    return _measured(request, request.model, TokenRule("statistics", lambda tokens: tokens.loss, STATISTICS))


def by_token_progress(request: Request) -> TokenScores:
    """Every learnt token's loss under the model after its first training, and under the model before it."""
    assert request.reference is not None, "a comparison trains it"
    needs = {EARLIER_LOSS, *TokenRuleSettings(**request.selector.settings).needs}  # every gamma shares them
    rule = TokenRule("progress", lambda tokens: tokens.loss, needs)
    return _measured(request, request.reference, rule, earlier=request.path)


def _measured(request: Request, model: str | PreTrainedModel, rule: TokenRule, earlier: str = SELF) -> TokenScores:
    cleaning, tokenizer = TokenCleaning(reference=earlier), request.tokenizer  # read where the rule needs it
    _, scores = measure_tokens(
        model, request.dataset, cleaning, tokenizer, request.args, request.folder, rule=rule, drop_empty=True
    )
    return scores


def as_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> PreparedRows:
    """`prompt` and `completion` as tokens, without the rows that have no learnt token."""
    usable, _ = usable_rows(rows, ColumnMapping(), args, False, True)
    return prepare(usable, tokenizer, args, drop_empty=True)


def tune_reference(request: Request, folder: Path) -> None:
    """Tune the model on all tokens of the first rows, as fixed-model cleaning does (arXiv 2502.01968, section 3.2).

    Args:
        request: the request, whose model is trained in place.
        folder: a folder for the training; the tuned model is saved in its folder `model`.
    """
    rows = as_tokens(request.dataset, request.tokenizer, request.args)
    first = rows.select(np.arange(max(1, round(REFERENCE_SHARE * len(rows.lengths)))))
    args = copy.copy(request.args)
    if args.max_steps > 0:
        args.max_steps = max(1, round(REFERENCE_SHARE * args.max_steps))
    dataset = first.dataset.select_columns(["input_ids", "labels"])
    trained = fine_tune(request.model, dataset, args, request.tokenizer, request.adapter, folder / "trainer")
    save_model(trained, request.tokenizer, folder / "model")
