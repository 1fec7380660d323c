"""Run by torchrun in several processes: the command line, with few rows in the shares that are prepared together.

Several commands have `then` between them. Of a stream, the number of rows that are read at a time is written to stderr.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

from datasets import Dataset, IterableDataset

from resofilter_trainer.cli.entry import main
from resofilter_trainer.data import shared_rows, sharing, surveys
from resofilter_trainer.io import digest
from resofilter_trainer.scoring import stream as streaming


def counted(stream: IterableDataset, size: int) -> Iterator[Dataset]:
    for piece in pieces(stream, size):
        print(f"{len(piece)} rows read", file=sys.stderr, flush=True)
        yield piece


if __name__ == "__main__":
    digest.BLOCK = surveys.BLOCK = shared_rows.BLOCK = sharing.LEAST = 3
    pieces, streaming._pieces = streaming._pieces, counted
    for is_command, words in itertools.groupby(sys.argv[1:], lambda word: word != "then"):
        if is_command:
            main(list(words))
