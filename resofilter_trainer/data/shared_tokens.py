"""Rows as tokens, made by all processes together and kept, so that a start reads what an earlier one has made.

    each share -> its two files (`token_shares`) -> all together -> numbers-*.npy, reasons.parquet, last summary.json

Once there is a summary, a start reads what is known of the rows, and batches read their tokens.
"""

from __future__ import annotations

import contextlib
import copy
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.table import MemoryMappedTable, concat_tables
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import InputError
from ..io.files import load_parquet, read_json, replacing, save_parquet
from .preparation import PreparedRows, check_failed, nothing_to_learn, unrendered
from .shared_rows import Share, SharedRows, shares_of
from .surveys import Prompts, fingerprint_of, in_common
from .templates import check_template
from .together import from_main, shared_out
from .token_shares import NUMBERS, TokenShare
from .usable import check_refused

SUMMARY, REASONS = "summary.json", "reasons.parquet"


@dataclass(frozen=True)
class SharedTokens:
    """The tokens of a pass's rows, of which each process makes its share.

    Attributes:
        folder: a folder for these tokens alone, which all processes see.
        count: the number of the user's rows.
    """

    folder: Path
    count: int

    @property
    def made(self) -> bool:
        """Whether all rows are prepared."""
        return (self.folder / SUMMARY).exists()

    def prepare(
        self, rows: SharedRows, tokenizer: PreTrainedTokenizerBase, args: SFTConfig, drop_empty: bool
    ) -> PreparedRows:
        """What `preparation.prepare` makes of these rows; all processes call this. Arguments and errors as there."""
        tokenizer = copy.deepcopy(tokenizer)  # TRL sets its pad token and more
        check_template(Dataset.from_dict({}), tokenizer, args.chat_template_path)
        usable, silent = self.count - len(rows.skipped), dict[int, str]()
        shares = [each.share for each in self._shares]
        if rows.have_messages and not args.chat_template_path:
            for found in shared_out(shares, lambda share: _unrendered(rows, share, tokenizer)):
                silent |= found
            check_refused(silent, usable, drop_empty)
        told = shared_out(self._shares, lambda each: each.made(rows, tokenizer, args, silent))
        failed = {row: why for found, _ in told for row, why in found.items()}
        check_failed(failed, usable - len(silent), next((why for _, why in told if why), ""))
        check_refused(failed, usable - len(silent), drop_empty)
        from_main(self._put_together)
        return self.read()

    def read(self) -> PreparedRows:
        """The rows that were prepared.

        Raises:
            NothingError: none of them has a token to learn.
            InputError: a file is missing or damaged.
        """
        summary = read_json(self.folder / SUMMARY, self._way_out)
        table, _ = load_parquet(self.folder / REASONS, REASONS, "reasons")
        reasons = dict(zip(table["position"].to_pylist(), table["reason"].to_pylist(), strict=True))
        numbers = {name: self._loaded(name) for name in NUMBERS}
        usable = numbers["learnt"] > 0
        if not usable.any():
            raise nothing_to_learn(reasons)
        rows = whole = self._tokens(summary["sizes"])
        if not usable.all():
            rows, numbers = whole.select(np.flatnonzero(usable)), {name: each[usable] for name, each in numbers.items()}
        found = {name: np.asarray(each) for name, each in numbers.items()}
        beginning = np.array(summary["beginning"], dtype=np.int64)
        prompts = Prompts(found["prompt"], found["prompt_length"], beginning)
        return PreparedRows(
            rows, found["length"], found["learnt"], summary["largest"], summary["fingerprint"], reasons,
            summary["template"], summary["rendered"], whole, prompts, found["position"],
        )  # fmt: skip

    @property
    def _shares(self) -> list[TokenShare]:
        return [TokenShare(self.folder, share) for share in shares_of(self.count)]

    @property
    def _way_out(self) -> str:
        return f"Remove '{self.folder}': the rows are prepared again."

    def _numbers(self, name: str) -> Path:
        return self.folder / f"numbers-{name}.npy"

    def _loaded(self, name: str) -> np.ndarray:
        path = self._numbers(name)
        try:
            found: np.ndarray = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise self._damaged(path) from error
        return found

    def _damaged(self, path: Path) -> InputError:
        return InputError(f"'{path}' is missing or damaged. {self._way_out}")

    def _tokens(self, sizes: Sequence[int]) -> Dataset:
        """The tokens of all shares, which are mapped into memory."""
        paths = [each.tokens for each in self._shares]
        for path, size in zip(paths, sizes, strict=True):
            if not path.exists() or path.stat().st_size != size:
                raise self._damaged(path)
        tables = [_mapped(path) for path in paths]
        tables = [each for each in tables if len(each)] or tables[:1]
        return Dataset(concat_tables(tables), fingerprint=self.folder.name)  # else datasets would hash every table

    def _put_together(self) -> None:
        """Write what is known of all rows, a share at a time, and last the summary."""
        told = [each.about for each in self._shares]
        self._write_numbers(sum(each["rows"] for each in told))
        reasons = {int(row): why for each in told for row, why in each["reasons"].items()}
        texts = pa.array(reasons.values(), pa.string())
        table = pa.table({"position": pa.array(reasons.keys(), pa.int64()), "reason": texts})
        save_parquet(table, self.folder / REASONS, {REASONS: ""})
        sizes = [each["size"] for each in told]
        beginning = in_common([np.array(each["beginning"], np.int64) for each in told if each["beginning"] is not None])
        blocks = [bytes.fromhex(block) for each in told for block in each["blocks"]]
        summary = {
            "sizes": sizes,
            "largest": max(each["largest"] for each in told),
            "fingerprint": fingerprint_of(self._tokens(sizes), blocks=blocks),
            "beginning": None if beginning is None else beginning.tolist(),
            "template": next((each["template"] for each in told if each["template"]), ""),
            "rendered": any(each["rendered"] for each in told),
        }
        with replacing(self.folder / SUMMARY) as path:
            path.write_text(json.dumps(summary))

    def _write_numbers(self, rows: int) -> None:
        """Write the numbers of all rows, a file for each name, a share at a time."""
        with contextlib.ExitStack() as stack:
            files = {}
            for name, kind in NUMBERS.items():
                path = stack.enter_context(replacing(self._numbers(name)))
                files[name] = stack.enter_context(path.open("wb"))
                about = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": (rows,)}
                np.lib.format.write_array_header_1_0(files[name], about)
            for share in self._shares:
                table = share.numbers
                for name, kind in NUMBERS.items():
                    files[name].write(np.ascontiguousarray(table[name].to_numpy(), dtype=kind).tobytes())


def _mapped(path: Path) -> MemoryMappedTable:
    """The table of an Arrow file, as datasets maps it; but only the headers of its batches are read ahead."""
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # else the system may read the whole file with them
        pages.madvise(mmap.MADV_RANDOM)
    table = pa.ipc.open_stream(pa.py_buffer(pages)).read_all()
    if hasattr(mmap, "MADV_NORMAL"):
        pages.madvise(mmap.MADV_NORMAL)
    return MemoryMappedTable(table, str(path))


def _unrendered(rows: SharedRows, share: Share, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The rows with roles that the chat template leaves out, by position, each with the reason."""
    found: dict[int, str] = {}
    for block in rows.usable(share):
        check_template(block, tokenizer, None)
        found |= unrendered(block, tokenizer)
    return found
