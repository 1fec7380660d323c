"""The arguments of a recipe: dataclasses, read by TRL from the command line and a YAML file. Knows no recipe."""

from __future__ import annotations

import sys
from typing import Any

from ..config import InputError
from .entry import COMMANDS
from .parser import CommandParser
from .quiet import silence_libraries
from .settings_file import from_sections

silence_libraries()  # a recipe imports this module before the libraries
STANDS_FOR = ("score", "select")  # commands whose settings a recipe has, too


def recipe_parser(*kinds: type) -> Any:
    """TRL's parser for dataclasses, which reports a wrong argument in one line."""
    from trl import TrlParser

    class RecipeParser(CommandParser, TrlParser):
        """A TrlParser with the errors and the spelling of a command, for a file that may have sections of commands."""

        def set_defaults_with_config(self, **values: Any) -> list[str]:
            """Take the values outside sections, and those of the commands that a recipe stands for."""
            unknown: list[str] = super().set_defaults_with_config(**from_sections(values, STANDS_FOR, COMMANDS))
            return unknown

    return RecipeParser(kinds)


def parse_recipe(parser: Any) -> list[Any]:
    """The dataclasses of a `recipe_parser`, from this process's command line.

    Raises:
        InputError: the file of `--config` cannot be read, or a dataclass refuses its values.
    """
    from ..data.files import first_line

    argv = [part for each in sys.argv[1:] for part in (each.split("=", 1) if each.startswith("--config=") else [each])]
    if argv[-1:] == ["--config"]:
        raise InputError("--config needs a YAML file.")
    try:
        *parsed, from_file, rest = parser.parse_args_and_config(argv, True, separate_remaining_strings=True)
    except Exception as error:  # TRL, transformers and yaml each raise their own
        raise InputError(first_line(error)) from error
    if unknown := [*from_file, *rest]:
        parser.refuse(unknown)
    return parsed
