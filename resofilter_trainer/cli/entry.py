"""The command line: `resofilter demo | score | select | clean | compare | report | env`, one module for each."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from ..config import InputError
from . import clean, compare, demo, env, report, score, select
from .launching import is_launched, run_in_processes
from .parser import CommandParser

COMMANDS = {  # each module has `add_arguments` and `run`, which imports what it needs
    "demo": (demo, "the whole method in a few minutes, on data that it makes"),
    "score": (score, "measure how far a step on each row of a dataset moves W_up"),
    "select": (select, "decide from scores which rows to keep"),
    "clean": (clean, "mask the tokens that a reference model has little to teach about"),
    "compare": (compare, "compare selectors on your model and data"),
    "report": (report, "one page that shows why a row was dropped"),
    "env": (env, "print the versions, for a bug report"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Wrong input ends it with one line and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of other libraries, about their own arguments
    warnings.filterwarnings("ignore", message="Scores to be taken with care")  # the summary has it
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parser.parse_args(argv)
    with exit_on_input_error(f"resofilter {args.command}"):
        if args.config:  # its values come before those of the command line, which therefore win
            args = parser.parse_args([args.command, *_yaml_arguments(args), *argv[argv.index(args.command) + 1 :]])
        if getattr(args, "num_processes", None) is not None and not is_launched():
            run_in_processes(argv, args.num_processes)
        args.run(args)


@contextlib.contextmanager
def exit_on_input_error(program: str) -> Iterator[None]:
    """Turn an InputError into one line on stderr and exit code 2, and an interrupt into exit code 130."""
    if os.environ.get("RANK", "0") != "0":
        program = f"{program} (process {os.environ['RANK']})"
    try:
        yield
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _yaml_arguments(args: argparse.Namespace) -> list[str]:
    """The values of a YAML file as arguments of the command line, so that they are checked in the same way."""
    from ..io.files import read_yaml

    values = read_yaml(args.config, f"--config {args.config}")
    if not isinstance(values, dict | None):
        raise InputError(f"--config {args.config} must be a mapping, 'name: value' on each line.")
    arguments: list[str] = []
    known = {action.dest for action in args.parser._actions if action.option_strings} - {"help", "config"}
    for name, value in (values or {}).items():
        if name not in known:
            raise InputError(f"--config {args.config}: '{args.command}' has no argument '{name}'.")
        if isinstance(getattr(args, name), bool) and isinstance(value, bool):  # a flag
            arguments += [f"--{name}"] if value else []
        elif isinstance(value, list) and name == "by":
            arguments.append(f"--by={','.join(map(str, value))}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None or getattr(args, name) is not None:
            arguments.append(f"--{name}={'none' if value is None else value}")
    return arguments


def _parser() -> CommandParser:
    parser = CommandParser(prog="resofilter", description="Score, select, train.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=module.run, parser=command)
        command.add_argument("--config", help="a YAML file with any of these arguments")
        module.add_arguments(command)
    return parser
