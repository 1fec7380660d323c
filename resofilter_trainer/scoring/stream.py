"""Scores of a stream: rows that come one after another and are never all in memory. Knows the scoring pass and pieces.

    stream -> shards -> a piece of some rows -> score_dataset, into a folder of its own -> the next ... -> one table

A row's `sample_id` is its position in the stream, of which shards that follow each other are read apart: by one process
one after another, by several at the same time. A piece ends where its shard ends, so processes change no score. A
resumed pass finds finished pieces by their number and compares their rows with the stream's, so the stream must give
the same rows in the same order each time; shards that are finished, with the same files, are not read again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
import pyarrow as pa
import xxhash
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, DatasetInfo, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import InputError, NothingError, Precision, ResonanceConfig, ScoreWarning, whole_number
from ..config.keywords import StreamOptions
from ..data.arguments import check_call
from ..data.fingerprints import hash_weights
from ..data.loading import default_arguments, load_model, open_pass, tell
from ..data.stream_shards import files_of, shards_of
from ..data.together import from_main
from ..io.digest import PIECE, RowsDigest, columns_of, hash_rows, of_shards, tables_of
from ..io.files import remove_folder
from ..io.made_from import refuse_differences
from ..scores.full_step import is_saturated
from ..scores.provenance import OF_SOURCE, Provenance, Trust
from ..scores.score_table import SAME_PROMPT, SCORES_FILE, ScoreTable, with_votes_of_all
from .dataset import measured_settings, score_dataset
from .finished_shards import FinishedShard, piece_in
from .further_signals import of_one_pass
from .output import warn_of_doubts
from .passes import locked
from .team import LostError, Team
from .warmup import kept_at, plan_warmup

PIECES = "pieces"
UNKNOWN = "nothing in its piece can be scored"


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
    **options: Unpack[StreamOptions],
) -> ScoreTable:
    """Score every row of a stream: `score_dataset` for rows that do not fit on a disk.

    Args:
        stream: rows as for `score_dataset`. `Selection.apply` filters it by the positions of its rows. With at least
            as many shards as there are processes (at most 1,024 are told apart), each process reads, prepares and
            scores the shards that it takes. All read the whole stream with a warm-up, or where its shards one after
            another are not its rows in order: shuffled, interleaved, repeated, cut, mapped in batches or with indices.
        output: a folder for `scores.parquet`, and until then for the pieces. An interrupted pass resumes. Finished
            shards whose files are unchanged (by size and times, or at a commit of the hub) are not read again; of
            other streams, or mapped and filtered ones, the rows are read and compared, but not prepared again.
        rows_per_piece: the number of rows in memory at a time, a multiple of 1,000. A piece ends with its shard, so
            shards should not be much smaller. Repeated prompts are found within a piece only.
        model, processing_class, args, config, source, **options: as for `score_dataset`; `signals` of the one pass
            only. With `precision="auto"`, the first piece decides for all. A warm-up needs `warmup_dataset`.

    Returns:
        A table with every row, in the stream's order.

    Raises:
        InputError: as for `score_dataset`; or the stream is empty, or has changed since it was scored.
    """
    if not isinstance(stream, IterableDataset):
        raise InputError(f"A stream is needed, got {type(stream).__name__}: use score_dataset, or streaming=True.")
    more = ("precision", "tokens_per_batch", "sharded", "signals", "warmup", "warmup_dataset")
    check_call(score_stream, options, model, processing_class, args, config, more)
    if whole_number("rows_per_piece", rows_per_piece, least=1) % 1000:
        raise InputError(f"rows_per_piece must be a multiple of 1000, got {rows_per_piece}.")
    if options.get("sharded"):
        raise InputError("A stream is scored in pieces, and a model that is sharded stays so: leave sharded out.")
    if options.get("warmup") is not None and options.get("warmup_dataset") is None:
        raise InputError("A stream has no rows to draw for a warm-up before it is read: pass a warmup_dataset.")
    options["warmup"] = kept_at(options.get("warmup"), options.get("warmup_dataset"), output)
    options["signals"] = of_one_pass(options.get("signals"))
    if args is None:
        options.setdefault("precision", "auto")
    args, config = args or default_arguments(), config or ResonanceConfig()
    model, tokenizer = load_model(model, processing_class, args)
    passes = _Pieces(model, tokenizer, args, config, Path(output), rows_per_piece, dict(options))
    with locked(output):
        if (passes.folder / SCORES_FILE).exists():
            whole = passes.earlier(stream)
        else:
            whole = passes.score(stream, dict(source or {}))
    warn_of_doubts(whole, stacklevel=3)
    return whole


@dataclass
class _Pieces:
    """Everything about a pass over a stream except the stream; most attributes are `score_stream`'s arguments.

    Attributes:
        first: the provenance of the first piece with scores, once there is one: those of the others are like it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    args: SFTConfig
    config: ResonanceConfig
    folder: Path
    size: int
    options: dict[str, Any]
    first: Provenance | None = None

    def score(self, stream: IterableDataset, source: Mapping[str, Any]) -> ScoreTable:
        """Score piece after piece of each shard; those that are finished are read."""
        self.options["told"] = set()  # what was read as something else is said once
        self.options["weights"] = hash_weights(self.model)
        shards, processes = shards_of(stream), PartialState().num_processes
        todo = self._unfinished(shards)
        apart = 1 < processes <= len(shards) and self.options["warmup"] is None  # which is made by all processes
        if apart or len(todo) < len(shards):
            self._score_first(shards)
        if apart:
            self._apart(shards, todo)
        else:
            for number in todo:
                self._shard(number, shards)
        made: list[ScoreTable] = []
        from_main(lambda: made.append(self._whole(len(shards), source)))
        return made[0] if made else ScoreTable.load(self.folder)

    def _unfinished(self, shards: Sequence[IterableDataset]) -> list[int]:
        """The shards that are to be read, in every process: all but those that are finished and have the same files."""

        def found() -> list[int]:
            ended = {number: FinishedShard.read(self._place(number)) for number in range(len(shards))}
            files = {number: each.files for number, each in ended.items() if each is not None}
            same = {number for number in files if files[number] in {self._files(shards[number])} - {None}}
            if files:
                print(
                    f"Of {len(shards)} shards of the stream, {len(files)} are finished. {len(same)} of these are not "
                    f"read again, as their files are unchanged; {len(files) - len(same)} are, to compare their rows."
                )
            return [number for number in range(len(shards)) if number not in same]

        todo: list[int] = from_main(found)
        return todo

    def _score_first(self, shards: Sequence[IterableDataset]) -> None:
        """Score the first piece that can be, all processes together: model and settings are compared, and the precision
        is chosen for all."""
        for number, shard in enumerate(shards):
            start = 0
            for at, piece in enumerate(_pieces(shard, self.size)):
                self._piece(piece, piece_in(self._place(number), at), self._rows(number, shards, start, piece))
                if self.first is not None:
                    return
                start += len(piece)

    def _apart(self, shards: Sequence[IterableDataset], todo: Sequence[int]) -> None:
        """Each process reads and scores the shards that it takes, by itself; the main one shows what it does."""
        own, is_main = self, PartialState().is_main_process
        if not is_main:
            quiet = copy.copy(self.args)
            quiet.disable_tqdm = True
            own = dataclasses.replace(self, args=quiet, options={**self.options, "told": set(self.options["told"])})
        with Team(self.args.ddp_timeout) as team:
            said = contextlib.nullcontext() if is_main else contextlib.redirect_stdout(io.StringIO())
            with team.apart(), said:
                while (turn := team.take()) < len(todo):
                    own._shard(todo[turn], shards)
            team.wait()
        told: list[list[str]] = gather_object([sorted(own.options["told"])])
        tell(itertools.chain.from_iterable(told), self.options["told"])

    def _shard(self, number: int, shards: Sequence[IterableDataset]) -> None:
        """Score a shard, piece after piece."""
        shard, place = shards[number], self._place(number)
        files, digest, start = self._files(shard), RowsDigest(), 0
        unscored: list[list[str] | None] = []
        for at, piece in enumerate(_pieces(shard, self.size)):
            digest.add(piece)
            unscored.append(self._piece(piece, piece_in(place, at), self._rows(number, shards, start, piece)))
            start += len(piece)
        if PartialState().is_main_process:
            FinishedShard(digest.hexdigest(), files, unscored).write(place)

    def _piece(self, piece: Dataset, folder: Path, which: str) -> list[str] | None:
        """Score a piece, unless it is finished. Returns the reason of each of its rows where none can be scored."""
        if self.first is not None and from_main(lambda: self._is_finished(piece, folder)):
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ScoreWarning)  # said once, of all rows together
                scores = score_dataset(
                    self.model, piece, self.tokenizer, self.args, self.config, folder, **self.options
                )
        except NothingError as error:
            return [error.reasons.get(row, UNKNOWN) for row in range(len(piece))]
        except LostError:
            raise
        except InputError as error:
            raise InputError(f"{which}: {error}") from error
        if self.first is None:
            self.first, trust = scores.provenance, scores.provenance.trust
            if self.options.get("precision") == "auto" and trust is not None:  # the same for all pieces
                self.options["precision"] = trust.forward
        return None

    def _is_finished(self, piece: Dataset, folder: Path) -> bool:
        """Whether a folder holds the scores of these rows, by this model and with these settings."""
        if not (folder / SCORES_FILE).exists():
            return False
        there = ScoreTable.load(folder).provenance
        return not self._differences(there) and there.source.get("content") == hash_rows(piece)

    def _differences(self, there: Provenance) -> list[str]:
        """How a piece was scored otherwise than the first one, which alone says `auto`; its columns may differ."""
        first = cast(Provenance, self.first)
        preparation = {**first.preparation, "autocast": there.preparation["autocast"]}
        config = {**first.config, "signals": there.config.get("signals")}
        return there.differences(
            dataclasses.replace(first, dataset=there.dataset, rows=there.rows, preparation=preparation, config=config)
        )

    def _whole(self, count: int, source: Mapping[str, Any]) -> ScoreTable:
        """The table of all shards, which is written, and their pieces removed."""
        tables: list[ScoreTable | list[str]] = []
        digests: list[tuple[int, str]] = []
        remedy = "Choose another output, or remove that folder."
        for number in range(count):
            place = self._place(number)
            ended = cast(FinishedShard, FinishedShard.read(place))
            own = ended.tables(place)
            for each in own:
                if isinstance(each, ScoreTable):  # that of a shard that was not read is compared here
                    refuse_differences(self._differences(each.provenance), f"'{place}' holds scores", remedy)
            if rows := sum(map(len, own)):
                digests.append((rows, ended.content))
            tables += own
        if not any(isinstance(each, ScoreTable) for each in tables):
            raise InputError("The stream has no rows that can be scored." if tables else "The stream has no rows.")
        content = digests[0][1] if len(digests) == 1 else of_shards(digests)
        whole = together(tables, {**source, "content": content}, self.config)
        whole.save(self.folder)
        remove_folder(self.folder / PIECES)
        return whole

    def _files(self, shard: IterableDataset) -> str | None:
        """What the files of a shard are known by, and the pieces that are made of its rows; None if they are not."""
        files = files_of(shard)
        return None if files is None else f"{files} in pieces of {self.size}"

    def _place(self, number: int) -> Path:
        """The folder of a shard's pieces."""
        return self.folder / PIECES / f"{number:06d}"

    @staticmethod
    def _rows(number: int, shards: Sequence[IterableDataset], start: int, piece: Dataset) -> str:
        of = "the stream" if len(shards) == 1 else f"shard {number} of the stream's {len(shards)}"
        return f"Rows {start} to {start + len(piece) - 1} of {of} (counted from 0 in what follows)"

    def earlier(self, stream: IterableDataset) -> ScoreTable:
        """The scores in the folder. Raises InputError where they are of another stream, model or settings."""
        earlier, opened = ScoreTable.load(self.folder), None
        content = earlier.provenance.source.get("content")
        digest = RowsDigest(like=content)
        for piece in _pieces(stream, self.size):
            digest.add(piece)
            with contextlib.suppress(NothingError):
                opened = opened or self._open(piece)
        if opened is None or content != digest.hexdigest():
            raise InputError(f"'{self.folder}' holds scores of other rows. Choose another output, or remove it.")
        here = dataclasses.replace(opened, dataset=earlier.provenance.dataset, rows=earlier.provenance.rows)
        earlier.provenance.check_same(here, "scores", self.folder)
        return earlier

    def _open(self, piece: Dataset) -> Provenance:
        measuring = ("tokens_per_batch", "sharded", "signals", "warmup", "warmup_dataset")
        options = {name: value for name, value in self.options.items() if name not in measuring}
        precision: Precision = options.pop("precision", None) or ("bfloat16" if self.args.bf16 else "float32")
        settings = measured_settings(self.config, self.options["signals"])
        _, opened = open_pass(self.model, piece, self.tokenizer, self.args, settings, precision=precision, **options)
        warmup = self.options.get("warmup"), self.options.get("warmup_dataset")
        plan = plan_warmup(*warmup, self.model, opened, self.args, options)
        return opened.provenance if plan is None else plan.described(opened).provenance


