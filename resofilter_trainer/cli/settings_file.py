"""The YAML file of `--config` as arguments of the command line. Knows argparse and YAML, no command."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from typing import Any

from ..config import InputError, nearest
from .naming import reads


def yaml_arguments(args: argparse.Namespace, commands: Collection[str] = ()) -> list[str]:
    """The values of a YAML file as arguments of the command line, so that they are checked in the same way.

    Args:
        args: the arguments with the file, the command and its parser.
        commands: the names of all commands. A file may have a section for each, of which the command reads its own.

    Raises:
        InputError: the file cannot be read, is no mapping, or has an unknown name or a value of the wrong kind.
    """
    from ..io.files import read_yaml

    values = read_yaml(args.config, f"--config {args.config}")
    if not isinstance(values, dict | None):
        raise InputError(f"--config {args.config} must be a mapping, 'name: value' on each line.")
    known = {each.dest: each for each in args.parser._actions if each.option_strings}
    places = {each.dest for each in args.parser._actions if not each.option_strings}
    arguments: list[str] = []
    for written, value in from_sections(values or {}, [args.command], commands).items():
        name = args.parser.own_name(str(written))
        if name in places:
            command = f"{args.parser.prog} {name.upper()} --config {args.config}"
            raise InputError(f"--config {args.config}: '{written}' is named on the command line: {command}")
        if name not in known or name in ("help", "config"):
            close = nearest(name, set(known) - {"help", "config"})
            hint = f" Did you mean '{close}'?" if close else ""
            raise InputError(f"--config {args.config}: '{args.command}' has no argument '{written}'.{hint}")
        wrong = _wrong_kind(known[name], value)
        if wrong:
            raise InputError(f"--config {args.config}: '{written}' {wrong}, got {value!r}.")
        arguments += _arguments(known[name], value)
    return arguments


def from_sections(values: Mapping[str, Any], own: Collection[str], commands: Collection[str]) -> dict[str, Any]:
    """The values of a file outside its sections, and those of one's own sections, which win.

    Args:
        values: the file's values. A mapping under the name of a command is the section of that command.
        own: the commands whose sections are read.
        commands: the names of all commands.
    """
    sections = {name: value for name, value in values.items() if name in commands and isinstance(value, dict | None)}
    found = {name: value for name, value in values.items() if name not in sections}
    for name in own:
        found |= sections.get(name) or {}
    return found


def _wrong_kind(action: argparse.Action, value: Any) -> str | None:
    """What is said of a value that cannot be the option's; None if it can."""
    if value is None:
        may = action.default is None or reads(action, "none", None)
        return None if may else f"has no value: leave it out for the default, {action.default!r}"
    if action.nargs == 0:
        return None if isinstance(value, bool) else "is true or false"
    if isinstance(value, list):
        if action.nargs is None and action.dest != "by":
            return "is one value"
        odd = any(isinstance(each, dict | list | bool | None) for each in value)
        return "is a name or a list of names" if odd or not value else None
    if isinstance(value, dict):
        return "is one value, no mapping"
    if isinstance(value, bool) and not reads(action, "true", True):
        return "is a number or text; quote a text that YAML reads as true or false"
    return None


def _arguments(action: argparse.Action, value: Any) -> list[str]:
    option = f"--{action.dest}"
    if action.nargs == 0:
        return [option] if value else []
    if isinstance(value, list):
        return [f"{option}={','.join(map(str, value))}"] if action.nargs is None else [option, *map(str, value)]
    if value is None:
        return [f"{option}=none"] if reads(action, "none", None) else []
    return [f"{option}={value}"]
