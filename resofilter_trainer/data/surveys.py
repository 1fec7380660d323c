"""What is known of rows as tokens without a model: lengths, prompts, fingerprints. Knows Arrow, not what made them.

A row has `input_ids` and `labels`; its prompt is everything before its first learnt token. All of it is computed from
Arrow's buffers, some rows at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset

from ..io.digest import BLOCK
from ..model.losses import IGNORE
from .tables import tables_of

ROW_POSITION = "resofilter_row"  # the column with each row's position in the user's dataset, its `sample_id`
AT_ONCE = 1000  # rows; fingerprints of version 0.1.0 depend on it
FEW = 100  # rows whose tokens, widened, fit in a processor's cache
MANY = 200_000  # rows of the user's dataset from which on its fingerprint is made from those of blocks
BLOCKS = "blocks:"  # begins such a fingerprint


@dataclass(frozen=True)
class Prompts:
    """The prompts of rows.

    Attributes:
        hashes: (N,) int64, a hash of each prompt, which does not depend on how tokens are stored.
        lengths: (N,) the tokens of each prompt.
        beginning: the first tokens that all rows have in common; None where there is no row.
    """

    hashes: np.ndarray
    lengths: np.ndarray
    beginning: np.ndarray | None

    @property
    def common(self) -> int:
        """How many first tokens all rows have in common."""
        return 0 if self.beginning is None else len(self.beginning)

    @classmethod
    def of(cls, tokens: Dataset | pa.Table) -> Prompts:
        """The prompts of a dataset's rows."""
        return cls.joined([_prompts(_Flat.of(table)) for table in tables_of(tokens, AT_ONCE) if len(table)])

    @classmethod
    def joined(cls, parts: Iterable[Prompts]) -> Prompts:
        """The prompts of consecutive rows."""
        found, none = list(parts), np.empty(0, np.int64)
        if not found:
            return cls(none, none, None)
        beginning = in_common([each.beginning for each in found if each.beginning is not None])
        hashes, lengths = (np.concatenate([getattr(each, name) for each in found]) for name in ("hashes", "lengths"))
        return cls(hashes, lengths, beginning)

    def column(self, start: int | None) -> pa.Array:
        """The hashes as a column of scores, (N,) int64: independent of other rows, null for a row without a prompt.

        Args:
            start: the beginning-of-sequence token, if there is one; alone it is no prompt.
        """
        missing = self.lengths == 0
        if start is not None:
            alone = xxhash.xxh3_64_intdigest(np.int64(start).tobytes())
            missing |= (self.lengths == 1) & (self.hashes.view(np.uint64) == np.uint64(alone))
        return pa.array(np.where(missing, 0, self.hashes), mask=missing)


def survey(tokens: Dataset) -> tuple[np.ndarray, np.ndarray, int, str]:
    """Read every token of a dataset, which may have `ROW_POSITION`.

    Returns:
        Each row's length and number of learnt tokens, (N,) each; the largest token id; and a hash of everything.
    """
    lengths, learnt, largest, digest = [np.empty(0, int)], [np.empty(0, int)], 0, xxhash.xxh3_128()
    for table in tables_of(tokens, AT_ONCE):
        flat = _Flat.of(table)
        lengths.append(flat.length)
        learnt.append(flat.num_learnt())
        largest = max(largest, int(flat.ids.max(initial=0)))
        for array in flat.hashed(table):
            digest.update(array.data)
    return np.concatenate(lengths), np.concatenate(learnt), largest, digest.hexdigest()


@dataclass(frozen=True)
class BlockSurvey:
    """What is known of the rows of a block of the user's dataset.

    Attributes:
        lengths, learnt: (N,) the tokens and the learnt tokens of each row.
        prompts: the rows' prompts; their beginning is that of the rows with a learnt token.
        largest: the largest token id.
        fingerprint: a hash of the rows' positions, token ids and labels.
    """

    lengths: np.ndarray
    learnt: np.ndarray
    prompts: Prompts
    largest: int
    fingerprint: bytes

    @classmethod
    def of(cls, table: pa.Table) -> BlockSurvey:
        """Read every token once; the rows have `ROW_POSITION`."""
        lengths, learnt, prompts, largest, digest = [], [], [], 0, xxhash.xxh3_128()
        for each in tables_of(table, AT_ONCE):  # few enough for a processor's cache
            flat = _Flat.of(each)
            lengths.append(flat.length)
            learnt.append(flat.num_learnt())
            prompts.append(_prompts(flat, learnt[-1] > 0))
            largest = max(largest, int(flat.ids.max(initial=0)))
            digest.update(each[ROW_POSITION].to_numpy().astype(np.int64).data)
            digest.update(flat.length.astype(np.int64).data)
            for tokens in (flat.ids, flat.labels):
                digest.update(_narrow(tokens).data)
        counts, of_labels = (np.concatenate([np.empty(0, np.int64), *each]) for each in (lengths, learnt))
        return cls(counts, of_labels, Prompts.joined(prompts), largest, digest.digest())


