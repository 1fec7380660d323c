"""A share of a pass's rows as tokens, made by TRL's preparation a block at a time, and kept in two files.

    a block of rows -> TRL, in memory -> tokens-0000.arrow; after the last block, known-0000.parquet

Each file is complete or absent. Knows one share, not the others.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from ..io.files import load_parquet, remove_old, replacing, save_parquet
from .preparation import by_trl, why_idle, without
from .shared_rows import Share, SharedRows
from .surveys import ROW_POSITION, BlockSurvey, Prompts
from .tables import tables_of
from .templates import message_columns
from .together import without_waiting

KNOWN = "known"
NUMBERS = {
    "position": np.int64,
    "length": np.int64,
    "learnt": np.int64,
    "prompt": np.int64,  # its hash
    "prompt_length": np.int64,
}  # what is known of each row


@dataclass(frozen=True)
class TokenShare:
    """The files of a share.

    Attributes:
        folder: the folder of all shares.
        share: which rows it has.
    """

    folder: Path
    share: Share

    @property
    def tokens(self) -> Path:
        """The file of the tokens."""
        return self.folder / f"tokens-{self.share.number:04d}.arrow"

    @property
    def known(self) -> Path:
        """The file of what is known of the rows."""
        return self.folder / f"known-{self.share.number:04d}.parquet"

    @property
    def numbers(self) -> pa.Table:
        """The numbers of each row that has tokens."""
        return load_parquet(self.known, KNOWN, "prepared rows")[0]

    @property
    def about(self) -> dict[str, Any]:
        """What is known of the rows together."""
        found: dict[str, Any] = json.loads(load_parquet(self.known, KNOWN, "prepared rows")[1])
        return found

    def made(
        self, rows: SharedRows, tokenizer: PreTrainedTokenizerBase, args: SFTConfig, silent: Mapping[int, str]
    ) -> tuple[dict[int, str], str]:
        """Write the files unless they are there; why TRL cannot prepare rows, by position, and its first error.

        Args:
            rows, tokenizer, args: as for `SharedTokens.prepare`.
            silent: why rows are skipped that the chat template does not render, by position.
        """
        if self.known.exists() and self.tokens.exists():
            about = self.about
            if self.tokens.stat().st_size == about["size"]:
                return {int(row): why for row, why in about["failed"].items()}, about["why"]
        for path in (self.tokens, self.known):
            remove_old(self.folder, f".{path.name}.*.part")
        made = _Made()
        with replacing(self.tokens) as path, _alone(), _bar(self.share) as bar:
            file = _TokenFile(path)
            for block in rows.usable(self.share):
                made.add(without(block, silent), tokenizer, args, file)
                bar.update(len(block))
            file.close()
        own = {row: why for row, why in silent.items() if self.share.start <= row < self.share.stop}
        about = {"size": self.tokens.stat().st_size, **made.about(own)}
        save_parquet(made.numbers, self.known, {KNOWN: json.dumps(about)}, use_dictionary=False, compression="none")
        return made.failed, made.why


@dataclass
class _Made:
    """What has been made of a share so far."""

    surveys: list[BlockSurvey] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    idle: dict[int, str] = field(default_factory=dict)
    why: str = ""
    template: str = ""
    rendered: bool = False

    def add(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig, file: _TokenFile) -> None:
        """Make the tokens of a block."""
        if not len(rows):
            return
        found = by_trl(rows, tokenizer, args)
        self.failed |= found.failed
        self.why = self.why or found.why
        if len(found.failed) == len(rows):
            return
        sound, used = without(rows, found.failed), np.empty(0, np.int64)
        self.template, self.rendered = found.template, bool(message_columns(sound))
        if len(found.tokens):
            table = file.add(found.tokens)
            self.surveys.append(BlockSurvey.of(table))
            self.positions.append(table[ROW_POSITION].to_numpy())
            used = self.positions[-1][self.surveys[-1].learnt > 0]
        self.idle |= why_idle(sound, used, tokenizer, args)

    @property
    def prompts(self) -> Prompts:
        """The prompts of all rows."""
        return Prompts.joined(each.prompts for each in self.surveys)

    @property
    def numbers(self) -> pa.Table:
        """The numbers of each row that has tokens."""
        none, prompts = np.empty(0, np.int64), self.prompts
        columns = {
            "position": np.concatenate([none, *self.positions]),
            "length": np.concatenate([none, *(each.lengths for each in self.surveys)]),
            "learnt": np.concatenate([none, *(each.learnt for each in self.surveys)]),
            "prompt": prompts.hashes,
            "prompt_length": prompts.lengths,
        }
        return pa.table({name: columns[name].astype(kind) for name, kind in NUMBERS.items()})

    def about(self, silent: Mapping[int, str]) -> dict[str, Any]:
        """What is known of all rows together."""
        return {
            "rows": sum(map(len, self.positions)),
            "failed": self.failed,
            "why": self.why,
            "reasons": {**silent, **self.failed, **self.idle},
            "largest": max((each.largest for each in self.surveys), default=0),
            "blocks": [each.fingerprint.hex() for each in self.surveys],
            "beginning": None if self.prompts.beginning is None else self.prompts.beginning.tolist(),
            "template": self.template,
            "rendered": self.rendered,
        }


class _TokenFile:
    """An Arrow file of tokens to which rows are added."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer: Any = None
        self._schema: pa.Schema | None = None

    def add(self, tokens: Dataset) -> pa.Table:
        """Add rows; they are returned as a table."""
        columns = [ROW_POSITION, "input_ids", "labels"]
        table = next(tables_of(tokens, len(tokens), columns))
        if self._writer is None:
            self._open(*(table.schema.field(name).type for name in ("input_ids", "labels")))
        table = table.cast(self._schema).combine_chunks()  # a start reads the header of every batch
        self._writer.write_table(table)
        return table

    def close(self) -> None:
        """Write the end of the file."""
        if self._writer is None:
            self._open(pa.null(), pa.null())
        self._writer.close()
        self._sink.close()

    def _open(self, ids: pa.DataType, labels: pa.DataType) -> None:
        types = {ROW_POSITION: pa.int64(), "input_ids": _typed(ids, pa.int32()), "labels": _typed(labels, pa.int64())}
        self._schema = pa.schema(types)
        self._writer = pa.ipc.new_stream(self._sink, self._schema)


def _typed(kind: pa.DataType, otherwise: pa.DataType) -> pa.DataType:
    """The type of lists of tokens; lists that are all empty have none."""
    return pa.list_(otherwise) if pa.types.is_null(kind) or pa.types.is_null(kind.value_type) else kind


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """TRL prepares rows without waiting for other processes, and without a progress bar for every step of a block."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with without_waiting():
            yield
    finally:
        if not shown:
            datasets.enable_progress_bars()


def _bar(share: Share) -> Any:
    hidden = datasets.are_progress_bars_disabled() or not PartialState().is_main_process
    return tqdm(total=share.stop - share.start, desc=f"Preparing rows from {share.start:,}", unit="row", disable=hidden)
