"""`resofilter compare`: compare selectors on a model and data, or print the survey's tables, without torch."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..config import InputError
from ..config.compatibility import need_extra
from .parser import CommandParser

EXAMPLES = ("resofilter compare recipes/compare.yaml --output comparison/", "resofilter compare --published")


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of the comparison."""
    parser.add_argument("comparison", nargs="?", help="a YAML file such as recipes/compare.yaml")
    parser.add_argument("--output", help="a folder for everything, instead of the one in the file")
    parser.add_argument("--published", action="store_true", help="the survey's tables, from its own numbers")
    parser.add_argument("--json", help="with --published: a file for the ranks")


def run(args: argparse.Namespace) -> None:
    """Compare selectors, or print the survey's tables, recomputed from its numbers."""
    if args.json and not args.published:
        raise InputError("--json goes with --published: a comparison writes comparison.json into its folder.")
    if args.published == (args.comparison is not None):
        raise InputError("Say what to compare: a YAML file, or --published for the survey's twelve methods.")
    if args.published:
        _print_published(args.json)
    else:
        _compare(args)


def _print_published(ranks_file: str | None) -> None:
    import json

    from ..compare.published import published_ranks, published_table
    from ..io.files import replacing

    if ranks_file and Path(ranks_file).is_dir():
        raise InputError(f"--json '{ranks_file}' is a folder: name a file.")
    print(published_table())
    if ranks_file:
        with replacing(Path(ranks_file)) as temporary:
            temporary.write_text(json.dumps(published_ranks(), indent=2) + "\n")
        print(f"Ranks: {ranks_file}")


def _compare(args: argparse.Namespace) -> None:
    from ..compare.config import ComparisonConfig

    for extra in ("report", "compare"):
        need_extra(extra, "A comparison")
    config = ComparisonConfig.load(args.comparison)
    if args.output is not None:
        config = dataclasses.replace(config, output=args.output)
    import datasets
    from transformers.utils import logging

    from ..compare.methods import method_of
    from ..compare.report import PICTURE, write
    from ..compare.run import run as run_comparison
    from ..selecting.results import COMPARISON_FILE

    datasets.disable_progress_bars()  # one line for each training says more than many short bars
    logging.disable_progress_bar()
    cells = run_comparison(config)
    print(write(config, cells, {each.name: method_of(each).needs for each in config.selectors}))
    print(f"Table, cells and picture: {Path(config.output) / COMPARISON_FILE}, {Path(config.output) / PICTURE}")
