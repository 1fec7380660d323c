"""Rows with an empty completion, on which a trainer trains where scoring would refuse them. Knows rows, no scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Value
from tqdm.auto import tqdm
from transformers import Trainer

from ..data.columns import BLOCK
from ..data.rows import empty_rows, listed_rows
from ..data.tables import tables_of
from ..selecting.results import NAME

ANSWERS = ("completion", "messages")  # columns with what a row teaches, of which SFTTrainer keeps its own copy


def tell_of_empty_rows(trainer: Trainer, sample_ids: np.ndarray, dataset: Any) -> None:
    """Say in the console which rows have an empty completion: SFTTrainer adds an end of text, which is then learnt.

    Args:
        trainer: the trainer, about to train.
        sample_ids: (N,) the positions of the trainer's rows in the user's dataset.
        dataset: the trainer's rows.
    """
    if trainer.args.process_index or not isinstance(dataset, Dataset):
        return
    end = getattr(trainer.processing_class, "eos_token", None)
    found = sample_ids[without_answer(dataset, end)].tolist()
    if found:
        row, have = ("rows", "have") if len(found) > 1 else ("row", "has")
        tqdm.write(
            f"{NAME}: warning: {len(found):,} {row} {have} an empty completion ({row} {listed_rows(found)}), and the "
            "model learns to end at once there. score_dataset refuses such rows: remove them, unless they are meant."
        )


def without_answer(dataset: Dataset, end: str | None) -> list[int]:
    """The rows whose completion or last message is blank, but for an end of text after a completion.

    Args:
        dataset: the trainer's rows; without a column of texts, none is found.
        end: the end-of-text token.
    """
    name = next((each for each in ANSWERS if each in dataset.column_names), None)
    if name is None:
        return []
    if not isinstance(dataset.features[name], Value):
        return empty_rows(dataset.select_columns([name]))
    if dataset.features[name].dtype not in ("string", "large_string"):
        return []
    found, start = [], 0
    for table in tables_of(dataset, BLOCK, [name]):
        texts = pc.fill_null(table[name], "")
        texts = pc.replace_substring(texts, end, "") if end else texts
        blank = pc.equal(pc.utf8_trim_whitespace(texts), "").to_numpy()
        found += (start + np.flatnonzero(blank)).tolist()
        start += len(table)
    return found
