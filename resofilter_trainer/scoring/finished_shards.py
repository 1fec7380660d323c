"""What is kept of a finished shard of a stream until the pass ends. Knows folders and files, neither model nor rows."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from ..config import InputError
from ..io.files import read_json, replacing
from ..scores.score_table import SCORES_FILE, ScoreTable

NOTE = "finished.json"


@dataclass(frozen=True)
class FinishedShard:
    """A shard of which every piece was measured.

    Attributes:
        content: the digest of its rows.
        files: what its files and its pieces are known by; None where its rows depend on anything but files.
        pieces: for each piece, the reason of each row where no row has a score; None where the piece has a table.
    """

    content: str
    files: str | None
    pieces: list[list[str] | None]

    def write(self, folder: Path) -> None:
        """Write it beside the shard's pieces."""
        with replacing(folder / NOTE) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> FinishedShard | None:
        """Read it; None where the shard is not finished. Raises InputError where it is damaged."""
        way_out = f"Remove '{folder}': its rows are measured again."
        try:
            return cls(**read_json(folder / NOTE, way_out))
        except FileNotFoundError:
            return None
        except TypeError as error:
            raise InputError(f"'{folder / NOTE}' was written by another version ({error}). {way_out}") from error

    def is_whole(self, folder: Path) -> bool:
        """Whether the tables of all its pieces are there."""
        scored = [number for number, reasons in enumerate(self.pieces) if reasons is None]
        return all((piece_in(folder, number) / SCORES_FILE).is_file() for number in scored)

    def tables(self, folder: Path) -> list[ScoreTable | list[str]]:
        """The table of each piece, or the reason of each of its rows. Raises InputError where a table is damaged."""
        try:
            return [
                ScoreTable.load(piece_in(folder, number)) if reasons is None else reasons
                for number, reasons in enumerate(self.pieces)
            ]
        except InputError as error:
            raise InputError(f"{error} Remove '{folder}': its rows are measured again.") from error


def piece_in(folder: Path, number: int) -> Path:
    """The folder of a shard's piece."""
    return folder / f"{number:06d}"
