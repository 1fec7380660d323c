"""Which rows of a dataset were scored apart, and how their scores fit together. Knows provenances, no score.

A shard of a dataset that was scored by `--shard 3/64` knows its place: `first` and `of` in its source. Shards that are
datasets of their own, such as files, know none: the order in which they are passed is that of the whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from ..config import InputError
from ..io.digest import ARROW, BLOCKS, first_other_shard, hash_rows, of_shards, shards_in
from ..io.made_from import OF_ALL_ROWS
from .provenance import Provenance

if TYPE_CHECKING:
    from datasets import Dataset

SHARD, SHARDS = "shard", "shards"  # keys of a source: where a shard stands in its dataset, and what a whole is made of
NAMED = ("dataset", "split", "name")  # keys of a source that say where rows come from
LISTED = 5  # spans of missing rows in an error
PLACE = {"index", "count", "first", "of"}


@dataclass(frozen=True)
class Shard:
    """Rows of a dataset that were scored apart.

    Attributes:
        first: the position of its first row in the whole dataset.
        rows: the number of its rows, which follow each other.
        content: the digest of its rows.
        tokens: the digest of their tokens and labels.
        dataset, split, name: where its rows come from, as for `load_rows`; None where that was not said.
    """

    first: int
    rows: int
    content: str
    tokens: str
    dataset: str | None = None
    split: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        whole = all(type(each) is int and each >= 0 for each in (self.first, self.rows))
        named = all(isinstance(each, str | None) for each in (self.dataset, self.split, self.name))
        if not (whole and named and isinstance(self.content, str) and isinstance(self.tokens, str)):
            raise TypeError("a shard has other values")

    @property
    def end(self) -> int:
        """The position after its last row."""
        return self.first + self.rows

    def __str__(self) -> str:
        split = "" if self.split in (None, "train") else f", {self.split}"
        place = "rows" if self.dataset is None else f"'{self.dataset}'{split}, rows"
        return f"{place} {self.first:,} to {self.end - 1:,}"


@dataclass(frozen=True)
class Piece:
    """Rows of one table that follow each other in the whole.

    Attributes:
        table: the index of the table.
        start: the first of its rows.
        offset: what is added to their `sample_id`.
        shard: which rows of the whole they are.
    """

    table: int
    start: int
    offset: int
    shard: Shard


@dataclass(frozen=True)
class Whole:
    """How tables of shards become one.

    Attributes:
        pieces: the rows of the tables, in the order of the whole.
        provenance: the provenance of the whole, without its trust.
    """

    pieces: list[Piece]
    provenance: Provenance


def shards_of(provenance: Provenance) -> list[Shard]:
    """The shards that scores are of, in the order of their rows; one for scores that were made at once.

    Raises:
        InputError: the source does not say it as this version does.
    """
    source = provenance.source
    try:
        if SHARDS in source:
            return listed(source)
        place = source.get(SHARD, {"first": 0})
        named = {key: source.get(key) for key in NAMED}
        return [Shard(place["first"], provenance.rows, source.get("content") or "", provenance.dataset, **named)]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"The scores do not say which rows they are of ({error}): make them again.") from error


def listed(source: Mapping[str, Any]) -> list[Shard]:
    """The shards that a source lists; none for scores that were made at once. Raises TypeError for other values."""
    return [Shard(**each) for each in source.get(SHARDS, [])]


def span_of_shard(rows: int, index: int, count: int) -> range:
    """The rows of a shard, as `datasets.Dataset.shard(count, index, contiguous=True)` has them.

    Args:
        rows: the number of rows of the dataset.
        index: the number of the shard, from 0.
        count: the number of shards.
    """
    size, longer = divmod(rows, count)
    first = index * size + min(index, longer)
    return range(first, first + size + (index < longer))


def shard_place(rows: int, index: int, count: int) -> dict[str, int]:
    """Where a shard stands in its dataset, as a source has it; arguments as for `span_of_shard`."""
    return {"index": index, "count": count, "first": span_of_shard(rows, index, count).start, "of": rows}


def span_in(source: Mapping[str, Any]) -> range | None:
    """The rows of its dataset that a source is of; None for all of them."""
    place = source.get(SHARD)
    return None if place is None else span_of_shard(place["of"], place["index"], place["count"])


def missing_of(provenance: Provenance) -> list[range]:
    """The rows of the whole that no shard has."""
    return _gaps(shards_of(provenance), provenance.rows)


def whole_of(
    provenances: Sequence[Provenance], lengths: Sequence[int], names: Sequence[str], partial: bool = False
) -> Whole:
    """How tables of shards become one, checked.

    Args:
        provenances: those of the tables.
        lengths: the number of rows of each table.
        names: what to call each table in an error.
        partial: whether rows may be missing.

    Raises:
        InputError: the tables were made from different models or settings, rows are missing or in two tables, or a
            table does not say which rows it is of.
    """
    if not provenances:
        raise InputError("There are no scores: pass at least one table.")
    _check_same(provenances, names)
    shards = [shards_of(each) for each in provenances]
    for own, provenance, length, name in zip(shards, provenances, lengths, names, strict=True):
        _check_known(own, provenance, length, name)
    placed = [_has_place(own, each) for own, each in zip(shards, provenances, strict=True)]
    if len(set(placed)) > 1:
        one, other = names[placed.index(True)], names[placed.index(False)]
        raise InputError(
            f"{one} is a shard of a dataset, and {other} a dataset of its own: join the shards of each dataset first."
        )
    if len(provenances) == 1 and not placed[0]:
        return Whole([Piece(0, 0, 0, each) for each in shards[0]], provenances[0])
    if placed[0]:
        pieces, rows = _by_place(provenances, shards, names, partial)
    else:
        pieces, rows = _in_order(shards, names)
    return Whole(pieces, _together(provenances, [each.shard for each in pieces], rows))


def with_digest_of(provenance: Provenance, dataset: Dataset) -> Provenance:
    """The provenance of joined scores with the digest of the whole dataset, as if it had been scored at once.

    Args:
        provenance: that of the joined scores.
        dataset: the whole dataset.

    Raises:
        InputError: rows are missing, or the dataset has other rows than were scored.
    """
    if provenance.source.get("content") is None:
        raise InputError(f"{told(missing_of(provenance), provenance.rows)} are in no shard: join them, too.")
    if len(dataset) != provenance.rows:
        raise InputError(f"The shards have {provenance.rows:,} rows and the dataset has {len(dataset):,}.")
    where = difference(provenance.source, dataset)
    if where is not None:
        raise InputError(f"The dataset is not what was scored.{where}")
    return dataclasses.replace(provenance, source={**provenance.source, "content": hash_rows(dataset)})


def difference(source: Mapping[str, Any], dataset: Dataset) -> str | None:
    """Where a dataset differs from the rows that were scored; None if it does not.

    Args:
        source: the source of the scores; without a digest of the rows, no dataset differs.
        dataset: the dataset.

    Returns:
        A further sentence for an error, see `other_rows`.
    """
    content = source.get("content")
    found = None if content is None else hash_rows(dataset, like=content)
    return None if found == content else other_rows(source, found or "")


def other_rows(source: Mapping[str, Any], found: str) -> str:
    """Which shard's rows differ, as a further sentence; nothing for scores that were made at once.

    Args:
        source: the source of the scores, with the digest of their rows.
        found: the digest of other rows, like that one.
    """
    rows = first_other_shard(source.get("content") or "", found)
    if rows is None:
        return ""
    named = ""
    with contextlib.suppress(TypeError, AttributeError):  # the source does not list them as this version does
        names = [each.dataset for each in listed(source) if each.first == rows.start]
        named = f" ('{names[0]}')" if names and names[0] is not None else ""
    span = f"Rows {rows.start:,} to {rows.stop - 1:,}{named}"
    return f" {span} are the first that differ: were the scores joined in the order of the dataset?"


def _has_place(shards: Sequence[Shard], provenance: Provenance) -> bool:
    """Whether the rows of a table are not a whole of their own."""
    return SHARD in provenance.source or sum(each.rows for each in shards) < provenance.rows


def _by_place(
    provenances: Sequence[Provenance], shards: Sequence[Sequence[Shard]], names: Sequence[str], partial: bool
) -> tuple[list[Piece], int]:
    """The pieces of shards that know their place, and the number of rows of the whole."""
    wholes = [int(each.source[SHARD]["of"]) if SHARD in each.source else each.rows for each in provenances]
    for name, rows in zip(names, wholes, strict=True):
        if rows != wholes[0]:
            raise InputError(f"{names[0]} is of a dataset with {wholes[0]:,} rows, and {name} of one with {rows:,}.")
    pieces = []
    for table, own in enumerate(shards):
        offset, start = own[0].first if SHARD in provenances[table].source else 0, 0
        for each in own:
            pieces.append(Piece(table, start, offset, each))
            start += each.rows
    pieces.sort(key=lambda each: each.shard.first)
    for one, other in itertools.pairwise(pieces):
        if other.shard.first < one.shard.end:
            end = min(one.shard.end, other.shard.end) - 1
            raise InputError(
                f"Rows {other.shard.first:,} to {end:,} are in {names[one.table]} and in {names[other.table]}: leave "
                "one out."
            )
    missing = _gaps([each.shard for each in pieces], wholes[0])
    if missing and not partial:
        raise InputError(
            f"{told(missing, wholes[0])} are in no shard: score and pass them, too, or join what there is with "
            "partial=True."
        )
    return pieces, wholes[0]


def _in_order(shards: Sequence[Sequence[Shard]], names: Sequence[str]) -> tuple[list[Piece], int]:
    """The pieces of datasets that follow each other, and the number of all rows."""
    pieces, rows, seen = list[Piece](), 0, dict[str, int]()
    for table, own in enumerate(shards):
        for each in own:
            earlier = seen.setdefault(each.content, table)
            if earlier != table:
                raise InputError(
                    f"{names[earlier]} and {names[table]} are of the same rows ({each}): leave one out. If the dataset "
                    "has them twice, score it in shards."
                )
            pieces.append(Piece(table, each.first, rows, dataclasses.replace(each, first=rows + each.first)))
        rows += sum(each.rows for each in own)
    return pieces, rows


def _together(provenances: Sequence[Provenance], shards: Sequence[Shard], rows: int) -> Provenance:
    """The provenance of the whole: what all tables say, and which shards there are."""
    first = provenances[0]
    own = {*NAMED, "content", SHARD, SHARDS}
    common = {
        key: value
        for key, value in first.source.items()
        if key not in own and all(each.source.get(key) == value for each in provenances)
    }
    found = [[getattr(each, key) for key in NAMED] for each in shards]
    if all(SHARD in each.source or SHARDS in each.source for each in provenances) and _of_one(provenances):
        common |= {key: value for key, value in zip(NAMED, found[0], strict=True) if value is not None}
    if not _gaps(shards, rows):
        common["content"] = of_shards((each.rows, each.content) for each in shards)
    tokens = xxhash.xxh3_128_hexdigest("".join(each.tokens for each in shards).encode())
    source = {**common, SHARDS: [dataclasses.asdict(each) for each in shards]}
    return dataclasses.replace(first, dataset=tokens, rows=rows, source=source, trust=None)


def _of_one(provenances: Sequence[Provenance]) -> bool:
    """Whether all shards are of a dataset with the same name."""
    names = [tuple(each.source.get(key) for key in NAMED) for each in provenances]
    return len(set(names)) == 1 and names[0][0] is not None


def _check_same(provenances: Sequence[Provenance], names: Sequence[str]) -> None:
    """Raise InputError unless all were made by the same model and settings."""
    first = provenances[0]
    for name, other in zip(names, provenances, strict=True):
        found = first.differences(dataclasses.replace(other, dataset=first.dataset, rows=first.rows))
        tuned = [each.warmup.get("weights", "none") for each in (first, other)]
        if tuned[0] != tuned[1]:
            found.append(f"warmup weights ({tuned[0][:8]} / {tuned[1][:8]})")
        if found:
            once = any(each.startswith("warmup") for each in found)
            remedy = "Tune once, with the same warmup_dataset and warmup_cache." if once else "Score them alike."
            raise InputError(
                f"{names[0]} and {name} do not belong together, they differ in {'; '.join(found)}. {remedy}"
            )
    if len(provenances) > 1 and first.config.get(OF_ALL_ROWS):
        raise InputError(
            f"By {first.config.get('criterion')}, the score of a row depends on all rows of the dataset: scores of its "
            "shards cannot be joined. Score it as a whole."
        )


def _check_known(shards: Sequence[Shard], provenance: Provenance, length: int, name: str) -> None:
    """Raise InputError unless a table has a line for every row of its shards, and the digest of these."""
    rows = sum(each.rows for each in shards)
    if length != rows:
        raise InputError(f"{name} has {length:,} lines for {rows:,} rows: pass scores of every row (ScoreTable.join).")
    for each in shards:
        if not each.content.startswith((BLOCKS, ARROW)) and not shards_in(each.content):
            why = "of version 0.1.0" if each.content else "without the digest of their rows, as those of a training are"
            raise InputError(f"{name} has scores {why}: they cannot be placed. Score the rows again.")
    if SHARD in provenance.source and not {*provenance.source[SHARD]} >= PLACE:
        raise InputError(f"{name} does not say where its shard stands in the dataset: score it again.")


def _gaps(shards: Sequence[Shard], rows: int) -> list[range]:
    """The rows of the whole in no shard; the shards are in order."""
    ends = [0, *(each.end for each in shards)]
    starts = [*(each.first for each in shards), rows]
    return [range(end, start) for end, start in zip(ends, starts, strict=True) if start > end]


def told(missing: Sequence[range], rows: int) -> str:
    """Missing rows in words: `Rows 500 to 999 and 2,000 to 2,499, of 4,000,`."""
    spans = [f"{each.start:,} to {each.stop - 1:,}" for each in missing[:LISTED]]
    left = len(missing) - len(spans)
    more = f" and {left} other spans" if left else ""
    return f"Rows {', '.join(spans)}{more}, of {rows:,},"
