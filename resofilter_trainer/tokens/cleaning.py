"""Token cleaning: which tokens of a dataset are worth learning, according to a base and a reference model.

    base losses, reference losses -> TokenScores  ==saved==>  TokenSelector -> labels with -100

Knows models and rows as tokens. `scoring.token_losses` measures, `selecting.token_selection` decides.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import SELF, InputError, TokenCleaning, check_kind
from ..config.keywords import RowOptions
from ..data.arguments import check_call
from ..data.loading import Opened, check_arguments, check_model, default_arguments, open_pass, placed
from ..data.preparation import PreparedRows
from ..data.reference_model import Reference
from ..scores.provenance import Provenance
from ..scores.token_scores import TOKEN_SCORES_FILE, TokenScores
from ..scoring.passes import locked
from ..selecting.token_selection import EMPTIED, TokenSelector
from .cleaned_dataset import CleanedDataset, check_output, groups_of, mask_labels, save_dataset, summarise
from .losses import against, losses_under, remove_loss_parts, score_tokens

REFERENCE_NAMES = ("reference_weights", "reference_settings")  # in the provenance's config


def clean_dataset(
    model: str | PreTrainedModel,
    dataset: Dataset,
    cleaning: TokenCleaning,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    **row_options: Unpack[RowOptions],
) -> CleanedDataset:
    """Mask the tokens that a reference model has nothing to teach about (Token Cleaning, arXiv 2502.01968, section 3).

    Args:
        model: the base model, or its name or folder, which is then loaded in float32.
        dataset: rows as for `score_dataset`. Labels that are masked already stay masked and are no candidates.
        cleaning: the reference model, the share of tokens to keep and their ranking. Two models are in memory at once
            only where `model` is a loaded model and the reference is no adapter.
        processing_class: the tokenizer of both models; by default the base model's own.
        args: SFTTrainer's arguments: lengths, masking, device, and `bf16` for a forward in bfloat16 autocast. By
            default SFTConfig's own, without bf16.
        output: a folder for the cleaned dataset (`datasets.load_from_disk`), the token scores and a summary. Existing
            scores of the same models and rows are reused; an interrupted pass is resumed.
        **row_options: `drop_duplicates`, `drop_empty`, `source` and the columns, as for `score_dataset`.

    As in SFTTrainer, random numbers start from `args.seed`.

    Raises:
        InputError: no token can be learnt, the reference is missing or has another vocabulary, a loss is not finite,
            `output` holds something else, or another run writes to it.
    """
    check_call(clean_dataset, row_options, model, processing_class, args)
    check_kind("cleaning", cleaning, TokenCleaning, "a TokenCleaning")
    folder = _folder(output)
    check_output(folder, TOKEN_SCORES_FILE)
    with locked(folder):
        task, scores = _scored(model, dataset, cleaning, processing_class, args, folder, **row_options)
        return _cleaned(task, scores)


def measure_tokens(
    model: str | PreTrainedModel,
    dataset: Dataset,
    cleaning: TokenCleaning,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    **row_options: Any,
) -> tuple[CleaningTask, TokenScores]:
    """The losses of every learnt token under the base and the reference model. Arguments and errors: `clean_dataset`'s.

    Returns:
        The task with its rows as tokens, and the token scores, which are also in `output`.
    """
    folder = _folder(output)
    with locked(folder):
        return _scored(model, dataset, cleaning, processing_class, args, folder, **row_options)


@dataclass(frozen=True)
class CleaningTask:
    """Everything about one cleaning except its models.

    Attributes:
        cleaning: the settings.
        args: SFTTrainer's arguments.
        opened: the tokenizer, the rows as tokens, and the provenance of the base model's losses.
        groups: the group of each of the user's rows, or None.
        folder: the output folder, or None.
    """

    cleaning: TokenCleaning
    args: SFTConfig
    opened: Opened
    groups: list[Any] | None
    folder: Path | None

    @property
    def selector(self) -> TokenSelector:
        """Decides which tokens are kept."""
        return TokenSelector(self.cleaning.keep, self.cleaning.ranking)

    def losses(self, model: PreTrainedModel, name: str, rows: PreparedRows, provenance: Provenance) -> np.ndarray:
        """A model's loss of every learnt token, (N,) float32; see `losses_under`."""
        budget = self.cleaning.tokens_per_batch
        return losses_under(model, name, rows, self.args, budget, self.folder, provenance.compared)

    def existing_scores(self) -> TokenScores | None:
        """The token scores that are in the folder already, of the same base model and rows and whatever reference."""
        if self.folder is None or not (self.folder / TOKEN_SCORES_FILE).exists():
            return None
        existing = TokenScores.load(self.folder)
        of_reference = {name: value for name, value in existing.provenance.config.items() if name in REFERENCE_NAMES}
        here = self.opened.provenance
        here = dataclasses.replace(here, config={**here.config, **of_reference})
        existing.provenance.check_same(here, "token scores", self.folder)
        return existing

    def groups_of(self, sample_id: np.ndarray) -> list[Any] | None:
        """The groups of some rows, by their positions in the user's dataset."""
        return None if self.groups is None else [self.groups[row] for row in sample_id]


