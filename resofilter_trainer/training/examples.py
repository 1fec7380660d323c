"""What the examples of a trainer's loader are: rows, or packs of rows. Knows neither scores nor decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import Trainer

from ..config import InputError
from . import trainer_access as access
from .measurements import Measurements
from .packing import PackCollator, PackedRows, Packing, PackSampler
from .sampler import IndexedRows, RowCollator, ShrinkingSampler
from .trainer_access import TrainerRows
from .trainer_packing import packs, unpacked_rows

DIGEST = "packs"  # in a checkpoint


class Rows:
    """Examples that are rows: each is one sample.

    Args:
        rows: the rows of the user's dataset that the trainer trains on.
        dataset: the trainer's dataset.

    Attributes:
        rows: the rows of the user's dataset that the trainer trains on.
        unit: what an example is, as a word for the plan.
        samples: the number of samples, as which batches name what is measured.
        most: the number of samples of the example that has the most.
        tokens, texts: the datasets of the samples, and of the rows.
        collator, indexed: functions that make a collator and dataset, whose batches name their samples, from the
            loader's own.
    """

    unit, most = "rows", 1
    collator, indexed = RowCollator, IndexedRows

    def __init__(self, rows: TrainerRows, dataset: Any) -> None:
        self.rows = rows
        self.samples = len(rows.sample_ids)
        self.tokens: Any = dataset
        self.texts = self.tokens

    def place(self, kept: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, Sequence[int]]:
        """Make the examples of an epoch.

        Args:
            kept: (R,) bool, the rows to train on.
            sizes: the number of rows of each epoch, as far as it is known.

        Returns:
            (E,) bool, which of the loader's examples the epoch has; and the number of examples of each epoch.
        """
        return kept, sizes

    def sampler(self, numbers: ShrinkingSampler) -> Any:
        """The sampler for the loader, from the one that gives the numbers of examples."""
        return numbers

    def by_row(self, measurements: Measurements) -> Measurements:
        """The measurements of rows, from those of samples."""
        return measurements

    def of_samples(self, values: np.ndarray) -> np.ndarray:
        """(S,) the value of each sample, from (R,) those of rows."""
        return values

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint remembers of the examples of its epoch."""
        return {}

    def check_same(self, saved: Mapping[str, Any]) -> None:
        """Raise InputError unless the examples are those that a checkpoint remembers."""


class Packs:
    """Examples that are packs of rows: their samples are pieces of rows. The members are those of `Rows`.

    Args:
        trainer: the trainer, with packed rows.
        dataset: the rows as the trainer got them.

    Raises:
        InputError: the trainer has packed other rows, or in a way in which rows cannot be told apart.
    """

    unit = "packs"
    collator = PackCollator

    def __init__(self, trainer: Trainer, dataset: Dataset | None) -> None:
        whole = unpacked_rows(trainer, dataset)
        self._packing = packing = Packing(whole, trainer.args)
        packing.check(trainer.train_dataset)
        self.rows = TrainerRows(packing.rows, len(whole), access.no_token(trainer))
        self.samples, self.most = len(packing.pieces), max(map(len, packing.packs))
        self.tokens, self.texts = packing.pieces, whole.select(packing.rows)
        self._digest = packing.digest

    def place(self, kept: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, Sequence[int]]:
        """As `Rows.place`, with the rows packed anew."""
        self._packing.repack(kept)
        self._digest = self._packing.digest
        return self._packing.filled, self._packing.forecast(sizes, int(kept.sum()))

    def indexed(self, packed: Any) -> PackedRows:
        """The pieces of packs, instead of packs."""
        return PackedRows(self._packing.pieces, len(packed))

    def sampler(self, numbers: ShrinkingSampler) -> PackSampler:
        """As `Rows.sampler`: it gives the pieces of each pack."""
        return PackSampler(numbers, self._packing)

    def by_row(self, measurements: Measurements) -> Measurements:
        """As `Rows.by_row`: a row may have several pieces."""
        return self._packing.by_row(measurements)

    def of_samples(self, values: np.ndarray) -> np.ndarray:
        """As `Rows.of_samples`: the value of each piece is its row's."""
        return values[self._packing.row_of]

    def to_json(self) -> dict[str, Any]:
        """As `Rows.to_json`: a hash of the packs."""
        return {DIGEST: self._digest}

    def check_same(self, saved: Mapping[str, Any]) -> None:
        """As `Rows.check_same`."""
        if saved.get(DIGEST) != self._digest:
            raise InputError(
                "The rows are packed in another way than when the checkpoint was made, maybe by another version of "
                "TRL. Resume with the version that made it, or start again."
            )


Examples = Rows | Packs


def examples_of(trainer: Trainer, dataset: Dataset | None) -> Examples:
    """The examples of a trainer's loader.

    Args:
        trainer: the trainer.
        dataset: the rows as the trainer got them, which packed rows need; None where they are not known.

    Raises:
        InputError: the rows are packed in a way in which they cannot be told apart.
    """
    return Packs(trainer, dataset) if packs(trainer) else Rows(access.rows_of(trainer), trainer.train_dataset)
