"""`resofilter demo`: the whole method in a few minutes, on data that it makes."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import one_of, whole_number
from ..config.compatibility import need_extra
from .parser import CommandParser

MODES = ("two-pass", "callback")
EXAMPLE = "resofilter demo --mode callback --output demo/"


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of the demo."""
    parser.add_argument("--output", help="a folder for everything; by default one in resofilter-demo/")
    parser.add_argument("--mode", default="two-pass", help="two-pass: score, select, train; callback: in one run")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the training")


def run(args: argparse.Namespace) -> None:
    """Run the demo."""
    whole_number("--seed", args.seed, least=0)
    one_of("--mode", args.mode, MODES)
    for extra in ("report", "compare"):
        need_extra(extra, "The demo")
    if args.mode == "callback":
        from ..demo.in_training import run as run_demo
    else:
        from ..demo.run import run as run_demo
    name = "seed" if args.mode == "two-pass" else args.mode
    run_demo(Path(args.output or f"resofilter-demo/{name}-{args.seed}"), args.seed)
