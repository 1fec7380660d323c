"""What the callback cannot do on a stream, and what to do instead. Knows the Trainer's settings, no rows.

The table of docs/engines.md is this list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from datasets import IterableDataset
from transformers import Trainer
from trl import SFTConfig

from .filtering import FilterConfig
from .refusals import PACKED, Refusal, refuse
from .stream_rows import is_shuffled
from .trainer_access import dispatches, is_packed


@dataclass(frozen=True)
class Reading:
    """How a trainer reads a stream.

    Attributes:
        trainer, loader: the trainer and the loader that it iterates.
        filtering: the settings of the filter.
        id_column: the column with an id for each row; None to know rows by their order.
    """

    trainer: Trainer
    loader: Any
    filtering: FilterConfig
    id_column: str | None

    @property
    def args(self) -> SFTConfig:
        """The trainer's arguments."""
        return cast(SFTConfig, self.trainer.args)

    @property
    def several(self) -> bool:
        """Whether there are several processes."""
        return self.args.world_size > 1

    @property
    def shards(self) -> bool:
        """Whether each process reads other rows, which Accelerate does not divide."""
        base = getattr(self.loader, "base_dataloader", self.loader)
        return self.several and isinstance(base.dataset, IterableDataset) and not dispatches(self.loader)


STREAMS: tuple[Refusal, ...] = (
    Refusal(
        what="a stream of another library than datasets",
        why="whose columns and order are not known",
        remedy="Pass a datasets.IterableDataset",
        refused=lambda stream: not isinstance(stream.trainer.train_dataset, IterableDataset),
    ),
    Refusal(
        what="when='before'",
        why="which needs all rows first",
        remedy="Score it first with score_stream, and train on selection.apply(stream)",
        refused=lambda stream: stream.filtering.when == "before",
    ),
    Refusal(
        what=PACKED.what,
        why=PACKED.why,
        remedy=PACKED.remedy,
        refused=lambda stream: is_packed(stream.args, stream.trainer.train_dataset),
    ),
    Refusal(
        what="shuffle_dataset=True",
        why="after which rows have other positions",
        remedy="Shuffle it yourself (stream.shuffle(seed=0)), and name the column with each row's id: id_column=",
        refused=lambda stream: bool(getattr(stream.args, "shuffle_dataset", False)),
    ),
    Refusal(
        what="rows in another order in every pass",
        why="which are known by their order",
        remedy="Give each row an id, and name its column: id_column=",
        refused=lambda stream: stream.id_column is None and is_shuffled(stream.trainer.train_dataset),
    ),
    Refusal(
        what="dataloader_num_workers above 1",
        why="as each worker reads rows of its own",
        remedy="Set it to 1 or 0",
        refused=lambda stream: stream.args.dataloader_num_workers > 1,
    ),
    Refusal(
        what="dataloader_persistent_workers=True",
        why="which read the dropped rows again",
        remedy="Leave it out",
        refused=lambda stream: stream.args.dataloader_num_workers and stream.args.dataloader_persistent_workers,
    ),
    Refusal(
        what="dispatch_batches in several processes",
        why="of which one reads the rows of all",
        remedy="Set dispatch_batches=False",
        refused=lambda stream: stream.several and dispatches(stream.loader),
    ),
    Refusal(
        what="several processes that each read other shards of it",
        why="whose rows have other positions than in the stream",
        remedy=(
            "Set split_batches=True in accelerator_config, and per_device_train_batch_size to the batch of all of them"
        ),
        refused=lambda stream: stream.shards,
    ),
)


def check_stream(trainer: Trainer, train_dataloader: Any, filtering: FilterConfig, id_column: str | None) -> None:
    """Raise InputError for a setting under which the rows of a stream cannot be known; it says what to change."""
    reading = Reading(trainer, train_dataloader, filtering, id_column)
    refuse("ResonanceCallback cannot work on a stream with", STREAMS, reading)
