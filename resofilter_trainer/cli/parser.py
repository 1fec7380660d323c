"""The parser of a command, and the arguments that several commands share. Knows argparse only."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """A parser that reports a wrong argument in one line, without the usage.

    Attributes:
        before_help: a function to call before the help is printed, which adds what takes long to import.
    """

    before_help: Callable[[], None] | None = None

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def format_help(self) -> str:
        """The help of the command."""
        if self.before_help is not None:
            self.before_help()
        return super().format_help()


def row_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the rows, their columns, and how rows become tokens."""
    parser.add_argument("--model", help="a name on the hub, or a folder")
    parser.add_argument("--dataset", help="a name on the hub, a JSON, JSONL, CSV or Parquet file, or a folder")
    parser.add_argument("--split", default="train")
    parser.add_argument("--dataset_config", help="the configuration of a dataset on the hub")
    parser.add_argument("--drop_duplicates", action="store_true", help="drop rows whose prompt repeats another row's")
    parser.add_argument("--drop_empty", action="store_true", help="drop rows with an empty completion")
    columns = parser.add_argument_group("columns")
    columns.add_argument("--prompt_column", nargs="+", help="one column, or several to join: instruction input")
    columns.add_argument("--completion_column")
    columns.add_argument("--messages_column")
    columns.add_argument("--text_column")
    columns.add_argument("--separator", default="\n", help="the text between prompt and completion")
    columns.add_argument("--conversational", action="store_true", help="make messages of prompt and completion")
    tokens = parser.add_argument_group("tokens, as in SFTConfig")
    tokens.add_argument("--max_length", type=_length, default=1024, help="the maximum tokens of a row, or none")
    tokens.add_argument("--assistant_only_loss", action="store_true")
    tokens.add_argument("--completion_only_loss", type=_true_or_false)
    tokens.add_argument("--chat_template_path")
    tokens.add_argument("--trust_remote_code", action="store_true")


def process_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for several processes."""
    parser.add_argument("--num_processes", type=int, help="processes on this machine; on several: accelerate launch")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds of silence until a process counts as lost")


def scored_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the scored dataset."""
    parser.add_argument("--dataset", help="the dataset that was scored, if it has moved since")
    parser.add_argument("--split")


def _length(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"