def together(
    tables: Sequence[ScoreTable | list[str]], source: Mapping[str, Any], config: ResonanceConfig
) -> ScoreTable:
    """One table of all rows, from the tables of consecutive pieces.

    Args:
        tables: a table for each piece; for a piece without a scored row, the reason of each row. At least one is a
            table.
        source: where the stream comes from.
        config: how the rows were measured.
    """
    scored = [each for each in tables if isinstance(each, ScoreTable)]
    moved, start = [], 0
    for each in tables:
        rows = len(each)
        table = each.table if isinstance(each, ScoreTable) else _empty(scored[0].table.schema, each)
        reasons = [_moved(reason, start) for reason in table["reason"].to_pylist()]
        table = table.set_column(0, "sample_id", pa.array(np.arange(start, start + rows)))
        column = table.column_names.index("reason")
        moved.append(table.set_column(column, "reason", pa.array(reasons, pa.string())))
        start += rows
    if len({tuple(each.column_names) for each in moved}) > 1:
        raise InputError(
            "The pieces of this stream differ in their columns: some were scored by another version. Remove the folder "
            "of the scores, and score again."
        )
    whole = ScoreTable(with_votes_of_all(pa.concat_tables(moved)), scored[0].provenance)
    content = xxhash.xxh3_128("".join(each.provenance.dataset for each in scored).encode()).hexdigest()
    arguments = {name: value for name, value in scored[0].provenance.source.items() if name in OF_SOURCE}
    provenance = dataclasses.replace(
        scored[0].provenance,
        dataset=content,
        rows=start,
        source={**arguments, **source},
        trust=_trust(scored, whole, config),
    )
    return ScoreTable(whole.table, provenance)


