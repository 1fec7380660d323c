"""Which samples packed rows have, and how the rows to keep are packed anew. Knows TRL's packing, no Trainer.

    row of the user's -> its pieces -> packs of pieces -> micro-batches of packs

With "bfd", a row is one piece, cut at `max_length`; with "bfd_split", a longer row has several. A row's pieces stay the
same whatever it is packed with, so they are what is measured.

PackSampler: a pack as its pieces -> PackedRows: their examples -> PackCollator: TRL's own batch, with its pieces
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from trl import SFTConfig, pack_dataset

from ..config import InputError
from .measurements import Measurements
from .sampler import IndexedRows, RowCollator, ShrinkingSampler

AT_ONCE = 1000  # packs or rows
LENGTHS = "seq_lengths"  # TRL's column with the lengths of the samples of a pack
PLACE, PACK = "place", "resofilter_pack"  # of a token among those of all rows; of a piece in its batch

Pack = tuple[int, ...]


class Packing:
    """How a trainer's rows are packed.

    Args:
        samples: the user's rows as `input_ids` and `labels`, whole, in the user's order.
        args: SFTTrainer's arguments.

    Attributes:
        rows: (R,) the positions in `samples` of the rows that have a token, ascending.
        row_of: (P,) for each piece, the index in `rows` of the row that it belongs to.
        pieces: P pieces as `input_ids` and `labels`, in the order of the rows.
        packs: the packs of the present epoch, each with its pieces; at first those of all rows.
        total: the number of packs of all rows.

    Raises:
        InputError: this version of TRL packs in a way that is not known.
    """

    def __init__(self, samples: Dataset, args: SFTConfig) -> None:
        self._args, self._size = args, cast(int, args.max_length)
        self._splits = args.packing_strategy == "bfd_split"
        lengths = np.concatenate([np.empty(0, int), *map(_lengths, samples.with_format("arrow").iter(AT_ONCE))])
        self._lengths = lengths
        self._starts = np.cumsum(lengths) - lengths  # of each row among the tokens of all
        self.rows = np.flatnonzero(lengths)
        count = -(-lengths[self.rows] // self._size) if self._splits else np.ones_like(self.rows)
        self.row_of = np.repeat(np.arange(len(self.rows)), count)
        number = np.arange(len(self.row_of)) - np.repeat(np.cumsum(count) - count, count)  # of a piece in its row
        self._places = self._starts[self.rows][self.row_of] + number * self._size
        self.pieces = self._cut(samples.select(self.rows) if len(self.rows) < len(samples) else samples)
        self._all = self._packed(np.arange(len(samples)))
        self.packs, self.total = self._all, len(self._all)

    def _cut(self, samples: Dataset) -> Dataset:
        """The rows as their pieces."""
        if not (self._lengths > self._size).any():
            return samples
        size, splits = self._size, self._splits

        def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
            return {
                name: [own[at : at + size] for own in batch[name] for at in range(0, len(own) if splits else 1, size)]
                for name in ("input_ids", "labels")
            }

        return samples.map(cut, batched=True, desc="Cutting rows at max_length")

    def check(self, packed: Any) -> None:
        """Raise InputError unless the packs of all rows are those of a trainer: the same tokens in the same order."""
        mine, examples = PackedRows(self.pieces, self.total), 0
        same = isinstance(packed, Dataset) and len(packed) == self.total
        while same and examples < self.total:
            theirs = packed.with_format(None)[examples : examples + AT_ONCE]
            own = [joined(pack) for pack in mine.__getitems__(self._all[examples : examples + AT_ONCE])]
            same = all([pack[name] for pack in own] == theirs.get(name) for name in ("input_ids", "labels", LENGTHS))
            examples += AT_ONCE
        if not same:
            raise InputError(
                "The trainer's packed rows are not those of ResonanceCallback(dataset=dataset). Pass the dataset that "
                "SFTTrainer gets as its train_dataset, and leave trainer.train_dataset as it is."
            )

    def repack(self, kept: np.ndarray) -> None:
        """Pack the rows of an epoch as SFTTrainer packs a dataset of these rows alone.

        The Trainer cannot train on more packs than there are of all rows. Best-fit packing of fewer rows may make
        more, though hardly ever: then the packs are those of all rows, without the pieces of other rows.

        Args:
            kept: (R,) bool, the rows to train on.
        """
        self.packs = self._all if kept.all() else self._packed(self.rows[kept])
        if len(self.packs) > self.total:
            there = kept[self.row_of]
            fewer = (tuple(piece for piece in pack if there[piece]) for pack in self._all)
            self.packs = [pack for pack in fewer if pack]

    def _packed(self, rows: np.ndarray) -> list[Pack]:
        """The pieces of each pack of some samples, by TRL's own function, which packs the places of their tokens."""
        lengths = self._lengths[rows]
        ends = np.cumsum(lengths)
        if not lengths.any():
            return []
        tokens = np.arange(ends[-1]) + np.repeat(self._starts[rows] - (ends - lengths), lengths)
        lists = pa.LargeListArray.from_arrays(np.concatenate([[0], ends]), tokens)
        packed = self._shuffled(Dataset(pa.table({PLACE: lists})))
        settings = {"num_proc": self._args.dataset_num_proc, "desc": "Packing rows"}
        packed = pack_dataset(packed, self._size, self._args.packing_strategy, settings)
        return [
            pack for batch in self._shuffled(packed).with_format("arrow").iter(AT_ONCE) for pack in self._read(batch)
        ]

    def _shuffled(self, dataset: Dataset) -> Dataset:
        return dataset.shuffle(seed=self._args.seed) if self._args.shuffle_dataset else dataset

    def _read(self, batch: pa.Table) -> Iterator[Pack]:
        """The pieces of some packs, by the places of their first tokens."""
        lengths = batch[LENGTHS].combine_chunks()
        flat = lengths.flatten().to_numpy()
        first = batch[PLACE].combine_chunks().flatten().to_numpy()[np.cumsum(flat) - flat]
        pieces = np.searchsorted(self._places, first).clip(max=len(self._places) - 1)
        if not np.array_equal(self._places[pieces], first):
            raise InputError("This version of TRL cuts rows in a way that is not known. Set packing=False.")
        ends = np.cumsum(pc.list_value_length(lengths).to_numpy())
        return (tuple(each.tolist()) for each in np.split(pieces, ends[:-1]))

    def forecast(self, sizes: Sequence[int], kept: int) -> list[int]:
        """The number of packs of each epoch, as its number of rows suggests.

        Args:
            sizes: the number of rows of each epoch.
            kept: the number of rows of the present epoch, whose packs are known.
        """
        packs = [self.total if rows == len(self.rows) else -(-len(self.packs) * rows // max(kept, 1)) for rows in sizes]
        return [min(number, self.total) for number in packs]

    @property
    def filled(self) -> np.ndarray:
        """(total,) bool, which of the trainer's packs the present epoch has: the first ones."""
        return np.arange(self.total) < len(self.packs)

    @property
    def digest(self) -> str:
        """A hash of the packs of the present epoch."""
        return xxhash.xxh3_64_hexdigest(repr(self.packs).encode())

    def by_row(self, pieces: Measurements) -> Measurements:
        """The measurements of rows from those of their pieces.

        A row's loss is the mean over its learnt tokens, as it was trained. Its score is the mean of its pieces' scores
        over the same tokens: pieces are trained in different steps, so no gradient of the whole row ever exists.
        """
        if len(self.row_of) == len(self.rows):
            return pieces
        found = pieces.joined(self.row_of, len(self.rows))
        found.length = np.where(found.ever, self._lengths[self.rows], 0)  # with pieces that have no learnt token
        return found


class PackSampler(Sampler[Pack]):
    """Gives the pieces of each pack instead of its number; `~piece` for those of a filler.

    Args:
        numbers: the sampler of the numbers of packs, or `~number` for a filler.
        packing: the packs.
    """

    def __init__(self, numbers: ShrinkingSampler, packing: Packing) -> None:
        self._numbers, self._packing = numbers, packing

    def set_epoch(self, epoch: int) -> None:
        """Called by the loader just before it makes an iterator."""
        self._numbers.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Pack]:
        packs = self._packing.packs
        for number in self._numbers:
            yield packs[number] if number >= 0 else tuple(~piece for piece in packs[~number])


class PackedRows(TorchDataset):
    """A dataset whose examples are the pieces of a pack, each with its number.

    Args:
        pieces: the pieces.
        total: the number of packs.
    """

    def __init__(self, pieces: Dataset, total: int) -> None:
        self._pieces, self._total = IndexedRows(pieces), total

    def __len__(self) -> int:
        return self._total

    def __getitems__(self, packs: Sequence[Pack]) -> list[list[dict[str, Any]]]:
        """Several packs at once, as torch's loaders ask for them."""
        examples = iter(self._pieces.__getitems__([piece for pack in packs for piece in pack]))
        return [[next(examples) for _ in pack] for pack in packs]


class PackCollator:
    """Collates packs as the trainer's collator does; its batches say which piece each sample is.

    Args:
        inner: the trainer's own collator.

    Raises:
        InputError: the samples of a batch are not the pieces of its packs.
    """

    def __init__(self, inner: Callable[[list[Any]], Any]) -> None:
        self._rows = RowCollator(_Joining(inner))

    def __call__(self, packs: list[list[dict[str, Any]]]) -> Any:
        """Collate, in the main process or in a worker."""
        return self._rows([{**piece, PACK: number} for number, pack in enumerate(packs) for piece in pack])


class _Joining:
    """A collator of pieces that makes their packs before it collates them."""

    def __init__(self, inner: Callable[[list[Any]], Any]) -> None:
        self._inner = inner
        self.__qualname__ = getattr(inner, "__qualname__", type(inner).__qualname__)  # for messages

    def __call__(self, pieces: list[dict[str, Any]]) -> Any:
        packs: dict[int, list[dict[str, Any]]] = {}
        for piece in pieces:
            packs.setdefault(piece[PACK], []).append(piece)
        return self._inner([joined(pack) for pack in packs.values()])


def joined(pieces: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """A pack as TRL makes it."""
    pack = {name: [token for piece in pieces for token in piece[name]] for name in ("input_ids", "labels")}
    return {**pack, LENGTHS: [len(piece["input_ids"]) for piece in pieces]}


def _lengths(batch: pa.Table) -> np.ndarray:
    return np.asarray(pc.list_value_length(batch["input_ids"].combine_chunks()))
