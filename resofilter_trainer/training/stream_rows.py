"""Which row of a stream each example is, and the rows that a pass leaves out. Knows torch's data loading, no Trainer.

    stream -> StreamRows: example with its row, dropped rows left out -> StreamCollator: batch with its rows -> MetRows

A row is known by its position in the stream, or by an id. Its mark, a hash of the id or of its tokens, is compared in
every pass: a stream that gives other rows, or the same in another order, is refused.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch.utils.data import IterableDataset

from ..config import InputError
from ..model.losses import IGNORE
from .sampler import ROW, RowCollator

MET = "resofilter_met"  # in a batch: (N, 3) row, position and mark of its rows
IDS = "resofilter_ids"  # in a batch: (N, L) the bytes of the id of each of them, as JSON: accelerate takes no texts
MANY = 10_000  # rows
ORDER = (
    "Give each row an id, in a column that you name with id_column=; or let the stream give its rows in the same order "
    "in every pass."
)


class Met(NamedTuple):
    """What is known of a row when it comes: its number, its position in the stream, its mark and its id, if any."""

    row: int
    position: int
    mark: int
    id: Any


class MetRows:
    """The rows of a stream, as far as they are known.

    Attributes:
        positions: (N,) the position of each row in the stream when it came first.
        marks: (N,) a hash of each row's id, or else of its tokens.
        ids: the id of each row; empty where rows are known by their order.
        total: the number of rows of the stream, those without a token to learn included; None in the first pass.
    """

    def __init__(self) -> None:
        self.positions = np.zeros(0, dtype=np.int64)
        self.marks = np.zeros(0, dtype=np.int64)
        self.ids: list[Any] = []
        self.total: int | None = None
        self._new: dict[int, Met] = {}

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def column_of_ids(self) -> list[Any]:
        """The ids as a column of a table holds them: numbers where all are, otherwise texts."""
        numbers = all(isinstance(each, int) and abs(each) < 1 << 63 for each in self.ids)
        return self.ids if numbers else [str(each) for each in self.ids]

    def add(self, found: Iterable[Met]) -> None:
        """Add rows that came in a batch; those that are known already are left out."""
        self._new.update({each.row: each for each in found if each.row >= len(self)})

    def positions_of(self, rows: np.ndarray) -> np.ndarray:
        """The positions of rows, also of those that this process has added since the last `join`."""
        known = len(self)
        return np.array(
            [self.positions[row] if row < known else self._new[row].position for row in rows.tolist()], dtype=np.int64
        )

    @property
    def digest(self) -> str:
        """A hash of all rows, in the order in which they came."""
        return xxhash.xxh3_128_hexdigest(self.marks.tobytes())

    @property
    def has_many_new(self) -> bool:
        """Whether so many rows were added since the last `join` that they take more memory than the others."""
        return len(self._new) > max(MANY, len(self) // 8)

    def take_new(self) -> list[Met]:
        """The rows that were added since the last `join`, of this process."""
        return list(self._new.values())

    def join(self, found: Iterable[Met]) -> None:
        """Make rows known, of all processes together."""
        new = sorted({each.row: each for each in found if each.row >= len(self)}.values())
        self._new = {}
        self.positions = np.concatenate([self.positions, np.array([each.position for each in new], dtype=np.int64)])
        self.marks = np.concatenate([self.marks, np.array([each.mark for each in new], dtype=np.int64)])
        self.ids += [each.id for each in new if each.id is not None]


class StreamRows(IterableDataset):
    """A stream whose examples contain their row, without the rows that are dropped.

    Args:
        stream: the rows, as the trainer prepares them.
        id_column: the column with an id for each row; None to know rows by their order.

    Attributes:
        seen: (1,) int64, the rows of the stream in the pass that was read to its end last; workers share it.
    """

    def __init__(self, stream: Any, id_column: str | None) -> None:
        self.stream, self.id_column = stream, id_column
        self._source, self._leaves_out = unfiltered(stream)
        self.seen = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._random_state: torch.Tensor | None = None
        self.begin(0, MetRows(), None)

    def __getattr__(self, name: str) -> Any:
        if name in ("stream", "_source"):  # not set yet, while it is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.stream, name)

    def begin(self, number: int, known: MetRows, kept: np.ndarray | None) -> None:
        """Begin a pass.

        Args:
            number: the number of the pass, counted from 0.
            known: the rows that are known.
            kept: (N,) bool, the rows to train on; None for all.
        """
        self._pass, self._marks, self._kept = number, known.marks, kept
        self._complete = known.total is not None
        self._numbers: dict[int, int] = {}
        if self.id_column is not None:
            self._numbers = dict(zip(known.marks.tolist(), range(len(known)), strict=True))
        self.place(0, 0, 1)

    def place(self, skipped: int, done: int, repeat: int) -> None:
        """Set what the next iterator gives: first rows that the Trainer skips, then the rest of the pass.

        Args:
            skipped: the number of rows that the Trainer skips first.
            done: the number of kept rows of this pass that are trained on already.
            repeat: the number of rows, the first of the pass, that are repeated to be skipped.
        """
        self._skipped, self._done, self._repeat = skipped, done, repeat

    def set_epoch(self, epoch: int) -> None:
        """Called by the loader just before it makes an iterator; the number is the Trainer's and is not used."""
        self._random_state = torch.get_rng_state()
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(self._pass)

    def undo_draw(self) -> None:
        """Set torch's random state back to what it was before the loader's last iterator drew a number from it."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._skipped:
            first = list(itertools.islice(self._rows(), self._repeat))
            yield from itertools.islice(itertools.cycle(first), self._skipped)
        yield from itertools.islice(self._rows(), self._done, None)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The kept rows of the pass, each compared with what is known of it."""
        count, position, came = 0, -1, set[int]()
        for position, example in enumerate(self._source):
            if self._leaves_out and all(label == IGNORE for label in example["labels"]):
                continue
            found = self._met(count, position, example)
            if self.id_column is not None and found.row in came:
                raise InputError(
                    f"Row {position} of the stream has the id {found.id!r}, which an earlier row has, too: give each "
                    f"row an id of its own in '{self.id_column}'."
                )
            if self.id_column is not None:
                came.add(found.row)
            count += 1
            if self._kept is None or self._kept[found.row]:
                yield {**example, ROW: found.row, MET: found}
        self.seen[0] = position + 1
        if self._complete and count != len(self._marks):
            raise InputError(
                f"The stream gave {count} rows in pass {self._pass + 1} and {len(self._marks)} in its first: it must "
                "give the same rows in every pass."
            )

    def _met(self, count: int, position: int, example: Mapping[str, Any]) -> Met:
        """Which row an example is. Raises InputError where it is none of the known ones, or another."""
        if self.id_column is None:
            mark = _hash(example)
            if count < len(self._marks) and self._marks[count] != mark:
                raise InputError(
                    f"Row {position} of the stream is another in pass {self._pass + 1} than when it came first, so "
                    f"which row was measured is unknown. {ORDER}"
                )
            if count >= len(self._marks) and self._complete:
                raise self._unknown(position)
            return Met(count, position, mark, None)
        own = self._id_of(self.id_column, position, example)
        mark = _signed(xxhash.xxh3_64_intdigest(repr(own).encode()))
        if mark not in self._numbers and self._complete:
            raise self._unknown(position)
        row = self._numbers.setdefault(mark, len(self._numbers))
        return Met(row, position, mark, own)

    def _id_of(self, column: str, position: int, example: Mapping[str, Any]) -> Any:
        if column not in example:
            raise InputError(
                f"Row {position} of the stream has no column '{column}', which id_column names. It has: "
                f"{', '.join(name for name in example if not name.startswith('resofilter'))}."
            )
        own = example[column]
        own = own.item() if isinstance(own, np.generic | torch.Tensor) else own
        if not isinstance(own, int | str) or isinstance(own, bool):
            raise InputError(
                f"Row {position} of the stream has the id {own!r} in '{column}': give each row a number or a "
                "text of its own."
            )
        return own

    def _unknown(self, position: int) -> InputError:
        return InputError(
            f"Row {position} of the stream in pass {self._pass + 1} was not among the {len(self._marks)} rows of its "
            "first pass: the stream must give the same rows in every pass."
        )


