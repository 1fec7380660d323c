"""Kept rows that a training must weight: they say so where a loader reads them without. Knows datasets, no Trainer."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from datasets import Dataset

NEEDS_WEIGHTS = (
    "The selection weights the rows that it keeps: a training on them without their weights is biased. Pass "
    "callbacks=[SampleWeights.of(selection)] to the trainer."
)
DERIVING = (  # methods of a Dataset that return rows of it
    *("map", "filter", "select", "shuffle", "sort", "take", "skip", "shard", "with_format", "with_transform"),
    *("select_columns", "remove_columns", "rename_column", "rename_columns", "add_column", "cast", "cast_column"),
)


def weighted(rows: Dataset, taken: list[bool]) -> Dataset:
    """The same rows, which warn when a DataLoader reads a batch of them, or of rows made of them, without weights.

    Args:
        rows: the kept rows.
        taken: not empty once the weights are taken, or the warning is given.
    """
    if not hasattr(rows, "weights_taken"):
        rows.__class__ = _reminding(cast(Any, type(rows)))
    rows.weights_taken = taken
    return rows


@functools.cache
def _reminding(dataset: Any) -> type:
    """A class of datasets that remind of the weights; made here, as `datasets` is imported by its user only."""

    def read(self: Any, keys: list[int]) -> Any:
        if not self.weights_taken:
            self.weights_taken.append(False)
            warnings.warn(NEEDS_WEIGHTS, stacklevel=2)
        return dataset.__getitems__(self, keys)

    def pickled(self: Any, protocol: Any) -> Any:
        plain = dataset.__new__(dataset)
        plain.__dict__ = {name: value for name, value in self.__dict__.items() if name != "weights_taken"}
        return weighted, (plain, self.weights_taken)

    methods = {name: _deriving(getattr(dataset, name)) for name in DERIVING}
    return type("WeightedRows", (dataset,), {**methods, "__getitems__": read, "__reduce_ex__": pickled})


def _deriving(method: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """A method whose result reminds, too."""

    @functools.wraps(method)
    def derived(self: Any, *args: Any, **kwargs: Any) -> Dataset:
        return weighted(method(self, *args, **kwargs), self.weights_taken)

    return derived
