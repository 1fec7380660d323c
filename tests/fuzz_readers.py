"""Fuzz readers for hours instead of seconds: `python tests/fuzz_readers.py scores|store -max_total_time=600`.

Needs `atheris`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["resofilter_trainer"]):
    from resofilter_trainer.config import InputError
    from resofilter_trainer.io import store
    from resofilter_trainer.scores.score_table import SCORES_FILE, ScoreTable

PLACE = Path(tempfile.mkdtemp())
SEED = Path(tempfile.mkdtemp())


def scores(data: bytes) -> None:
    (PLACE / SCORES_FILE).write_bytes(data)
    ScoreTable.load(PLACE)


def lines(data: bytes) -> None:
    """A part whose name fits its bytes; any other is refused without being read."""
    (PLACE / "bytes").write_bytes(data)
    path = PLACE / f"part-{0:010d}-{store._digest(PLACE / 'bytes')}.parquet"
    (PLACE / "bytes").rename(path)
    try:
        store.Store(PLACE, "scores", {}).lines()
    finally:
        path.unlink()


def checked(read: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def check(data: bytes) -> None:
        try:
            read(data)
        except InputError as error:
            if "\n" in str(error):
                raise AssertionError("several lines") from error

    return check


if __name__ == "__main__":
    from helpers.stores import measured
    from helpers.tables import make_scores

    make_scores([1.0, None, 2.0]).save(SEED / "scores.parquet")
    store.pq.write_table(measured([0, 1]), SEED / "part.parquet", use_dictionary=False)
    atheris.Setup([sys.argv[0], str(SEED), *sys.argv[2:]], checked(scores if sys.argv[1] == "scores" else lines))
    atheris.Fuzz()
