"""Token cleaning inside one training run: which tokens are learnt, and from when on. Knows a Trainer's data and model.

reference="path"   before the first step: the token scores of all rows, base (the starting weights) against reference
reference="self"   before the first step: the base losses of all rows
                   at each stage of an epoch: the token scores of its rows, base against the latest weights

A batch's labels are masked when it is fetched, in the main process, so that no worker has outdated masks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset
from transformers import Trainer

from ..config import SELF, InputError, TokenCleaning
from ..data.loading import check_model
from ..data.preparation import PreparedRows, prepared_already
from ..data.reference_model import Reference
from ..io.files import load_arrow, save_arrow
from ..io.made_from import check_made_from
from ..model.gradients import segments_of
from ..scores.provenance import Provenance
from ..scores.token_scores import TokenScores
from ..selecting.token_selection import TokenSelection, TokenSelector
from ..tokens.cleaned_dataset import groups_of
from ..tokens.losses import against, losses_under, remove_loss_parts, score_tokens
from .sampler import ROW
from .token_masks import LearntTokens, load_masks, save_masks

BASE_FILE, BASE_KEY = "base_token_losses.arrow", "resofilter_base_token_losses"


@dataclass(frozen=True)
class EpochStage:
    """A stage of an epoch: its number, and the step before which it ends; both counted from 0."""

    number: int
    stop: int


@dataclass(frozen=True)
class Base:
    """The base model of a run, whose weights are those before the first step.

    Attributes:
        losses: (N,) float32, of all learnt tokens.
        provenance: the provenance of the run, with the hash of these weights.
    """

    losses: np.ndarray
    provenance: Provenance


class CleaningRun:
    """The token cleaning of one call of `trainer.train()`.

    Args:
        trainer: the trainer, before its first step.
        cleaning: the settings of token cleaning.

    Raises:
        InputError: the reference is missing or has another vocabulary, or the trainer cannot leave out tokens.

    Attributes:
        reference: the reference model; None where it is the model in training.
        tokens: the N learnt tokens of all R rows.
        groups: the group of each row, or None.
        keep: (N,) bool, the tokens that are learnt now.
        stages: what each cleaning kept, in numbers.
    """

    def __init__(self, trainer: Trainer, cleaning: TokenCleaning) -> None:
        dataset = _checked_dataset(trainer)
        self.trainer, self.cleaning = trainer, cleaning
        self.reference = None if cleaning.reference == SELF else _find_reference(trainer, cleaning.reference)
        self.groups = groups_of(dataset, cleaning.group_by)
        self.tokens = LearntTokens.of(prepared_already(dataset, trainer.data_collator))
        self.keep = np.ones(len(self.tokens), dtype=bool)
        self.stages: list[dict[str, Any]] = []
        self._base: Base | None = None  # until `begin` or `load`

    @property
    def emptied(self) -> np.ndarray:
        """(R,) bool, the rows that keep no token for the whole run and are left out."""
        return self.tokens.emptied(self.keep) & (self.reference is not None)

    def cleaned(self) -> PreparedRows:
        """The rows with their labels as they are learnt now, without the emptied ones."""
        return self.tokens.masked_rows(self.keep).select(np.flatnonzero(~self.emptied))

    # Before the first step

    def begin(self, provenance: Provenance, folder: Path, steps: int) -> None:
        """Measure the base model, which the weights still are, and with a fixed reference decide on every token.

        Args:
            provenance: the provenance of the run.
            folder: the run's folder: base losses for a resumed run, token scores, and parts of an interrupted pass.
            steps: the steps of the shortest epoch that is planned.

        Raises:
            InputError: the epoch has fewer steps than stages, or a loss is not finite.
        """
        refusal = self.refusal(steps)
        if refusal is not None:
            raise refusal
        self._base = Base(self._base_losses(provenance, folder), provenance)
        if self.reference is not None:
            scores = self._scores_of_all(self.reference, self._base, folder)
            selection = TokenSelector(self.cleaning.keep, self.cleaning.ranking).select(scores)
            self.keep = selection.keep
            self.stages.append(self._numbers(selection, np.arange(len(self.tokens.rows.lengths))))
        if PartialState().is_main_process:
            remove_loss_parts(folder)

    def refusal(self, steps: int) -> InputError | None:
        """The reason why an epoch of so many steps cannot be divided into stages, if there is one."""
        if self.reference is not None or steps >= self.cleaning.parts:
            return None
        return InputError(
            f"An epoch of {steps} steps is too short for parts={self.cleaning.parts}: choose fewer parts, or smaller "
            "batches."
        )

    def _base_losses(self, provenance: Provenance, folder: Path) -> np.ndarray:
        """The base model's losses, from the folder if they were made from the same model and rows, or else measured."""
        made_from = self._made_from(provenance)
        try:
            return _load_base_losses(folder, made_from)
        except InputError:  # missing, damaged, or made from something else
            losses = self._measure(self.trainer.model, "base", self.tokens.rows, folder, made_from)
            if self.reference is None and PartialState().is_main_process:
                _save_base_losses(folder, losses, made_from)
            return losses

    def _scores_of_all(self, reference: Reference, base: Base, folder: Path) -> TokenScores:
        """The token scores of all rows against a fixed reference, written to the folder."""
        rows = self.tokens.rows
        with reference.loaded(self.trainer.model) as model:
            check_model(model, rows)
            provenance = against(base.provenance, model)
            made_from = {**self._made_from(base.provenance), **provenance.config}
            losses = self._measure(model, "reference", rows, folder, made_from)
        scores = score_tokens(rows, base.losses, losses, provenance)
        if PartialState().is_main_process:
            scores.save(folder)
        return scores

    # At each stage of an epoch

    def stage_at(self, step: int, steps: int) -> EpochStage | None:
        """The stage of an epoch that begins with a step, if one does.

        Args:
            step: the step, counted from 0 within the epoch.
            steps: the number of steps of the epoch.
        """
        if self.reference is not None:
            return None
        bounds = [int(block[0]) for block in np.array_split(np.arange(steps), self.cleaning.parts)] + [steps]
        number = bounds.index(step) if step in bounds else None
        return None if number is None else EpochStage(number, bounds[number + 1])

    def clean_stage(self, epoch: int, stage: int, rows: np.ndarray) -> dict[str, Any]:
        """Decide on the tokens of a stage by the latest weights. The first stage of the first epoch keeps all tokens.

        Args:
            epoch, stage: their numbers, counted from 0.
            rows: the rows of the stage, in the order in which they are trained on.

        Returns:
            What was kept, in numbers.
        """
        assert self._base is not None, "the run has begun"
        rows = rows[np.sort(np.unique(rows, return_index=True)[1])]  # each once, in order
        own, tokens = self.tokens.rows.select(rows), self.tokens.of_rows(rows)
        keeps_all = epoch == 0 and stage == 0
        base = self._base.losses[tokens]
        latest = base if keeps_all else self._measure(self.trainer.model, "latest", own)
        scores = score_tokens(own, base, latest, self._base.provenance)
        selection = TokenSelector(1.0 if keeps_all else self.cleaning.keep, self.cleaning.ranking).select(scores)
        self.keep[tokens] = selection.keep
        self.stages.append({"epoch": epoch + 1, "part": stage, **self._numbers(selection, rows)})
        return self.stages[-1]

    # At each step

    def masked_batches(self, iterator: Any, enter: Callable[[CleaningRun], None]) -> Iterator[Any]:
        """The batches of a step, with the labels of all but the kept tokens masked.

        Args:
            iterator: the batches, of which as many are taken as the step has.
            enter: a function to call with this object once the first batch has been fetched, before it is masked.
        """
        for number, batch in enumerate(iterator):
            if ROW in batch:
                if number == 0:
                    enter(self)
                rows = batch[ROW].cpu().numpy()
                segments = segments_of(batch)[: len(rows)]
                batch["labels"] = self.tokens.masked_labels(batch["labels"], segments, rows, self.keep)
            yield batch

    # At each checkpoint

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs into a checkpoint's folder."""
        save_masks(folder, self.keep, self.stages)

    def load(self, folder: Path, provenance: Provenance, own: Path) -> None:
        """Read what `save` wrote, and the base model's losses, since the weights are no longer the base model's.

        Args:
            folder: the checkpoint's folder.
            provenance: the provenance of the run to resume.
            own: the run's folder.

        Raises:
            InputError: one of them is missing, or was made from something else.
        """
        self.keep, self.stages[:] = load_masks(folder, len(self.tokens))
        if self.reference is None:
            began_in = folder.parent.parent / own.name  # another folder where the run resumes with a new output_dir
            made_from = self._made_from(provenance)
            try:
                losses = _load_base_losses(own, made_from)
            except InputError:
                if began_in == own or not (began_in / BASE_FILE).is_file():
                    raise
                losses = _load_base_losses(began_in, made_from)
            self._base = Base(losses, provenance)

    # In all of them

    def _measure(
        self,
        model: Any,
        name: str,
        rows: PreparedRows,
        folder: Path | None = None,
        made_from: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        budget = self.cleaning.tokens_per_batch
        return losses_under(model, name, rows, self.trainer.args, budget, folder, made_from)

    def _made_from(self, provenance: Provenance) -> dict[str, Any]:
        """All that the base model's losses depend on."""
        return {
            "weights": provenance.weights,
            "rows": self.tokens.rows.fingerprint,
            "tokens_per_batch": self.cleaning.tokens_per_batch,
            "bf16": bool(self.trainer.args.bf16),
            "versions": dict(provenance.versions),
        }

    def _numbers(self, selection: TokenSelection, rows: np.ndarray) -> dict[str, Any]:
        """What a selection of some rows' tokens keeps."""
        numbers: dict[str, Any] = {
            "tokens": len(selection.keep),
            "tokens_kept": int(selection.keep.sum()),
            "num_rows_emptied": int(selection.emptied.sum()),
        }
        if self.groups is not None:
            numbers["share_of_groups"] = selection.share_of_groups([self.groups[row] for row in rows])
        return numbers


def _checked_dataset(trainer: Trainer) -> Dataset:
    """The training rows. Raises InputError for a trainer that cannot leave out tokens."""
    if not isinstance(trainer.train_dataset, Dataset):
        raise InputError(f"token_cleaning needs a datasets.Dataset, got {type(trainer.train_dataset).__name__}.")
    if not trainer.model_accepts_loss_kwargs:
        raise InputError(
            "token_cleaning needs a model whose loss takes num_items_in_batch: this model's loss is a mean over each "
            "batch, which is not a number for a batch without a learnt token."
        )
    return trainer.train_dataset


def _find_reference(trainer: Trainer, name: str) -> Reference:
    """A fixed reference that fits the trainer's model."""
    args: Any = copy.copy(trainer.args)
    for argument, default in (("trust_remote_code", False), ("model_init_kwargs", None)):  # SFTConfig alone has them
        setattr(args, argument, getattr(trainer.args, argument, default))
    reference = Reference.find(name, args)
    processor: Any = trainer.processing_class
    tokenizer = getattr(processor, "tokenizer", processor)  # a multimodal processor contains one
    reference.check_vocabulary(trainer.model, tokenizer)
    return reference


def _save_base_losses(folder: Path, losses: np.ndarray, made_from: Mapping[str, Any]) -> None:
    save_arrow(pa.table({"loss": losses}), folder / BASE_FILE, BASE_KEY, json.dumps(list(made_from.values())))


def _load_base_losses(folder: Path, made_from: Mapping[str, Any]) -> np.ndarray:
    """The base model's losses in a run's folder. Raises InputError where they are missing or made from other values."""
    table, values = load_arrow(folder / BASE_FILE, BASE_KEY, "losses of the base model")
    there = dict(zip(made_from, json.loads(values), strict=False))  # another version may have recorded fewer
    what = f"'{folder / BASE_FILE}' holds losses of the base model"
    check_made_from(there, made_from, what, "Start training again without a checkpoint.")
    return np.array(table["loss"])
