"""Which row is each sample of a batch, and the sampler whose epochs shrink. Knows torch's data loading, no Trainer.

sampler: row, or ~row for a filler -> IndexedRows: example with its row -> RowCollator: batch with its rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..config import InputError
from ..model.gradients import segments_of
from ..model.losses import IGNORE
from .plan import Batching

ROW = "resofilter_row"
FILLER = -1
RESEEDED = 1 << 20  # further passes over the rows within an epoch are shuffled as epochs that never come


class IndexedRows(Dataset):
    """A dataset whose examples know their row. A negative index gives a copy of row `~index` that is a filler."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet, while it is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)  # set_epoch, column_names and the like

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several examples at once, as torch's loaders ask for them."""
        rows = [index if index >= 0 else ~index for index in indices]
        whole = getattr(self.dataset, "__getitems__", None)
        examples = whole(rows) if whole is not None else [self.dataset[row] for row in rows]
        pairs = zip(examples, indices, strict=True)
        return [{**_mapping(example), ROW: index if index >= 0 else FILLER} for example, index in pairs]


class RowCollator:
    """A collator whose batches say which rows they hold, `ROW` (N,), and whose fillers have nothing to learn."""

    def __init__(self, inner: Callable[[list[Any]], Any]) -> None:
        self.inner = inner

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """Collate, in the main process or in a worker."""
        rows = [example.pop(ROW) for example in examples]
        batch = self.inner(examples)
        if FILLER in rows:
            for row, where in zip(rows, segments_of(batch)[: len(rows)], strict=True):
                if row == FILLER:
                    batch["labels"][where.row, where.tokens] = IGNORE
        batch[ROW] = torch.tensor(rows)
        return batch


class ShrinkingSampler(Sampler[int]):
    """The Trainer's own sampler, restricted to the rows that are kept.

    An epoch's order is the order in which the inner sampler would take all rows, without those that were dropped: it
    is random, sequential or grouped by length as that one is, and where nothing is dropped it is that order.

    Attributes:
        kept: (N,) bool.
        epoch: the true epoch, whatever the Trainer counts.
        order: the rows of this epoch once they are drawn; set it to go on with an epoch.
        skip: slots of this epoch that are done already.
        prefix: as many slots are given first, for the Trainer to skip.
        ended: whether nothing comes after them.
        random_state: torch's random state as it was before the iterator took a number from it.
    """

    def __init__(self, inner: Any, batching: Batching, whole_epochs: bool) -> None:
        self.inner, self.batching, self.whole_epochs = inner, batching, whole_epochs
        self.kept = np.ones(batching.rows, dtype=bool)
        self.epoch, self.skip, self.prefix, self.ended = 0, 0, 0, False
        self.order: np.ndarray | None = None
        self.random_state: torch.Tensor | None = None

    def begin(self, epoch: int, kept: np.ndarray) -> None:
        """A new epoch on these rows."""
        self.epoch, self.kept, self.order, self.skip, self.prefix = epoch, kept, None, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the loader just before it makes an iterator; the number is the Trainer's and is not used."""
        self.random_state = torch.get_rng_state()

    def __len__(self) -> int:
        return self.batching.rows

    def __iter__(self) -> Iterator[int]:
        yield from np.resize(np.flatnonzero(self.kept), self.prefix).tolist()
        if self.ended:
            return
        if self.order is None:
            self.order = self._draw()
        yield from self.batching.slots(self.order)[self.skip :].tolist()

    def _draw(self) -> np.ndarray:
        order = self._pass(self.epoch)
        for further in range(1, -(-self.batching.rows // len(order)) if self.whole_epochs else 1):
            order = np.concatenate([order, self._pass(self.epoch + further * RESEEDED)])
        return order[: self.batching.rows]

    def _pass(self, epoch: int) -> np.ndarray:
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)
        order = np.fromiter(self.inner, dtype=np.int64)
        order = order[self.kept[order]]
        if len(order) != self.kept.sum() or len(np.unique(order)) != len(order):
            raise InputError(
                f"The trainer's {type(self.inner).__name__} repeats rows or leaves some out: which epoch a row belongs "
                "to is not known. Use train_sampling_strategy='random', 'sequential' or 'group_by_length'."
            )
        return order


def _mapping(example: Any) -> Mapping[str, Any]:
    if not isinstance(example, Mapping):
        raise InputError(f"The dataset gives {type(example).__name__}, not a dict with input_ids and labels.")
    return example
