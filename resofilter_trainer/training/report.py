"""The report of a training run, written to the folder of its scores. Knows the trainer's rows and tokenizer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, Trainer

from ..data.row_report import ID
from ..data.row_texts import TOKENS, TokenTexts
from ..report import Report, read_contents, write_report
from ..scores.score_table import SCORES_FILE
from ..selecting.results import IDS_FILE, NAME


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
        texts, ids = texts_of(trainer, sample_ids, rows, dataset), ids_of(folder, sample_ids, rows, dataset)
        written = write_report(read_contents(folder), folder, texts, ids=ids)
        tqdm.write(f"{NAME}: report: {written.path}")
        return written
    except Exception as error:
        warnings.warn(
            f"The report was not written ({error}). To write it later, run: resofilter report {folder}", stacklevel=2
        )
        return None


def ids_of(folder: Path, sample_ids: np.ndarray, rows: int, dataset: Any) -> list[Any] | None:
    """The user's own id of each row, from the column `id`; of a stream, from the column that the run was given.

    Args:
        folder, sample_ids, rows, dataset: as for `report_run`. A row that is not among the trainer's has no id, unless
            the trainer has only listed the rows of the user's dataset.
    """
    if (folder / IDS_FILE).is_file():  # of a stream
        table = pq.read_table(folder / IDS_FILE)
        places, values = table["sample_id"].to_pylist(), table["id"].to_pylist()
    elif not isinstance(dataset, Dataset) or ID not in dataset.column_names:
        return None
    elif _lists(dataset, sample_ids, rows):
        places, values = range(rows), dataset.data.column(ID).to_pylist()
    else:
        places, values = sample_ids.tolist(), dataset[ID][:]
    found: list[Any] = [None] * rows
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found


def _lists(dataset: Dataset, sample_ids: np.ndarray, rows: int) -> bool:
    """Whether the trainer's dataset is the user's with a list of rows: its table then has all of the user's."""
    listed = dataset._indices
    return (
        listed is not None and dataset.data.num_rows == rows and np.array_equal(listed.column(0).to_numpy(), sample_ids)
    )


def texts_of(trainer: Trainer, sample_ids: np.ndarray, rows: int, dataset: Any) -> TokenTexts | None:
    """The text of the trainer's rows; None unless the rows are tokens and the trainer has a tokenizer."""
    tokenizer = trainer.processing_class
    if not isinstance(dataset, Dataset) or TOKENS not in dataset.column_names:
        return None
    return TokenTexts(dataset, sample_ids, rows, tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else None