class StreamCollator:
    """A `RowCollator` whose batches also say what is known of their rows.

    Args:
        inner: the collator.
    """

    def __init__(self, inner: RowCollator) -> None:
        self._inner = inner

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        """Collate, in the main process or in a worker."""
        examples = [dict(example) for example in examples]  # several processes repeat the first to fill the last batch
        met = [example.pop(MET) for example in examples]
        batch = self._inner(examples)
        batch[MET] = torch.tensor([each[:3] for each in met])
        if met[0].id is not None:
            texts = np.array([json.dumps(each.id).encode() for each in met])  # padded with zeros
            batch[IDS] = torch.from_numpy(texts.view(np.uint8).reshape(len(met), -1))
        return batch


def met_in(batch: dict[str, Any]) -> list[Met]:
    """Take what is known of its rows out of a batch."""
    found = batch.pop(MET).tolist()
    texts = batch.pop(IDS).cpu().numpy() if IDS in batch else [None] * len(found)
    ids = [None if each is None else json.loads(bytes(each).rstrip(b"\0")) for each in texts]
    return [Met(row, position, mark, own) for (row, position, mark), own in zip(found, ids, strict=True)]


def unfiltered(stream: Any) -> tuple[Any, bool]:
    """A stream without SFTTrainer's last step, which leaves out rows without a learnt token; and whether it had that.

    Without it, rows have the positions that they have in the user's stream.
    """
    iterable: Any = getattr(stream, "_ex_iterable", None)
    name = getattr(getattr(iterable, "mask_function", None), "__qualname__", "")
    if not name.endswith("_prepare_dataset.<locals>.<lambda>"):
        return stream, False
    before = copy.copy(stream)
    before._ex_iterable = iterable.ex_iterable
    return before, True


def is_shuffled(stream: Any) -> bool:
    """Whether a stream of `datasets` has another order in every pass."""
    left = [getattr(stream, "_ex_iterable", None)]
    while left:
        each = left.pop()
        if "Shuffled" in type(each).__name__:
            return True
        if each is not None:
            left += [getattr(each, "ex_iterable", None), *getattr(each, "ex_iterables", ())]
    return False


def _hash(example: Mapping[str, Any]) -> int:
    """A hash of an example's tokens; without any, of its values that are plain."""
    if example.get("input_ids") is not None:
        return _signed(xxhash.xxh3_64_intdigest(np.asarray(example["input_ids"], dtype=np.int64).tobytes()))
    text = json.dumps(example, sort_keys=True, default=lambda value: type(value).__name__)
    return _signed(xxhash.xxh3_64_intdigest(text.encode()))


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