def open_task(
    model: str | PreTrainedModel,
    dataset: Dataset,
    cleaning: TokenCleaning,
    processing_class: PreTrainedTokenizerBase | None,
    args: SFTConfig,
    folder: Path | None,
    *,
    source: Mapping[str, Any] | None = None,
    **row_options: Any,
) -> tuple[PreTrainedModel, CleaningTask]:
    """The base model, on its device, and the task. Arguments and errors: `clean_dataset`'s."""
    check_arguments(args, folder)
    groups = groups_of(dataset, cleaning.group_by)
    config = {"tokens_per_batch": cleaning.tokens_per_batch}
    source = {**(source or {}), "reference": cleaning.reference}
    base, opened = open_pass(model, dataset, processing_class, args, config, source=source, **row_options)
    return placed(base, args), CleaningTask(cleaning, args, opened, groups, folder)


def _scored(
    model: str | PreTrainedModel,
    dataset: Dataset,
    cleaning: TokenCleaning,
    processing_class: PreTrainedTokenizerBase | None,
    args: SFTConfig | None,
    folder: Path | None,
    **row_options: Any,
) -> tuple[CleaningTask, TokenScores]:
    """Open the models one after the other, measure both, and save the token scores. The caller locks the folder."""
    if cleaning.reference == SELF:
        raise InputError(
            "reference='self' cleans while a model trains: use self_evolve or ResonanceCallback, or pass a reference."
        )
    args = args or default_arguments()
    reference = Reference.find(cleaning.reference, args)
    base: PreTrainedModel | None
    base, task = open_task(model, dataset, cleaning, processing_class, args, folder, **row_options)
    rows, provenance = task.opened.prepared, task.opened.provenance
    reference.check_vocabulary(base, task.opened.tokenizer)
    task.selector.check(rows.num_tokens)
    existing = task.existing_scores()
    base_losses = task.losses(base, "base", rows, provenance) if existing is None else existing.base
    if not reference.is_adapter:
        base = None  # frees a model that was loaded here before the reference is loaded
    with reference.loaded(base) as other:
        check_model(other, rows)
        provenance = against(provenance, other)
        if existing is not None:
            existing.provenance.check_same(provenance, "token scores", folder)
            return task, existing
        losses = task.losses(other, "reference", rows, provenance)
    scores = score_tokens(rows, base_losses, losses, provenance)
    if folder is not None and PartialState().is_main_process:
        scores.save(folder)
        remove_loss_parts(folder)
    return task, scores


def _cleaned(task: CleaningTask, scores: TokenScores) -> CleanedDataset:
    """Decide which tokens are kept, and mask the others; saved to the task's folder."""
    selection = task.selector.select(scores)
    reasons = task.opened.reasons | {int(row): EMPTIED for row in scores.sample_id[selection.emptied]}
    summary = {
        "reference": task.cleaning.reference,
        "keep_tokens": task.cleaning.keep,
        "ranking": task.cleaning.ranking,
        **summarise(selection, task.opened.tokenizer, task.groups_of(scores.sample_id)),
    }
    cleaned = CleanedDataset(mask_labels(task.opened.prepared.dataset, selection), selection, reasons, summary)
    if task.folder is not None and PartialState().is_main_process:
        save_dataset(cleaned.dataset, {**summary, "rows_left_out": len(reasons)}, task.folder)
    return cleaned


def _folder(output: str | os.PathLike[str] | None) -> Path | None:
    return None if output is None else Path(output)
