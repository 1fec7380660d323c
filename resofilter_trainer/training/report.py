"""The report of a training run, written where the run has left its scores. Knows the rows that a trainer holds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer

from ..data.row_texts import TOKENS, TokenTexts
from ..report import Report, read_contents, write_report
from ..scores.score_table import SCORES_FILE


def report_run(trainer: Trainer, folder: Path, sample_ids: np.ndarray, rows: int) -> Report | None:
    """Write the page, in the process that writes.

    Whatever goes wrong with it is a warning: the training is over, and what it learnt is still to be saved.

    Args:
        trainer: after its training.
        folder: in which its scores lie.
        sample_ids: (N,) the places, in the user's dataset, of the rows that it holds.
        rows: of the user's dataset.
    """
    if not trainer.args.should_save or not (folder / SCORES_FILE).is_file():
        return None
    try:
        return write_report(read_contents(folder), folder, texts_of(trainer, sample_ids, rows))
    except Exception as error:
        warnings.warn(f"The report was not written ({error}). Later: resofilter report {folder}", stacklevel=2)
        return None


def texts_of(trainer: Trainer, sample_ids: np.ndarray, rows: int) -> TokenTexts | None:
    """The rows that a trainer holds as text again; None where they are no tokens, or the tokenizer is not known."""
    dataset, tokenizer = cast(Any, trainer.train_dataset), trainer.processing_class
    if not isinstance(dataset, Dataset) or TOKENS not in dataset.column_names:
        return None
    return TokenTexts(dataset, sample_ids, rows, tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else None
