"""Run by torchrun in several processes: the command line, with few rows in the shares that are prepared together."""

from __future__ import annotations

import sys

from resofilter_trainer.cli.entry import main
from resofilter_trainer.data import shared_rows, sharing, surveys
from resofilter_trainer.io import digest

if __name__ == "__main__":
    digest.BLOCK = surveys.BLOCK = shared_rows.BLOCK = sharing.LEAST = 3
    sys.exit(main(sys.argv[1:]))
