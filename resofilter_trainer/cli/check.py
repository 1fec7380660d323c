"""`resofilter check`: look for repeats, cut answers and the like in a dataset's texts. Needs no model and no torch."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from ..config import ColumnMapping
from .inputs import dataset_of, require, settings_of
from .naming import told
from .parser import CommandParser, column_arguments, dataset_arguments

if TYPE_CHECKING:
    from ..data.text_checks import TextChecks

EXAMPLES = (
    "resofilter check --dataset rows.jsonl --output checks/",
    "resofilter check --dataset rows.jsonl --output checks/ --only exact_duplicate cut",
)
SHOWN = 2  # rows of each check


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of the checks."""
    dataset_arguments(parser)
    parser.needed("--output", help="a folder for what is found")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="the checks to make, by default all")
    column_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Check a dataset's texts, and print what was found."""
    require(args, "dataset", "output")
    from ..data.text_checks import check_texts
    from ..io.files import check_folder

    check_folder(Path(args.output))
    source = {"dataset": args.dataset, "split": args.split, "name": args.dataset_config}
    columns = dataclasses.asdict(settings_of(args, ColumnMapping))
    names = None if args.only is None else [name for each in args.only for name in each.split(",") if name]
    found = check_texts(dataset_of(args), names, source=source, **columns)
    saved = found.save(args.output)
    print(told(summary(found)))
    print(f"Checks: {saved}")
    print(f"Next: resofilter select scores/ --checks {quote(args.output)} --output kept/")


def summary(found: TextChecks) -> str:
    """What the checks have found, with examples, in lines."""
    from ..data.checks import CHECKS

    lines, reasons = [f"{len(found)} rows checked."], found.reasons
    for name, count in found.counts.items():
        check = CHECKS[name]
        lines.append(f"{count:>8} {name}: {check.says}." + (f" {check.remedy}" if count else ""))
        lines += [f"{'':>9}row {row}: {reasons[row]}" for row in found.rows([name])[:SHOWN].tolist()]
    lines += [f"{'-':>8} {name}: not checked, as {why}." for name, why in found.left_out.items()]
    unread = found.unreadable
    if unread:
        lines.append(f"{len(unread):>8} rows cannot be read:")
        lines += [f"{'':>9}row {row}: {reasons[row]}" for row in unread[:SHOWN]]
    return "\n".join(lines)
