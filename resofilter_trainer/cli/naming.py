"""The library's messages in the shell's words: `drop_empty=True` as `--drop_empty`. Knows argparse, no command."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

# Names of the library, TRL and transformers, and of the option that a command has instead.
OTHER_NAMES = {
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "dataset_text_field": "text_column",
    "dataset_train_split": "split",
    "output_dir": "output",
    "ddp_timeout": "timeout",
    "keep": "keep_tokens",
    "groups": "group_column",
    "name": "dataset_config",
    "hub_model_id": "hub_dataset_id",
    "repo_id": "hub_dataset_id",
}
_spoken: ContextVar[Mapping[str, argparse.Action]] = ContextVar(
    "the options of the running command", default=MappingProxyType({})
)
BEGIN, END = "\0", "\1"  # of an option with its value

NAMED = re.compile(
    r"""
    (?P<kept>
        (?<!\w)'[^']*'(?!\w) | (?<!\w)"[^"]*"(?!\w)             # a quoted value, such as a path or a column
      | \b(?:[Hh]as|[Hh]ave|Known):[ ][^.]*                     # a list of columns
    )
    | (?<![\w.'"/=-])(?:args\.|config\.)?(?P<name>[a-z]\w*)
      (?: (?P<equals>=)
          (?P<value>r?'[^']*' | r?"[^"]*" | \[[^][]*] | \([^()]*\) | \{[^{}]*} | [+-]?\w+(?:[.+-]\w+)*)?
        | (?![\w(/=]|\.\w)
      )
      (?P<where>[ ](?:in|of)[ ]SFTConfig\b)?
    """,
    re.VERBOSE,
)


def options_of(parser: argparse.ArgumentParser, names: Mapping[str, str] | None = None) -> dict[str, argparse.Action]:
    """A parser's options, by the names that Python has for them.

    Args:
        parser: the parser of a command or recipe.
        names: Python's names, and the options that stand for them even where the parser has an option of that name.
    """
    found: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if _option(action):
            found.setdefault(action.dest, action)
    others = {name: found[option] for name, option in OTHER_NAMES.items() if option in found}
    return {**others, **found, **{name: found[option] for name, option in (names or {}).items()}}


def in_shell(message: str, options: Mapping[str, argparse.Action]) -> str:
    """A message of the library with the options of a command in place of Python's arguments.

    `name=value` becomes `--name value`. A bare name becomes `--name` if it cannot be an English word: where it has an
    underscore, or begins the message in lower case. What is quoted stays, and what the command has no option for.

    Args:
        message: the message.
        options: the command's options, as `options_of` returns them.
    """

    def said(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in options:
            return match[0]
        if match["equals"]:
            option = _given(options[name], match["value"])
            return f"{BEGIN}{option}{END}" if match["value"] else option
        known = "_" in name or match["where"] or match.start() == 0
        return _option(options[name]) if known else match[0]

    said_so = NAMED.sub(said, message).replace(f"{END}, {BEGIN}", " ")  # `a=1, b=2`
    return said_so.replace(BEGIN, "").replace(END, "")


@contextlib.contextmanager
def speaking(options: Mapping[str, argparse.Action]) -> Iterator[None]:
    """Let `told` speak of these options until the block ends."""
    token = _spoken.set(options)
    try:
        yield
    finally:
        _spoken.reset(token)


def told(message: str) -> str:
    """A message of the library in the words of the running command."""
    return in_shell(message, _spoken.get())


def _option(action: argparse.Action) -> str:
    """The option's first long spelling; empty for a positional argument."""
    return next((each for each in action.option_strings if each.startswith("--")), "")


def _given(action: argparse.Action, text: str | None) -> str:
    """An option with the value that Python's argument has."""
    option = _option(action)
    if text is None:
        return option
    value = _literal(text)
    if value is True and action.nargs in (0, "?"):
        return option
    if (value is False and action.nargs == 0) or (value is None and not reads(action, "none", None)):
        return f"no {option}"
    if isinstance(value, list | tuple):
        between = " " if action.nargs in ("+", "*") else ","
        return f"{option} {between.join('...' if each is ... else shlex.quote(str(each)) for each in value)}"
    if isinstance(value, dict):
        return f"{option} {shlex.quote(json.dumps(value))}"
    return f"{option} {str(value).lower() if value is None or isinstance(value, bool) else shlex.quote(str(value))}"


def _literal(text: str) -> Any:
    """The value of a Python literal; any other text is its own value, and a number stays as it is written."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    return text if isinstance(value, int | float) and not isinstance(value, bool) else value


def reads(action: argparse.Action, text: str, value: object) -> bool:
    """Whether an option reads a text as this value, such as `none` as None."""
    try:
        return callable(action.type) and action.type(text) is value
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        return False
