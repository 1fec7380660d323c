"""One comparison's model and seed: score, select, train and test, for every selector. Knows what each of these needs.

    data -> scores, kept in the folder -> selection of rows or tokens -> training -> held-out metric -> Cell

Knows nothing of the other seeds, nor where cells are kept.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import math
import numbers
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ..config import InputError, NotFiniteError, TokenCleaning
from ..data.loading import load_model
from ..data.rows import first_line
from ..demo.run import BASE, TRAINING
from ..evaluation.generate import exact_match
from ..evaluation.tasks import evaluate_tasks
from ..scores.score_table import ScoreTable
from ..scores.statistics import auroc, rank_correlation
from ..scores.token_scores import TokenScores
from ..selecting.data_selector import DataSelector
from ..selecting.results import FLOPS
from ..selecting.token_selection import TokenSelector
from ..tokens.cleaned_dataset import mask_labels
from ..training.callback import ResonanceCallback
from .cells import Cell
from .config import DEMO, ComparisonConfig, SelectorConfig, slug
from .cost import COST, longer_by, parameters_of, seconds_of, timed
from .data import Data, hash_files
from .method_scores import Request, as_tokens, tune_reference
from .methods import METHODS, TOKEN_LOSSES

ANNEALING = 8  # InfoBatch: all rows in the last eighth of the epochs, of as many epochs at least


@dataclass(frozen=True)
class Scored:
    """What a selector measured.

    Attributes:
        table: its scores.
        seconds: that it took, on this machine, when it was measured.
        parameters: of the model that scored.
        flops: that it took beside forwards.
    """

    table: ScoreTable | TokenScores
    seconds: float
    parameters: int
    flops: float


@dataclass(frozen=True)
class Chosen:
    """What a training sees.

    Attributes:
        rows: as text or as tokens.
        size: of what was selected from, in rows or learnt tokens.
        kept: as many of these stay.
        of_rows: (N,) how much of each row of the dataset stays, in rows or learnt tokens; None where that is not known.
        values: (N,) of each row, larger where it goes first, NaN where it has none; None without scores of rows.
        callback: decides while the training runs; before it, all rows stay.
    """

    rows: Dataset
    size: int
    kept: int
    of_rows: np.ndarray | None
    values: np.ndarray | None = None
    callback: ResonanceCallback | None = None

    def decided(self, epochs: float) -> Chosen:
        """The same after a training of so many epochs, with the mean over them of what the callback has decided."""
        if self.callback is None:
            return self
        stages = self.callback.token_stages
        if stages:
            tokens, kept = (sum(stage[name] for stage in stages) for name in ("tokens", "tokens_kept"))
            return dataclasses.replace(self, kept=round(self.size * kept / tokens), of_rows=None)
        assert self.of_rows is not None
        of_rows, selections = np.zeros(len(self.of_rows)), self.callback.selections
        length = np.clip(epochs - np.arange(len(selections)), 1e-9, 1)  # the last may be a part of one
        of_rows[self.of_rows] = np.average([each.keep for each in selections], axis=0, weights=length)
        return dataclasses.replace(self, kept=round(of_rows.sum()), of_rows=of_rows)


@dataclass(frozen=True)
class Trained:
    """A model that was trained.

    Attributes:
        model, tokenizer: as the trainer leaves them, with a pad token.
        tokens, epochs: that it has seen.
        seconds: that it took.
        loss: at the end, in nats; no number where anything in the run or in the weights was none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens: float
    epochs: float
    seconds: float
    loss: float


