"""The command line: resofilter demo | score | select | clean | compare | report | env. What they do: `commands.py`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

from ..config import InputError
from .arguments import (
    clean_arguments,
    compare_arguments,
    demo_arguments,
    report_arguments,
    score_arguments,
    select_arguments,
)
from .commands import run_clean, run_compare, run_demo, run_env, run_report, run_score, run_select
from .launching import is_launched, run_in_processes


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Input that cannot work ends with one line and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries below, on their own arguments
    warnings.filterwarnings("ignore", message="Scores to be taken with care")  # the summary says it
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parser.parse_args(argv)
    with exit_on_input_error(f"resofilter {args.command}"):
        if args.config:  # its values stand before the command line's, so that those win
            args = parser.parse_args([args.command, *_yaml_arguments(args), *argv[argv.index(args.command) + 1 :]])
        if getattr(args, "num_processes", None) is not None and not is_launched():
            run_in_processes(argv, args.num_processes)
        args.run(args)


@contextlib.contextmanager
def exit_on_input_error(program: str) -> Iterator[None]:
    """Turn an InputError into one line on stderr and exit code 2, and an interrupt into 130."""
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
    """A YAML file's values as they would stand on the command line, to be checked like those."""
    from ..io.files import read_yaml

    values = read_yaml(args.config, f"--config {args.config}")
    if not isinstance(values, dict | None):
        raise InputError(f"--config {args.config} must hold a mapping, 'name: value' on each line.")
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


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one line, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="resofilter", description="Score, select, train.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, add, text in (
        ("demo", run_demo, demo_arguments, "the whole method in some minutes, on data that it makes"),
        ("score", run_score, score_arguments, "measure how far each row of a dataset would move W_up"),
        ("select", run_select, select_arguments, "decide which rows stay, from scores"),
        ("clean", run_clean, clean_arguments, "mask the tokens that a reference model has nothing to teach about"),
        ("compare", run_compare, compare_arguments, "selectors against each other, on your model and data"),
        ("report", run_report, report_arguments, "one page that shows why a sample went"),
        ("env", run_env, lambda _: None, "print the versions, for a bug report"),
    ):
        command = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run, parser=command)
        command.add_argument("--config", help="a YAML file with any of these arguments")
        add(command)
    return parser
