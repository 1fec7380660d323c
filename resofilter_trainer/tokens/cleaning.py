"""Token cleaning: which tokens of a dataset are worth learning, by a base and a reference model.

    base losses, reference losses -> TokenScores  ==saved==>  TokenSelector -> labels with -100

Knows models and rows as tokens; what is measured is `loss_pass`'s, what is kept `token_selection`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import SELF, InputError, TokenCleaning
from ..data.fingerprints import identity
from ..data.loading import check_arguments, check_model, default_arguments, open_pass, placed
from ..data.preparation import PreparedRows, learnt_tokens
from ..io.store import PARTS, remove_parts
from ..scores.provenance import Provenance
from ..scores.token_scores import TOKEN_SCORES_FILE, TokenScores
from ..scoring.passes import Parts, held
from ..scoring.token_losses import measure_token_losses
from ..selecting.token_selection import EMPTIED, TokenSelector
from .cleaned_dataset import CleanedDataset, check_output, groups_of, mask_labels, save_dataset, summarise
from .reference_model import check_vocabulary, is_adapter, load_reference, wearing

REFERENCE = ("reference_weights", "reference_settings")
TOKEN_LOSSES = "token losses"
TOKENS = "tokens"  # the folder, in that of parts, of what they lose


def clean_dataset(
    model: str | PreTrainedModel,
    dataset: Dataset,
    cleaning: TokenCleaning,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    **row_options: Any,
) -> CleanedDataset:
    """Mask the tokens that a reference model has nothing to teach about (Token Cleaning, arXiv 2502.01968, section 3).

    Args:
        model: the base model, or its name or folder, which is then loaded in float32.
        dataset: rows as for `score_dataset`. Labels that are masked already stay masked and are no candidates.
        cleaning: the reference model, how much is kept and how it is ranked. Two models are held at once only where
            `model` is one and the reference no adapter.
        processing_class: the tokenizer of both; the base model's own by default.
        args: SFTTrainer's: lengths, masking, device, and `bf16` for a forward in bfloat16 autocast. By default
            SFTConfig's own, without bf16.
        output: a folder for the cleaned dataset (`datasets.load_from_disk`), the token scores and a summary. Scores of
            the same models and rows that lie there are used again; an interrupted pass goes on.
        **row_options: `drop_duplicates`, `drop_empty`, `source` and the columns, as for `score_dataset`.

    As in SFTTrainer, random numbers start from `args.seed`.

    Raises:
        InputError: nothing can be learnt, the reference is not there or has another vocabulary, a loss is not finite,
            `output` holds something else, or another run writes to it.
    """
    check_output(None if output is None else Path(output), TOKEN_SCORES_FILE)
    with held(output):
        return _clean(model, dataset, cleaning, processing_class, args, output, **row_options)


def _clean(
    model: str | PreTrainedModel,
    dataset: Dataset,
    cleaning: TokenCleaning,
    processing_class: PreTrainedTokenizerBase | None,
    args: SFTConfig | None,
    output: str | os.PathLike[str] | None,
    **row_options: Any,
) -> CleanedDataset:
    task, scores = measure_tokens(model, dataset, cleaning, processing_class, args, output, **row_options)
    selection = TokenSelector(cleaning.keep, cleaning.ranking).select(scores)
    reasons = task.reasons | {int(row): EMPTIED for row in scores.sample_id[selection.emptied]}
    summary = {
        "reference": cleaning.reference,
        "keep_tokens": cleaning.keep,
        "ranking": cleaning.ranking,
        **summarise(selection, task.tokenizer, task.groups_of(scores.sample_id)),
    }
    cleaned = CleanedDataset(mask_labels(task.prepared.dataset, selection), selection, reasons, summary)
    if task.folder is not None and PartialState().is_main_process:
        save_dataset(cleaned.dataset, {**summary, "rows_left_out": len(reasons)}, task.folder)
    return cleaned


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
        The task with its rows as tokens, and their scores, which lie in `output`, too.
    """
    if cleaning.reference == SELF:
        raise InputError("reference='self' cleans while training: use self_evolve, ResonanceCallback, or a reference.")
    args = args or default_arguments()
    adapter = is_adapter(cleaning.reference, args)
    base, task = open_task(model, dataset, cleaning, processing_class, args, output, **row_options)
    check_vocabulary(cleaning.reference, base, task.tokenizer, task.args, adapter)
    TokenSelector(cleaning.keep, cleaning.ranking).check(task.prepared.num_tokens)
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(task.folder))
        earlier = task.earlier()
        base_losses = task.losses(base, "base", task.prepared, task.provenance) if earlier is None else earlier.base
        if adapter:
            reference = stack.enter_context(wearing(base, cleaning.reference))
        else:
            del base  # one that was loaded here is freed before the next comes
            reference = load_reference(cleaning.reference, task.args)
        return task, task.scores(base_losses, reference, earlier)