def _trust(scored: Sequence[ScoreTable], whole: ScoreTable, config: ResonanceConfig) -> Trust | None:
    """The trust in all pieces together: their lowest agreement, and the range of all scores."""
    trusts = [each.provenance.trust for each in scored if each.provenance.trust is not None]
    agreements = [each.agreement for each in trusts if each.agreement is not None]
    if not trusts:
        return None
    values = whole.column("score")[whole.scored]
    return Trust(
        agreement=min(agreements) if agreements else None,
        rows=sum(each.rows for each in trusts),
        saturation=None if trusts[0].saturation is None else float(np.ptp(values)) / config.lr,
        forward=trusts[0].forward,
        saturated=is_saturated(values, config.to_json()),
        in_float32=all(each.in_float32 for each in trusts),
    )


def _empty(schema: pa.Schema, reasons: list[str]) -> pa.Table:
    columns = {each.name: pa.nulls(len(reasons), each.type) for each in schema}
    return pa.table({**columns, "reason": pa.array(reasons, pa.string())}, schema=schema)


def _moved(reason: str | None, start: int) -> str | None:
    """A reason that names a row of its piece, with the row's position in the stream instead."""
    if reason is None or not reason.startswith(SAME_PROMPT):
        return reason
    return f"{SAME_PROMPT} {int(reason.removeprefix(SAME_PROMPT)) + start}"


def _pieces(stream: IterableDataset, size: int) -> Iterator[Dataset]:
    """The rows of a stream, `size` at a time, with the stream's own types where it has them."""
    if stream.features is not None:
        info = DatasetInfo(features=stream.features)
        yield from (Dataset(table, info=info) for table in tables_of(stream, size))
    else:
        yield from (Dataset.from_dict(piece, on_mixed_types="use_json") for piece in columns_of(stream, size))
