"""What the callback cannot do on a stream, and what to do instead. Knows the Trainer's settings, no rows."""

from __future__ import annotations

from typing import Any, cast

from datasets import IterableDataset
from transformers import Trainer
from trl import SFTConfig

from ..config import InputError
from .filtering import FilterConfig
from .stream_rows import is_shuffled
from .trainer_access import dispatches, is_packed


def check_stream(trainer: Trainer, train_dataloader: Any, filtering: FilterConfig, id_column: str | None) -> None:
    """Raise InputError for a setting under which the rows of a stream cannot be known; it says what to change."""
    args, stream = cast(SFTConfig, trainer.args), trainer.train_dataset
    several, base = args.world_size > 1, getattr(train_dataloader, "base_dataloader", train_dataloader)
    dispatched = dispatches(train_dataloader)
    shards = several and isinstance(base.dataset, IterableDataset) and not dispatched
    refusals = [
        (
            not isinstance(stream, IterableDataset),
            f"the rows of a {type(stream).__name__}",
            "Pass a datasets.IterableDataset",
        ),
        (
            filtering.when == "before",
            "when='before'",
            "Score it first with score_stream, and train on selection.apply(stream)",
        ),
        (
            is_packed(args, stream),
            "packed rows",
            "Set packing=False; padding_free=True wastes no padding either",
        ),
        (
            bool(getattr(args, "shuffle_dataset", False)),
            "shuffle_dataset=True, after which rows have other positions",
            "Shuffle it yourself (stream.shuffle(seed=0)), and name the column with each row's id: id_column=",
        ),
        (
            id_column is None and is_shuffled(stream),
            "rows in another order in every pass, which are known by their order",
            "Give each row an id, and name its column: id_column=",
        ),
        (args.dataloader_num_workers > 1, f"dataloader_num_workers={args.dataloader_num_workers}", "Set it to 1 or 0"),
        (
            bool(args.dataloader_num_workers and args.dataloader_persistent_workers),
            "dataloader_persistent_workers=True, which read the dropped rows again",
            "Leave it out",
        ),
        (several and dispatched, "dispatch_batches in several processes", "Set dispatch_batches=False"),
        (
            shards,
            f"{args.world_size} processes that each read other shards of it",
            "Set split_batches=True in accelerator_config, and per_device_train_batch_size to the batch of all of them",
        ),
    ]
    for refused, what, remedy in refusals:
        if refused:
            raise InputError(f"ResonanceCallback cannot work on a stream with {what}. {remedy}.")