class Round:
    """All cells of one model and one seed; scores are made when they are first needed."""

    def __init__(self, config: ComparisonConfig, model: str, seed: int, data: Data) -> None:
        self.config, self.model, self.seed, self.data = config, model, seed, data
        self.args = sft_config(config, model, seed)
        self._scored: dict[Path, Scored] = {}
        self.tried = False

    def origin(self, selector: SelectorConfig) -> dict[str, Any]:
        """What a cell depends on besides the comparison's settings, for people and to compare."""
        method, config = METHODS[selector.method], self.config
        found: dict[str, Any] = {"weights": _hash_weights(path_of(self.model)), "scored by": self.scorer(selector)}
        if found["scored by"] != self.model:
            found["scorer's weights"] = _hash_weights(path_of(found["scored by"]))
        if method.scores == TOKEN_LOSSES and config.reference_model:
            found |= {
                "reference": config.reference_model,
                "its weights": _hash_weights(path_of(config.reference_model)),
            }
        return {**found, "data": self.data.fingerprint(selector.score_column, method.validated)}

    @cached_property
    def own(self) -> ScoreTable:
        """What the trained model's own tokens are, and what it loses on them before any training."""
        return cast(ScoreTable, self.scored(SelectorConfig("low_loss"), own_model=True).table)

    def cell(self, selector: SelectorConfig, keep: float, longer: float = 1.0) -> Cell:
        """Score, select, train and test.

        Args:
            selector: which one.
            keep: the share that stays.
            longer: how many times as many epochs, or steps, as the run has.
        """
        try:
            return self._cell(selector, keep, longer)
        except NotFiniteError as error:
            nothing = dict.fromkeys(("selection_seconds", "selection_flops", "training_seconds", "training_flops"), 0.0)
            about = {"model": self.model, "method": _described(selector), "failure": f"diverged: {error}"}
            return Cell(selector.name, keep, self.seed, len(self.data.rows), 0, None, **nothing, **about)  # type: ignore[arg-type]

    def _cell(self, selector: SelectorConfig, keep: float, longer: float) -> Cell:
        method, scored = METHODS[selector.method], self.scored(selector)
        in_parts = isinstance(method.policy(keep, self.seed, selector), TokenCleaning)
        args = self.prolonged(in_parts, longer)
        chosen = self.choose(selector, keep, scored, args)
        if chosen.values is not None:
            _ = self.own  # another model may have to be loaded for it, for which there is room now
        trained = self.train(chosen, args)
        chosen = chosen.decided(trained.epochs)
        cost = method.cost(self.config, selector, trained.epochs if method.in_run else self.epochs_of(self.args))
        seen = scored.table if isinstance(scored.table, ScoreTable) else self.own
        failure = self.failure_of(trained)
        tests = {} if failure else self.test(trained)
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
            training_flops=6 * parameters_of(trained.model) * trained.tokens,
            model=self.model,
            scored_by=self.scorer(selector) if cost else "",
            method=_described(selector),
            failure=failure,
            tasks=tests if self.config.tasks else {},
            **cast(dict[str, Any], self.insight(chosen)),
        )

    def at_equal_flops(self, selector: SelectorConfig, keep: float, cell: Cell, full: Cell) -> Cell:
        """The same once more, for as long as selecting and training cost together what training on all rows does.

        Args:
            selector, keep: which one.
            cell: of the same, trained for as many epochs as all.
            full: of all rows.
        """
        once, method, epochs = cell.selection_flops, METHODS[selector.method], self.epochs_of(self.args)
        if method.in_run and once:  # a part of what selecting costs grows with the epochs
            once *= method.cost(self.config, selector, 0) / method.cost(self.config, selector, epochs)
        left, grows = full.training_flops - once, cell.selection_flops - once
        if left <= 0 or cell.metric is None:
            why = cell.failure or "selecting alone costs more than training on all rows"
            nothing = {"training_seconds": 0.0, "training_flops": 0.0}
            return dataclasses.replace(cell, budget=FLOPS, metric=None, failure=why, tasks={}, **nothing)  # type: ignore[arg-type]
        cost = cell.training_flops + grows
        first = (full.training_flops + grows if method.in_run else cost) / epochs  # in the run, it is of all rows
        return dataclasses.replace(self.cell(selector, keep, longer_by(left, cost, epochs, first)), budget=FLOPS)

    def scored(self, selector: SelectorConfig, own_model: bool = False) -> Scored:
        """A selector's scores, from the folder where they are there already."""
        method, name = METHODS[selector.method], self.model if own_model else self.scorer(selector)
        parts = [f"column-{selector.score_column}" if selector.score_column else method.scores]
        parts += [selector.name] if selector.settings else []
        trains = method.trains and not (method.scores == TOKEN_LOSSES and self.config.reference_model)
        parts += [f"seed-{self.seed}"] if self.config.dataset == DEMO or trains else []
        folder = Path(self.config.output) / "scores" / slug(name) / "-".join(parts)
        if folder not in self._scored:
            self._scored[folder] = self._measure(selector, name, folder)
        return self._scored[folder]

    def scorer(self, selector: SelectorConfig) -> str:
        """The name of the model that scores for a selector."""
        method = METHODS[selector.method]
        if method.model == "proxy":
            return str(self.config.proxy_model)
        if method.model == "trained" or method.cost(self.config, selector, 1) == 0:
            return self.model
        return selector.score_model or self.config.score_model or self.model

    def _measure(self, selector: SelectorConfig, name: str, folder: Path) -> Scored:
        args, data = sft_config(self.config, name, self.seed), self.data  # the scoring model's, whatever is trained
        reference, before = self._reference() if METHODS[selector.method].scores == TOKEN_LOSSES else (None, 0.0)
        model, tokenizer = load_model(path_of(name), None, args)
        size = parameters_of(model)
        request = Request(model, tokenizer, data.rows, args, folder, selector, data.validation, reference)
        flops = METHODS[selector.method].flops(model, len(data.rows), selector)
        table, seconds = timed(folder, lambda: METHODS[selector.method].score(request), goes_on=True)
        gc.collect()  # LESS trains one, too
        return Scored(table, before + seconds, size, flops)

    def _reference(self) -> tuple[str, float]:
        """What tokens are cleaned against, and the seconds that it took to tune it, if it was tuned here."""
        if self.config.reference_model is not None:
            return path_of(self.config.reference_model), 0.0
        folder = Path(self.config.output) / "scores" / slug(self.model) / f"reference-seed-{self.seed}"

        def tune() -> None:
            model, tokenizer = load_model(path_of(self.model), None, self.args)
            selector = SelectorConfig("token_fixed")
            tune_reference(Request(model, tokenizer, self.data.rows, self.args, folder, selector), folder)

        if not (folder / COST).exists():
            timed(folder, tune, goes_on=False)
        return str(folder / "model"), seconds_of(folder)

    def choose(self, selector: SelectorConfig, keep: float, scored: Scored, args: SFTConfig) -> Chosen:
        """The rows or tokens of a training, or who decides on them while it runs."""
        policy = METHODS[selector.method].policy(keep, self.seed, selector)
        scores, texts = scored.table, self.data.rows.select_columns(["prompt", "completion"])
        if isinstance(scores, TokenScores):
            return self._choose_tokens(scores, cast(TokenSelector, policy))
        everything = np.flatnonzero(scores.scored)
        if isinstance(policy, TokenCleaning):
            policy = dataclasses.replace(policy, parts=max(2, min(policy.parts, self.updates)))
            tokens = int(np.nansum(scores.column("num_tokens")))
            callback = ResonanceCallback(token_cleaning=policy)
            return Chosen(texts.select(everything), tokens, tokens, scores.scored, callback=callback)
        assert not isinstance(policy, TokenSelector), "which is for the scores of tokens"
        if METHODS[selector.method].in_run:
            epochs = math.ceil(self.epochs_of(args))
            end = epochs - epochs // ANNEALING if epochs >= ANNEALING else None
            callback = ResonanceCallback(selector=policy, readmit=True, end_epoch=end)
            return Chosen(texts.select(everything), len(scores), len(everything), scores.scored, callback=callback)
        values = row_values(scores, policy) if isinstance(policy, DataSelector) and policy.keep != 1 else None
        kept = policy.select(scores)
        return Chosen(texts.select(kept.sample_ids), len(scores), len(kept.sample_ids), kept.keep, values)

    def _choose_tokens(self, scores: TokenScores, policy: TokenSelector) -> Chosen:
        policy.check(scores.num_tokens)
        selection, tokens = policy.select(scores), as_tokens(self.data.rows, self.tokenizer, self.args)
        of_rows, values = np.zeros(len(self.data.rows)), np.full(len(self.data.rows), np.nan)
        of_rows[scores.sample_id] = selection.kept_of_row
        values[scores.sample_id] = token_row_values(scores)
        size, kept = len(selection.keep), int(selection.keep.sum())
        return Chosen(mask_labels(tokens.dataset, selection), size, kept, of_rows, values)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The trained model's."""
        path, trust = path_of(self.model), self.args.trust_remote_code
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust)

    @property
    def updates(self) -> int:
        """Of an epoch on all rows, by one process."""
        rows_of_update = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return math.ceil(len(self.data.rows) / rows_of_update)

    def epochs_of(self, args: SFTConfig) -> float:
        """Epochs on all rows that a training's steps come to."""
        return args.max_steps / self.updates if args.max_steps > 0 else float(args.num_train_epochs)

    def prolonged(self, in_parts: bool, longer: float) -> SFTConfig:
        """The same training with that many times the epochs, or the steps where these are counted.

        Where an epoch falls into parts, a last piece of one that is too short for that is left out.
        """
        args = copy.copy(self.args)
        if args.max_steps > 0:
            args.max_steps = max(1, round(longer * args.max_steps))
        else:
            args.num_train_epochs *= longer
            piece = args.num_train_epochs % 1
            if in_parts and args.num_train_epochs > 1 and piece * self.updates < TokenCleaning().parts:
                args.num_train_epochs -= piece
        return args

    def train(self, chosen: Chosen, args: SFTConfig) -> Trained:
        """A fresh copy of the model, on what was chosen."""
        started = time.perf_counter()
        shutil.rmtree(str(args.output_dir), ignore_errors=True)  # the callback would take up what it finds there
        model, tokenizer = load_model(path_of(self.model), None, args)
        if "input_ids" in chosen.rows.column_names:
            args = copy.copy(args)
            args.assistant_only_loss = False  # the labels say it
        trainer = SFTTrainer(
            model,
            args,
            train_dataset=chosen.rows,
            processing_class=tokenizer,
            callbacks=None if chosen.callback is None else [chosen.callback],
        )
        trainer.train()
        history = trainer.state.log_history
        logged = [entry[name] for name in ("train_loss", "loss") for entry in history if name in entry]
        sums = [float(each.detach().sum()) for each in model.parameters()]
        tokens = max(entry.get("num_tokens", 0) for entry in history)
        loss = logged[-1] if np.isfinite([*logged, *sums]).all() else math.nan
        seconds = time.perf_counter() - started
        processor = cast(PreTrainedTokenizerBase, trainer.processing_class)
        return Trained(model, processor, float(tokens), float(trainer.state.epoch or 0), seconds, float(loss))

    def failure_of(self, trained: Trained) -> str:
        """Why a training has failed: it ended worse than guessing, and worse than any row was before; or ""."""
        guessing = math.log(trained.model.config.get_text_config().vocab_size)
        if trained.loss <= guessing:
            return ""
        before = float(np.nanmax(self.own.column("score")))
        if trained.loss <= before:
            return ""
        return f"diverged: a loss of {trained.loss:.3g} at the end, {before:.3g} at most of any row before"

    def try_tasks(self) -> None:
        """One document of each task with the untrained model: what cannot work is said before anything is trained."""
        config, self.tried = self.config, True
        model, tokenizer = load_model(path_of(self.model), None, self.args)
        evaluate_tasks(model, tokenizer, config.tasks, 1, config.task_folder, 1, config.unsafe_code)

    def test(self, trained: Trained) -> dict[str, float]:
        """What is held out: each task, or the exact match of the answers."""
        config, data, size = self.config, self.data, self.args.per_device_eval_batch_size
        model, tokenizer = trained.model, trained.tokenizer
        if config.tasks:
            where = (config.task_folder, config.task_limit, config.unsafe_code)
            return evaluate_tasks(model, tokenizer, config.tasks, size, *where)
        prompts = (data.prompts, data.references)
        return {"exact_match": exact_match(model, tokenizer, *prompts, config.max_new_tokens, size)}

    def insight(self, chosen: Chosen) -> dict[str, float | None]:
        """What the score has to do with length, loss and the truth, where there is a score and a truth."""
        wrong, kept = self.data.wrong, chosen.of_rows
        found: dict[str, float | None] = {}
        if wrong is not None and kept is not None:
            found["wrong_kept"] = float(kept[wrong].sum() / kept.sum())
        if chosen.values is None:
            return found
        own = self.own
        rows = np.isfinite(chosen.values) & own.scored
        values = chosen.values[rows]
        found["length_correlation"] = rank_correlation(values, own.column("num_tokens")[rows])
        found["loss_correlation"] = rank_correlation(values, own.column("score")[rows])
        if wrong is not None and 0 < wrong[rows].sum() < rows.sum():
            found["auroc"] = auroc(values, wrong[rows])
        return found


