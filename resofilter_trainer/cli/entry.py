"""The command line: one module of this package for each command of `resofilter`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence

from .. import __version__
from ..config import InputError, nearest
from . import check, clean, compare, demo, env, inspect, join, probe, report, score, select
from .interrupts import interruptible
from .launching import check_environment, is_launched, run_in_processes
from .naming import options_of, speaking, told
from .parser import CommandHelp, CommandParser
from .quiet import silence_libraries
from .settings_file import yaml_arguments

COMMANDS = {  # each module has `EXAMPLES`, `add_arguments` and `run`, which imports what it needs
    "demo": (demo, "the whole method in a few minutes, on data that it makes"),
    "score": (score, "measure how far a step on each row of a dataset moves W_up"),
    "join": (join, "put together the scores of shards of a dataset, each of which was scored on its own"),
    "select": (select, "decide from scores which rows to keep"),
    "clean": (clean, "mask the tokens that a reference model has little to teach about"),
    "check": (check, "look for repeats, cut answers and the like in a dataset's texts; needs no model"),
    "compare": (compare, "compare selectors on your model and data"),
    "probe": (probe, "find out which signal finds which fault in your rows"),
    "inspect": (inspect, "what a run's ledger says of its steps, its spikes and its rows"),
    "report": (report, "one page that shows why a row was dropped"),
    "env": (env, "print the versions, for a bug report"),
}
MEASURING = ("demo", "probe", "score", "clean", "compare")  # load models, in as many processes as the environment says


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Invalid input ends it with one line and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = _parsed(parser, argv)
    with exit_on_input_error(f"resofilter {args.command}", args.parser):
        if args.config:  # its values come before those of the command line, which therefore win
            own = argv[argv.index(args.command) + 1 :]
            ending = f"--config={args.config}"  # of a list of values, which would take the command's argument
            args = _parsed(parser, [args.command, *yaml_arguments(args, COMMANDS), ending, *own])
        _refuse_empty(args)
        if args.command in MEASURING:
            check_environment()
        if getattr(args, "num_processes", None) is not None and not is_launched():
            run_in_processes(argv, args.num_processes)
        args.run(args)


@contextlib.contextmanager
def exit_on_input_error(
    program: str, parser: argparse.ArgumentParser | None = None, names: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Turn an InputError into a line on stderr and exit code 2, an interrupt into 130, a warning into a line.

    Args:
        program: the name that begins each line.
        parser: the parser of the arguments. Its options stand in the lines for the arguments that the library names.
        names: names of the library for which the parser has other options, beside `OTHER_NAMES`.
    """
    if os.environ.get("RANK", "0") != "0":
        program = f"{program} (process {os.environ['RANK']})"
    options = {} if parser is None else options_of(parser, names)
    with interruptible(program), speaking(options), _one_line_warnings(program):
        try:
            yield
        except InputError as error:
            print(f"{program}: error: {told(str(error))}", file=sys.stderr)
            raise SystemExit(2) from None


@contextlib.contextmanager
def _one_line_warnings(program: str) -> Iterator[None]:
    """Print each warning in one line, without those by which other libraries address programmers."""

    def show(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
        print(f"{program}: warning: {told(' '.join(str(message).split()))}", file=sys.stderr)

    silence_libraries()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("default", category=FutureWarning, module="resofilter_trainer")
        warnings.showwarning = show
        yield


def _parsed(parser: CommandParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command, or one line that says which command or option does not exist."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        parser.error(f"Name a command: {', '.join(COMMANDS)}.")
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        close = nearest(argv[0], COMMANDS)
        hint = f" Did you mean {close}?" if close else ""
        parser.error(f"There is no command '{argv[0]}'.{hint} There are {', '.join(COMMANDS)}.")
    args, rest = parser.parse_known_args(argv)
    if rest:
        args.parser.refuse(rest)
    return args


def _refuse_empty(args: argparse.Namespace) -> None:
    """Raise InputError for an empty value, as of a variable of the shell that is not set; a separator may be empty."""
    for action in args.parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest != "separator" and "" in (value if isinstance(value, list) else [value]):
            raise InputError(f"{(action.option_strings or [action.dest])[0]} is empty. Pass a value, or leave it out.")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="resofilter",
        description="Score the rows of a dataset by how far a step on each moves the model, and select which to keep.",
        epilog="\n  ".join(["examples:", *demo.EXAMPLES[:1], *score.EXAMPLES[:1], "resofilter select --help"]),
        formatter_class=CommandHelp,
    )
    parser.add_argument("--version", action="version", version=f"resofilter_trainer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog="\n  ".join(["examples:", *module.EXAMPLES]),
            formatter_class=CommandHelp,
        )
        command.set_defaults(run=module.run, parser=command)
        command.add_argument("--config", help="a YAML file with any of these options")
        module.add_arguments(command)
        command.usage = command.in_short()
    return parser
