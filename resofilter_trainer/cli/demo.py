"""`resofilter demo`: the whole method in a few minutes, on data that it makes."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import whole_number
from ..config.compatibility import need_extra
from .parser import CommandParser

MODES = ("two-pass", "callback")
ROWS, LEAST_ROWS = 2000, 64  # of the demo
EXAMPLES = ("resofilter demo", "resofilter demo --mode callback --rows 500 --output demo/")


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of the demo."""
    parser.add_argument("--output", help="a folder for everything; by default one in resofilter-demo/")
    modes = "score, select and train, or all in one run"
    parser.add_argument("--mode", choices=MODES, default="two-pass", help=modes)
    parser.add_argument("--rows", type=int, default=ROWS, help="the problems to train on; fewer take less time")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the training")


def run(args: argparse.Namespace) -> None:
    """Run the demo."""
    whole_number("--seed", args.seed, least=0)
    whole_number("--rows", args.rows, least=LEAST_ROWS)
    for extra in ("report", "compare"):
        need_extra(extra, "The demo")
    if args.mode == "callback":
        from ..demo.in_training import run as run_demo
    else:
        from ..demo.run import run as run_demo
    name = "seed" if args.mode == "two-pass" else args.mode
    name += f"-{args.seed}" if args.rows == ROWS else f"-{args.seed}-rows-{args.rows}"
    run_demo(Path(args.output or f"resofilter-demo/{name}"), args.seed, args.rows)