def fingerprint_of(tokens: Dataset, digest: str | None = None, blocks: Iterable[bytes] | None = None) -> str:
    """The fingerprint of rows as tokens, with their positions: of many rows, made from those of blocks.

    Args:
        tokens: rows with `ROW_POSITION`, ascending.
        digest: the hash of all rows in one, as `survey` computes it; by default it is computed if it is needed.
        blocks: the fingerprints of the blocks of `BLOCK` positions, in order and without those that have no row; by
            default they are computed.
    """
    if not len(tokens) or tokens[len(tokens) - 1][ROW_POSITION] < MANY:
        return survey(tokens)[3] if digest is None else digest
    if blocks is None:
        bounds = np.searchsorted(
            positions_of(tokens), np.arange(0, tokens[len(tokens) - 1][ROW_POSITION] + BLOCK, BLOCK)
        )
        pairs = [(int(low), int(high)) for low, high in itertools.pairwise([*bounds, len(tokens)]) if low < high]
        shown = tokens.with_format("arrow")
        blocks = (BlockSurvey.of(shown[low:high]).fingerprint for low, high in pairs)
    return f"{BLOCKS}{xxhash.xxh3_128_hexdigest(b''.join(blocks))}"


def positions_of(tokens: Dataset) -> np.ndarray:
    """(N,) each row's position in the user's dataset."""
    tables = tables_of(tokens, BLOCK, [ROW_POSITION])
    return np.concatenate([np.empty(0, np.int64), *(table[ROW_POSITION].to_numpy() for table in tables)])


def learnt_tokens(tokens: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The position in its row and the id of every learnt token, row after row; (N,) int32 each."""
    positions, ids = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    for table in tables_of(tokens, AT_ONCE):
        flat = _Flat.of(table)
        is_learnt = flat.is_learnt()
        position = np.arange(len(is_learnt)) - np.repeat(flat.starts, flat.length)
        positions.append(position[is_learnt].astype(np.int32))
        ids.append(flat.ids[is_learnt].astype(np.int32))
    return np.concatenate(positions), np.concatenate(ids)


def row_hashes(tokens: Dataset) -> np.ndarray:
    """A hash of each row's `input_ids` and `labels`, (N,) uint64."""
    hashes = list[int]()
    for table in tables_of(tokens, AT_ONCE):
        flat = _Flat.of(table)
        ids, labels = flat.ids.astype(np.int64), flat.labels.astype(np.int64)
        for start, end in zip(flat.starts, flat.ends, strict=True):
            hashes.append(xxhash.xxh3_64_intdigest(np.concatenate([ids[start:end], labels[start:end]]).data))
    return np.array(hashes, dtype=np.uint64)


@dataclass(frozen=True)
class _Flat:
    """The tokens of some rows one after another.

    Attributes:
        ids, labels: (T,) of all tokens.
        length: (N,) the tokens of each row.
    """

    ids: np.ndarray
    labels: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, table: pa.Table) -> _Flat:
        length = pc.list_value_length(table["labels"]).to_numpy()
        return cls(_flat(table["input_ids"]), _flat(table["labels"]), length)

    @cached_property
    def ends(self) -> np.ndarray:
        """(N,) where each row's tokens end."""
        return np.cumsum(self.length)

    @cached_property
    def starts(self) -> np.ndarray:
        """(N,) where each row's tokens start."""
        return self.ends - self.length

    @cached_property
    def stretches(self) -> tuple[np.ndarray, np.ndarray]:
        """(S,) where stretches of tokens with a label begin, and where they end; they may reach into the next row."""
        labelled = self.labels != IGNORE
        turns = np.flatnonzero(np.diff(labelled, prepend=False, append=False))
        return turns[::2], turns[1::2]

    def labelled_before(self, places: np.ndarray) -> np.ndarray:
        """(P,) how many tokens with a label there are before each of these places."""
        begins, ends = self.stretches
        before = np.append(0, np.cumsum(ends - begins))
        begun = np.searchsorted(begins, places)
        rest = np.where(begun > 0, np.append(ends, 0)[begun - 1] - places, 0)
        return before[begun] - np.maximum(rest, 0)

    def first_labelled(self) -> np.ndarray:
        """(N,) the place of each row's first token with a label; where its tokens end if it has none."""
        begins, ends = self.stretches
        if not len(begins):
            return self.ends
        following = np.searchsorted(ends, self.starts, side="right")  # the stretch that ends after the row's start
        begin = np.append(begins, np.iinfo(np.int64).max)[following]
        return np.minimum(np.maximum(begin, self.starts), self.ends)

    def is_learnt(self) -> np.ndarray:
        """(T,) whether each token is learnt; a row's first never is: nothing predicts it."""
        learnt = self.labels != IGNORE
        learnt[self.starts[self.length > 0]] = False
        return learnt

    def num_learnt(self) -> np.ndarray:
        """(N,) the learnt tokens of each row."""
        some = np.flatnonzero(self.length)  # a row's first token is never learnt: nothing predicts it
        counts = self.labelled_before(self.ends) - self.labelled_before(self.starts)
        counts[some] -= self.labels[self.starts[some]] != IGNORE
        return counts

    def hashed(self, table: pa.Table) -> Iterator[np.ndarray]:
        """The arrays of a fingerprint, as int64."""
        positions = [table[ROW_POSITION].to_numpy()] if ROW_POSITION in table.column_names else []
        for array in (*positions, self.length, self.ids, self.labels):
            yield np.ascontiguousarray(array, dtype=np.int64)


