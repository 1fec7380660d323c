"""The report of a training run, written to the folder of its scores. Knows the trainer's rows and tokenizer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, Trainer

from ..data.row_texts import TOKENS, TokenTexts
from ..report import Report, read_contents, write_report
from ..scores.score_table import SCORES_FILE
from ..selecting.results import NAME


def report_run(trainer: Trainer, folder: Path, sample_ids: np.ndarray, rows: int, dataset: Any) -> Report | None:
    """Write the report, in the process that saves the model.

    Any error becomes a warning, so that the trained model can still be saved.

    Args:
        trainer: the trainer, at the end of its training.
        folder: the folder of the run's scores.
        sample_ids: (N,) the positions of the trainer's rows in the user's dataset.
        rows: the number of rows of the user's dataset.
        dataset: the trainer's rows.

    Returns:
        The report; None where this process does not save, there are no scores, or an error occurred.
    """
    if not trainer.args.should_save or not (folder / SCORES_FILE).is_file():
        return None
    try:
        written = write_report(read_contents(folder), folder, texts_of(trainer, sample_ids, rows, dataset))
        tqdm.write(f"{NAME}: report: {written.path}")
        return written
    except Exception as error:
        warnings.warn(
            f"The report was not written ({error}). To write it later, run: resofilter report {folder}", stacklevel=2
        )
        return None


def texts_of(trainer: Trainer, sample_ids: np.ndarray, rows: int, dataset: Any) -> TokenTexts | None:
    """The text of the trainer's rows; None unless the rows are tokens and the trainer has a tokenizer."""
    tokenizer = trainer.processing_class
    if not isinstance(dataset, Dataset) or TOKENS not in dataset.column_names:
        return None
    return TokenTexts(dataset, sample_ids, rows, tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else None
