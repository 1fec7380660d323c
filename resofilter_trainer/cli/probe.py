"""`resofilter probe`: which signal finds which fault in your rows with your model."""

from __future__ import annotations

import argparse
from pathlib import Path
from shlex import quote
from typing import Any, get_args

from ..config import InputError, Precision
from .inputs import checked_dataset_of, require, row_options, sft_config, warmup_dataset_of
from .naming import told
from .parser import CommandParser, process_arguments, row_arguments
from .score import SIGNALS, check_values

KINDS = (  # the names of those in `probe.faults`, which needs torch
    *("exchanged", "number", "number_carried", "final_number", "cut", "shuffled", "other_turn", "lost_turn"),
    *("boilerplate", "repeated_prompt"),
)
EXAMPLES = (
    "resofilter probe --model google/gemma-2-2b --dataset rows.jsonl --output probe/",
    "resofilter probe --model google/gemma-2-2b --dataset rows.jsonl --rows 1000 --no_self_made",
)


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of the probe."""
    row_arguments(parser)
    process_arguments(parser)
    parser.add_argument("--output", default="probe", help="a folder for the results")
    parser.add_argument("--rows", type=int, default=400, help="the number of rows to draw")
    parser.add_argument("--faults_per_kind", type=int, help="faults of each kind; by default about 320 in all")
    kinds = f"the kinds of faults to plant: all (the default), none, or some of {', '.join(KINDS)}"
    parser.add_argument("--kinds", nargs="+", default=["all"], metavar="KIND", help=kinds)
    own = "faults of your own: functions from a row to the row with a fault; none by default"
    parser.add_argument("--fault", action="extend", nargs="+", default=[], metavar="FILE.py:function", help=own)
    parser.add_argument("--no_self_made", action="store_true", help="let no model write wrong answers: faster")
    parser.add_argument("--writer", help="the model that writes wrong answers; by default --model")
    parser.add_argument("--wrong_column", help="a column with your own labels of wrong rows, as true or false")
    signals = f"the signals to measure: those of the one pass (the default), all, or some of {', '.join(SIGNALS)}"
    parser.add_argument("--signals", nargs="+", metavar="NAME", help=signals)
    parser.add_argument("--reference", help="the reference model of excess and superfiltering")
    warm = "measure again with a copy of the model that was tuned on so many rows, such as 640"
    parser.add_argument("--warmup", type=int, metavar="ROWS", help=warm)
    parser.add_argument("--warmup_dataset", help="the rows to tune on; by default rows that were not drawn")
    parser.add_argument("--seed", type=int, default=0, help="the random seed")
    parser.add_argument("--tokens_per_batch", type=int, help="batch size in tokens; by default what suits the device")
    precision = "the forward's precision: float32, bfloat16, or auto: bfloat16 if faster and ranks alike"
    parser.add_argument("--precision", choices=get_args(Precision), default="auto", help=precision)


def run(args: argparse.Namespace) -> None:
    """Probe a dataset, and print a table and a recommendation."""
    require(args, "model", "dataset")
    check_values(args)
    if args.writer and args.no_self_made:
        raise InputError("--writer writes the answers that --no_self_made leaves out: leave one of them out.")
    from accelerate import PartialState

    signals: dict[str, Any] = {"signals": _names(args.signals)} if args.signals else {}
    from ..probe.run import probe_dataset
    from ..probe.table import table_of

    result = probe_dataset(
        args.model,
        checked_dataset_of(args),
        args=sft_config(args, bf16=False),
        output=args.output,
        rows=args.rows,
        faults_per_kind=args.faults_per_kind,
        kinds=None if args.kinds == ["none"] else _names(args.kinds),
        faults=args.fault,
        self_made=False if args.no_self_made else True if args.writer else None,
        writer=args.writer,
        reference=args.reference,
        warmup=args.warmup,
        warmup_dataset=warmup_dataset_of(args),
        **signals,
        wrong_column=args.wrong_column,
        seed=args.seed,
        precision=args.precision,
        tokens_per_batch=args.tokens_per_batch,
        **row_options(args),
    )
    if not PartialState().is_main_process:
        return
    print(told(table_of(result)))
    folder = Path(args.output)
    print(f"Results: {folder / 'probe.json'}, page: {folder / 'report.html'}")
    settings = quote(str(folder / "recommended.yaml"))
    print(f"Next: resofilter score --config {settings}, then resofilter select --config {settings}")


def _names(given: list[str]) -> str:
    """Names with spaces or commas between them, as one text."""
    return ",".join(each.strip(",") for each in given)