def _prompts(flat: _Flat, among: np.ndarray | None = None) -> Prompts:
    """The prompts of some rows, at least one, and what those among them have in common; by default all."""
    starts, first = flat.starts, flat.first_labelled()
    until = np.where(first < flat.ends, first, starts)
    hashes = [np.empty(0, np.int64)]
    for low in range(0, len(starts), FEW):
        hashes.append(_hashes(flat.ids, starts[low : low + FEW], until[low : low + FEW]))
    chosen = slice(None) if among is None else among
    beginning = _beginning(flat.ids, starts[chosen], flat.length[chosen])
    return Prompts(np.concatenate(hashes), until - starts, beginning)


def _narrow(tokens: np.ndarray) -> np.ndarray:
    """Tokens as int32 where they fit, however they are stored, else as int64."""
    fit = tokens.dtype == np.int32 or (tokens.min(initial=0) >= -(2**31) and tokens.max(initial=0) < 2**31)
    return np.ascontiguousarray(tokens, dtype=np.int32 if fit else np.int64)


def _hashes(ids: np.ndarray, starts: np.ndarray, until: np.ndarray) -> np.ndarray:
    """A hash of each stretch of tokens, (N,) int64; stretches are ascending, and there is at least one."""
    tokens = ids[starts[0] : until[-1]].astype(np.int64)
    data, hashed = memoryview(tokens.view(np.uint8).data), xxhash.xxh3_64_intdigest
    bounds = zip(((starts - starts[0]) * 8).tolist(), ((until - starts[0]) * 8).tolist(), strict=True)
    return np.array([hashed(data[start:end]) for start, end in bounds], dtype=np.uint64).view(np.int64)


def in_common(arrays: Iterable[np.ndarray]) -> np.ndarray | None:
    """The first entries that all arrays have in common; None where there is none."""
    found = None
    for each in arrays:
        common = len(each) if found is None else min(len(found), len(each))
        differs = (each if found is None else found)[:common] != each[:common]
        found = each[: int(differs.argmax()) if differs.any() else common]
    return found


def _beginning(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """The first tokens that rows have in common; None without rows."""
    if not len(starts):
        return None
    common = int(lengths.min())
    first = ids[starts[0] : starts[0] + common]
    for place in range(common):  # ends early, as few rows begin alike
        if (ids[starts + place] != first[place]).any():
            return first[:place].astype(np.int64)
    return first.astype(np.int64)


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    """All tokens of a column of lists; of lists that are all empty, too, which have no type."""
    tokens = (column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()).flatten()
    return (tokens.cast(pa.int64()) if pa.types.is_null(tokens.type) else tokens).to_numpy()
