"""Whether SFTTrainer packs rows, and the rows that it has packed. Knows its internals, as `trainer_access` does."""

from __future__ import annotations

import copy
from typing import Any, cast

from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig

from ..config import InputError
from ..data.files import first_line
from .trainer_access import is_sft


def packs(trainer: Trainer) -> bool:
    """Whether SFTTrainer packs several rows into one."""
    return is_sft(trainer) and bool(cast(SFTConfig, trainer.args).packing)


def unpacked_rows(trainer: Trainer, dataset: Dataset | None) -> Dataset:
    """The rows that a trainer has packed, as tokens and labels, whole and in the user's order.

    SFTTrainer packs before its first event, and keeps nothing else. So it prepares the rows once more, unpacked.

    Args:
        trainer: the trainer, with `packing=True`.
        dataset: the rows as the trainer got them.

    Raises:
        InputError: there is no dataset, or the trainer cannot prepare it.
    """
    if dataset is None:
        raise InputError(
            "With packing=True, SFTTrainer forgets which row is which before training begins. Pass the rows to the "
            "callback, too: callbacks=[ResonanceCallback(dataset=dataset)], with the dataset that is its train_dataset."
        )
    args = copy.copy(cast(SFTConfig, trainer.args))
    args.max_length, args.shuffle_dataset = None, False
    sft = cast(Any, trainer)
    try:
        found = sft._prepare_dataset(dataset, sft.processing_class, args, False, sft._formatting_func, "train")
    except Exception as error:  # TRL, tokenizers and templates each raise their own
        raise InputError(f"SFTTrainer cannot prepare the callback's dataset: {first_line(error)}") from error
    return found.select_columns(["input_ids", "labels"]).with_format(None)
