"""Which row each sample of a batch is, and the sampler whose epochs shrink. Knows torch's data loading, no Trainer.

sampler: row, or ~row for a filler -> IndexedRows: example with its row -> RowCollator: batch with its rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..config import InputError
from ..model.losses import IGNORE
from .matching import Matcher
from .plan import Batching
from .position import Position

ROW = "resofilter_row"
FILLER = -1
RESEEDED = 1 << 20  # further passes over the rows within an epoch are shuffled as epochs that never come


class IndexedRows(Dataset):
    """A dataset whose examples contain their row. A negative index gives a copy of row `~index` that is a filler."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not set yet, while it is unpickled in a worker
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
    """A collator whose batches say which row each sample is, `ROW` (N,), and whose fillers have nothing to learn.

    Raises:
        InputError: the samples of a batch cannot be found among its rows.
    """

    def __init__(self, inner: Callable[[list[Any]], Any]) -> None:
        self._matcher = Matcher(inner)

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """Collate, in the main process or in a worker."""
        rows = [example.pop(ROW) for example in examples]
        batch, segments, order = self._matcher.collate(examples)
        rows = [rows[example] for example in order]
        for row, where in zip(rows, segments, strict=True):
            if row == FILLER:
                batch["labels"][where.row, where.tokens] = IGNORE
        batch[ROW] = torch.tensor(rows)
        return batch


class ShrinkingSampler(Sampler[int]):
    """The Trainer's own sampler, restricted to the rows that are kept.

    An epoch's order is the order in which the inner sampler takes all rows, without the dropped ones: random,
    sequential or grouped by length as that one is. Where nothing is dropped, it is exactly that order.

    Args:
        inner: the Trainer's own sampler.
        batching: how rows become steps.
        whole_epochs: whether an epoch on fewer rows is as long as one on all, and takes its rows several times.

    Attributes:
        kept: (N,) bool, the rows of this epoch.
        order: (K,) the rows of this epoch in their order, once it is drawn; None before.
    """

    def __init__(self, inner: Any, batching: Batching, whole_epochs: bool) -> None:
        self.inner = inner
        self._batching, self._whole_epochs = batching, whole_epochs
        self._random_state: torch.Tensor | None = None
        self.begin(0, np.ones(batching.rows, dtype=bool))

    def begin(self, epoch: int, kept: np.ndarray, order: np.ndarray | None = None) -> None:
        """Begin a true epoch.

        Args:
            epoch: the number of the true epoch, counted from 0.
            kept: (N,) bool, the rows to train on.
            order: (K,) the order of these rows, if it is drawn already; None to draw it.
        """
        self._epoch, self.kept, self.order = epoch, kept, order
        self.place(Position(epoch, 0, 0, 0))

    def place(self, position: Position) -> None:
        """Set what the next iterator gives."""
        self._position = position

    def set_epoch(self, epoch: int) -> None:
        """Called by the loader just before it makes an iterator; the number is the Trainer's and is not used."""
        self._random_state = torch.get_rng_state()

    def undo_draw(self) -> None:
        """Set torch's random state back to what it was before the loader's last iterator drew a number from it."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)

    def __len__(self) -> int:
        return self._batching.rows

    def __iter__(self) -> Iterator[int]:
        position = self._position
        yield from np.resize(np.flatnonzero(self.kept), position.skipped_slots).tolist()
        if position.first_slot is None:
            return
        if self.order is None:
            self.order = self._draw()
        yield from self._batching.slots(self.order)[position.first_slot :].tolist()

    def _draw(self) -> np.ndarray:
        order = self._pass(self._epoch)
        for further in range(1, -(-self._batching.rows // len(order)) if self._whole_epochs else 1):
            order = np.concatenate([order, self._pass(self._epoch + further * RESEEDED)])
        return order[: self._batching.rows]

    def _pass(self, epoch: int) -> np.ndarray:
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)
        order = np.fromiter(self.inner, dtype=np.int64)
        order = order[self.kept[order]]
        if len(order) != self.kept.sum() or len(np.unique(order)) != len(order):
            raise InputError(
                f"The trainer's {type(self.inner).__name__} repeats rows or leaves some out, so the epoch a row "
                "belongs to is unknown. Use train_sampling_strategy='random', 'sequential' or 'group_by_length'."
            )
        return order


def _mapping(example: Any) -> Mapping[str, Any]:
    if not isinstance(example, Mapping):
        raise InputError(f"The dataset gives {type(example).__name__}, not a dict with input_ids and labels.")
    return example