def score_tokens(
    prepared: PreparedRows, base: np.ndarray, reference: np.ndarray, provenance: Provenance
) -> TokenScores:
    """Two models' losses of all learnt tokens of the rows, (N,) each, as a table."""
    offsets = np.concatenate([[0], np.cumsum(prepared.num_tokens)])
    return TokenScores(prepared.sample_ids, offsets, *learnt_tokens(prepared.dataset), base, reference, provenance)


def against(provenance: Provenance, reference: Mapping[str, Any]) -> Provenance:
    """The provenance of scores against a reference, given its `provenance.identity`."""
    return dataclasses.replace(provenance, config={**provenance.config, **reference})


@dataclass(frozen=True)
class CleaningTask:
    """All of one cleaning but its models.

    Attributes:
        cleaning, args, tokenizer: how.
        prepared: the rows as tokens.
        reasons: why the user's other rows are left out, by place.
        groups: each of the user's rows' group, or None.
        provenance: of the base model's losses.
        folder: where things are written, or None.
    """

    cleaning: TokenCleaning
    args: SFTConfig
    tokenizer: PreTrainedTokenizerBase
    prepared: PreparedRows
    reasons: dict[int, str]
    groups: list[Any] | None
    provenance: Provenance
    folder: Path | None

    def losses(self, model: PreTrainedModel, name: str, prepared: PreparedRows, provenance: Provenance) -> np.ndarray:
        """A model's losses of all learnt tokens of some rows, (N,) float32; by its name an interrupted pass goes on."""
        parts = None
        if self.folder is not None:
            parts = Parts(self.folder / PARTS / TOKENS / name, TOKEN_LOSSES, provenance.compared)
        label = f"Losses of the {name} model"
        return measure_token_losses(model, prepared, self.args, self.cleaning.tokens_per_batch, label, parts)

    def scores(self, base: np.ndarray, reference: PreTrainedModel, earlier: TokenScores | None) -> TokenScores:
        """Those that lie in the folder, or measured, and written there."""
        check_model(reference, self.prepared)
        provenance = against(self.provenance, identity(reference))
        if earlier is not None:
            earlier.provenance.check_same(provenance, "token scores", self.folder)
            return earlier
        losses = self.losses(reference, "reference", self.prepared, provenance)
        scores = score_tokens(self.prepared, base, losses, provenance)
        if self.folder is not None and PartialState().is_main_process:
            scores.save(self.folder)
            remove_parts(self.folder / PARTS / TOKENS)
        return scores

    def earlier(self) -> TokenScores | None:
        """Token scores that lie in the folder already, if they are of the same base model and rows."""
        if self.folder is None or not (self.folder / TOKEN_SCORES_FILE).exists():
            return None
        earlier = TokenScores.load(self.folder)
        known = earlier.provenance.config
        here = against(self.provenance, {name: known.get(name) for name in REFERENCE})
        earlier.provenance.check_same(here, "token scores", self.folder)
        return earlier

    def groups_of(self, sample_id: np.ndarray) -> list[Any] | None:
        """The group of each of some rows, by their places in the user's dataset."""
        return None if self.groups is None else [self.groups[row] for row in sample_id]


def open_task(
    model: str | PreTrainedModel,
    dataset: Dataset,
    cleaning: TokenCleaning,
    processing_class: PreTrainedTokenizerBase | None,
    args: SFTConfig,
    output: str | os.PathLike[str] | None,
    *,
    source: Mapping[str, Any] | None = None,
    **row_options: Any,
) -> tuple[PreTrainedModel, CleaningTask]:
    """The base model, where it will run, and the task. Arguments and errors as of `clean_dataset`."""
    folder = None if output is None else Path(output)
    check_arguments(args, folder)
    groups = groups_of(dataset, cleaning.group_by)
    config = {"tokens_per_batch": cleaning.tokens_per_batch}
    source = {**(source or {}), "reference": cleaning.reference}
    base, opened = open_pass(model, dataset, processing_class, args, config, source=source, **row_options)
    task = CleaningTask(
        cleaning, args, opened.tokenizer, opened.prepared, opened.reasons, groups, opened.provenance, folder
    )
    return placed(base, args), task
