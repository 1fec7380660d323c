"""Scores of a stream: rows that come one after another and are never all at hand. Knows the scoring pass, and pieces.

    stream -> a piece of some rows -> score_dataset, into a folder of its own -> the next ... -> one table

A row's `sample_id` is its place in the stream. What is done is found again by the place, and the rows of every piece
are compared with those that were scored, so the stream must give the same rows in the same order each time.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from .config import InputError, ResonanceConfig
from .loading import default_arguments, load_model
from .provenance import hash_weights
from .rows import add_rows
from .scores import SCORES_FILE, ScoreTable
from .scoring import score_dataset, writing_scores

PIECE = 10_000  # rows; a multiple of those that are hashed together
PIECES = "pieces"


def score_stream(
    model: str | PreTrainedModel,
    stream: IterableDataset,
    output: str | os.PathLike[str],
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    config: ResonanceConfig | None = None,
    *,
    rows_per_piece: int = PIECE,
    source: Mapping[str, Any] | None = None,
    **options: Any,
) -> ScoreTable:
    """Score every row of a stream; `score_dataset` for rows that do not fit a disk.

    Args:
        stream: rows as for `score_dataset`; `Selection.apply` filters it by the places of its rows.
        output: a folder for `scores.parquet`, and until then for the pieces; an interrupted pass goes on where it was.
        rows_per_piece: rows that are held at a time, a multiple of 1,000. Repeated prompts are found within a piece.
        model, processing_class, args, config, source, **options: as for `score_dataset`. With `precision="auto"` the
            first piece decides for all.

    Returns:
        A line for every row, in the stream's order.

    Raises:
        InputError: as for `score_dataset`; the stream is empty, or has changed since it was scored.
    """
    if not isinstance(stream, IterableDataset):
        raise InputError(f"A stream is needed, got {type(stream).__name__}: use score_dataset, or streaming=True.")
    if rows_per_piece < 1 or rows_per_piece % 1000:
        raise InputError(f"rows_per_piece must be a multiple of 1000, got {rows_per_piece}.")
    if options.get("sharded"):
        raise InputError("A stream is scored piece by piece, and a model is sharded for good: leave sharded out.")
    args, folder = args or default_arguments(), Path(output)
    model, tokenizer = load_model(model, processing_class, args)
    if (folder / SCORES_FILE).exists():
        return _earlier(folder, stream, rows_per_piece, hash_weights(model))
    digest, tables = xxhash.xxh3_128(), list[ScoreTable]()
    for number, piece in enumerate(_pieces(stream, rows_per_piece)):
        add_rows(digest, piece)
        place = folder / PIECES / f"{number:06d}"
        try:
            scores = score_dataset(model, piece, tokenizer, args, config, place, **options)
        except InputError as error:
            first = number * rows_per_piece
            raise InputError(f"Rows {first} to {first + len(piece) - 1} of the stream: {error}") from error
        if scores.provenance.trust is not None and options.get("precision", "auto") == "auto":
            options["precision"] = scores.provenance.trust.forward
        tables.append(scores)
    if not tables:
        raise InputError("The stream has no rows.")
    whole = together(tables, {**(source or {}), "content": digest.hexdigest()})
    with writing_scores(folder / SCORES_FILE):
        if PartialState().is_main_process:
            whole.save(folder)
            shutil.rmtree(folder / PIECES)
    return whole


def _earlier(folder: Path, stream: IterableDataset, size: int, weights: str) -> ScoreTable:
    """Scores that lie in the folder already, if they are of this stream and these weights."""
    earlier, digest = ScoreTable.load(folder), xxhash.xxh3_128()
    for piece in _pieces(stream, size):
        add_rows(digest, piece)
    theirs = {"rows": earlier.provenance.source.get("content"), "model weights": earlier.provenance.weights}
    mine = {"rows": digest.hexdigest(), "model weights": weights}
    differences = [name for name in mine if mine[name] != theirs[name]]
    if differences:
        raise InputError(
            f"'{folder}' holds scores of other {' and other '.join(differences)}. Choose another output, or remove it."
        )
    return earlier


def together(tables: list[ScoreTable], source: Mapping[str, Any]) -> ScoreTable:
    """The tables of pieces that follow each other, as one of all their rows."""
    starts = np.cumsum([0, *(len(each) for each in tables)])
    moved = [
        each.table.set_column(0, "sample_id", pa.array(np.arange(start, start + len(each))))
        for start, each in zip(starts, tables, strict=False)
    ]
    pieces = [each.provenance for each in tables]
    trusts = [each.trust for each in pieces if each.trust is not None]
    agreements = [each.agreement for each in trusts if each.agreement is not None]
    trust = dataclasses.replace(
        trusts[0],
        agreement=min(agreements) if agreements else None,
        rows=sum(each.rows for each in trusts),
    ) if trusts else None  # fmt: skip
    content = xxhash.xxh3_128("".join(each.dataset for each in pieces).encode()).hexdigest()
    provenance = dataclasses.replace(pieces[0], dataset=content, rows=int(starts[-1]), source=dict(source), trust=trust)
    return ScoreTable(pa.concat_tables(moved), provenance)


def _pieces(stream: IterableDataset, size: int) -> Iterator[Dataset]:
    """The rows of a stream, so many at a time, with the stream's own types where it knows them."""
    rows = iter(stream)
    while piece := list(itertools.islice(rows, size)):
        yield Dataset.from_list(piece, features=stream.features)