def row_values(scores: ScoreTable, policy: DataSelector) -> np.ndarray:
    """(N,) of each row, larger where it goes first; NaN where it has no score."""
    return policy.values(scores) * (-1 if policy.end(scores.provenance) == "smallest" else 1)


def token_row_values(scores: TokenScores) -> np.ndarray:
    """(R,) of each row that has tokens, larger where the reference would teach less: less the mean score of a token."""
    row = np.repeat(np.arange(len(scores.sample_id)), scores.num_tokens)
    sums = np.bincount(row, scores.reference.astype(np.float64) - scores.base, minlength=len(scores.sample_id))
    return sums / np.maximum(scores.num_tokens, 1)


def _described(selector: SelectorConfig) -> str:
    return " ".join([selector.method, *(f"{name}={value}" for name, value in selector.settings.items())])


def path_of(model: str) -> str:
    """Where a model lies."""
    return str(BASE) if model == DEMO else model


def sft_config(config: ComparisonConfig, model: str, seed: int) -> SFTConfig:
    """The training of one model and seed: the demo's where its model is trained, else SFTConfig's own in float32.

    Raises:
        InputError: SFTConfig has no such field, or refuses a value.
    """
    own = TRAINING if model == DEMO else {"bf16": False}
    settings = {
        **own,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        **config.training,
        "output_dir": str(Path(config.output) / "trainer"),
        "seed": seed,
    }
    unknown = sorted(set(settings) - {each.name for each in dataclasses.fields(SFTConfig)})
    if unknown:
        raise InputError(f"Of training, '{unknown[0]}' is no field of SFTConfig.")
    try:
        args = SFTConfig(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"SFTConfig refuses these training settings: {first_line(error)}") from error
    for name in ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"):
        if isinstance(getattr(args, name), bool) or not isinstance(getattr(args, name), numbers.Real):
            raise InputError(f"Of training, {name} is a number, got {getattr(args, name)!r}.")
    if args.eval_strategy != "no":
        raise InputError("Of training, leave eval_strategy out: a comparison tests each model once, at the end.")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise InputError(f"Of training, num_train_epochs must be above 0, got {args.num_train_epochs}.")
    return args


@functools.cache
def _hash_weights(path: str) -> str:
    """Of the files with weights in a folder; of a model on the hub nothing, its name says which."""
    files = [each for each in Path(path).glob("*") if each.suffix in (".safetensors", ".bin")]
    return hash_files(Path(path), files) if files else ""
