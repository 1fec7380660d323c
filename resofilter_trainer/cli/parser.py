"""The parser of a command, and the arguments that several commands share. Knows argparse only."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..config import InputError, nearest, one_of
from .naming import options_of, reads

INSTEAD = {  # options of other programs, and what a command may have for them
    "bf16": "--precision bfloat16",
    "fp16": "--precision bfloat16",
    "batch_size": "--tokens_per_batch",
    "per_device_train_batch_size": "--tokens_per_batch",
    "learning_rate": "--lr",
    "max_seq_length": "--max_length",
}
TRUE_OR_FALSE = ("true", "false")
NEEDED = "required, here or in the file of --config"
REQUIRED = "the following arguments are required: "  # argparse's words


class CommandHelp(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the defaults that say something, and examples as they are written."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **{"max_help_position": 32, **settings})

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.rpartition("_")[2].upper()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default is None or action.default is False or "default" in (action.help or "")
        return action.help if said else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """A parser that reports a wrong argument in one line, without the usage, and takes names as people write them.

    An option may be written with hyphens, or by the name that TRL and transformers have for it, but not abbreviated. A
    value may begin with a minus.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._given: list[str] = []  # the arguments, as `_spelled` returns them

    def needed(self, *names: str, **settings: Any) -> None:
        """Add an argument that must be given, on the command line or in the file of `--config`, see `require`."""
        group = next((each for each in self._action_groups if each.title == NEEDED), None)
        (self.add_argument_group(NEEDED) if group is None else group).add_argument(*names, **settings)

    def in_short(self) -> str:
        """The usage: the arguments that must be given."""
        forms = {"*": "SCORES ...", "?": "[{}]"}
        actions = self._positionals._group_actions
        places = [forms.get(str(each.nargs), "{}").format(each.dest.upper()) for each in actions]
        groups = [each for each in self._action_groups if each.title == NEEDED]
        options = [f"{each.option_strings[0]} ..." for group in groups for each in group._group_actions]
        return " ".join([self.prog, *places, *options, "[options]"])

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        if message.startswith(REQUIRED):
            name = message.removeprefix(REQUIRED).split(", ")[0]
            what = next((each.help for each in self._actions if each.dest == name), None)
            message = f"{name} is missing" + (f": {what}." if what else ".")
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As `ArgumentParser.parse_known_args`, for options as people write them."""
        self._given = self._spelled(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._given, namespace)

    def own_name(self, name: str) -> str:
        """The name of an option that may be written with hyphens, or as in TRL; an unknown name stays."""
        known = options_of(self)
        found = known.get(name.replace("-", "_"))
        return name if found is None else found.dest

    def unknown(self, name: str) -> str:
        """What to say of an option that does not exist."""
        known = {action.dest: action for action in options_of(self).values()}
        instead, (no, _, negated) = INSTEAD.get(name.replace("-", "_"), ""), name.replace("-", "_").partition("_")
        action = known.get(self.own_name(negated)) if no == "no" else None
        if action is not None and (_is_flag(action) or reads(action, "false", False)):
            return f"There is no option --{name}: write --{action.dest} false."
        if instead.split(" ")[0].removeprefix("--") not in known:
            close = nearest(name.replace("-", "_"), list(known))
            instead = f"--{close}" if close else ""
        return f"There is no option --{name}." + (
            f" Did you mean {instead}?" if instead else f" {self.prog} --help lists all."
        )

    def refuse(self, rest: Sequence[str]) -> NoReturn:
        """Exit with one line about the arguments that nothing takes."""
        options = [each.removeprefix("--").split("=")[0] for each in rest if each.startswith("--")]
        if options:
            self.error(self.unknown(options[0]))
        flags = [option for option, value in itertools.pairwise(self._given) if value == rest[0]]
        if flags and _is_flag(self._option_string_actions.get(flags[-1])):
            self._refuse_value(flags[-1], rest[0])
        self.error(f"Nothing takes the argument '{rest[0]}'.")

    def _refuse_value(self, flag: str, value: str) -> NoReturn:
        self.error(f"{flag} is true or false, got '{value}': write {flag}, or leave it out.")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            what = VALUES.get(action.type) if action.option_strings else None
            if what is None:
                raise
            name = action.option_strings[0]
            raise argparse.ArgumentError(None, f"{name} must be {what}, got {arg_string!r}.") from error

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or not action.option_strings:
            return super()._check_value(action, value)
        try:
            one_of(action.option_strings[0], value, list(action.choices))
        except InputError as error:
            raise argparse.ArgumentError(None, str(error)) from error

    def _spelled(self, arguments: Sequence[str]) -> list[str]:
        """The arguments with the options' own names, and with values that begin with a minus joined to their option.

        A flag may have a value as in TRL's commands: `--drop_empty true` is `--drop_empty`, and with `false` it is out.
        """
        known, spelled = self._option_string_actions, list[str]()
        for each in arguments:
            option, equals, value = each.partition("=")
            if option.startswith("--") and option not in known:
                option = f"--{self.own_name(option[2:])}"
                each = f"{option}{equals}{value}"
            before = known.get(spelled[-1]) if spelled else None
            flag, said = (known.get(option), value) if equals else (before, each)
            if _is_flag(flag) and (equals or said.lower() in TRUE_OR_FALSE):
                if said.lower() not in TRUE_OR_FALSE:
                    self._refuse_value(option, said)
                spelled += [option] if equals else []
                if said.lower() == "false":  # also one that the file of `--config` has
                    spelled = [other for other in spelled if other != spelled[-1]]
                continue
            is_value = each.startswith("-") and not each.startswith("--") and each not in known
            if before is not None and before.nargs is None and is_value:
                spelled[-1] = f"{spelled[-1]}={each}"
            else:
                spelled.append(each)
        return spelled


def _is_flag(action: argparse.Action | None) -> bool:
    """Whether an option is a flag of its own, unlike `--help`."""
    return action is not None and action.nargs == 0 and action.default is False


def row_arguments(parser: CommandParser) -> None:
    """Add the arguments for the rows, their columns, and how rows become tokens."""
    parser.needed("--model", help="a name on the hub, or a folder")
    dataset_arguments(parser)
    parser.add_argument("--drop_duplicates", action="store_true", help="drop rows whose prompt repeats another row's")
    parser.add_argument("--drop_empty", action="store_true", help="drop rows with an empty completion")
    column_arguments(parser)
    tokens = parser.add_argument_group("tokens, as in SFTConfig")
    tokens.add_argument("--max_length", type=_length, default=1024, help="tokens of a row, or none")
    tokens.add_argument("--assistant_only_loss", action="store_true", help="learn what the assistant says only")
    tokens.add_argument("--completion_only_loss", type=true_or_false, help="false to learn the prompt, too")
    tokens.add_argument("--chat_template_path", help="a chat template, or a model with one")
    tokens.add_argument("--trust_remote_code", action="store_true", help="run code of the model's own")


def dataset_arguments(parser: CommandParser) -> None:
    """Add the arguments that name a dataset."""
    parser.needed("--dataset", help="a name on the hub, a JSON, JSONL, CSV or Parquet file, or a folder")
    parser.add_argument("--split", default="train", help="a split, or a part: train[:1000]")
    parser.add_argument("--dataset_config", help="a configuration on the hub")


def column_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which columns are what."""
    columns = parser.add_argument_group("columns")
    columns.add_argument("--prompt_column", nargs="+", help="one or several: instruction input")
    columns.add_argument("--completion_column", help="the answer, which is learnt")
    columns.add_argument("--messages_column", help="a list of messages with role and content")
    columns.add_argument("--text_column", help="plain text, all of which is learnt")
    columns.add_argument("--separator", default="\n", help="after the prompt; by default a line break")
    columns.add_argument("--conversational", action="store_true", help="make messages of prompt and completion")


def process_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for several processes."""
    parser.add_argument("--num_processes", type=int, help="here; on several machines: accelerate launch")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds until a silent process is lost")


def hub_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the arguments that push to the hub, by TrainingArguments' names; a token comes from HF_TOKEN or the login."""
    hub = parser.add_argument_group("hub, as in TrainingArguments")
    hub.add_argument("--push_to_hub", action="store_true", help=f"push {what}, with a card; log in with: hf auth login")
    hub.add_argument("--hub_dataset_id", metavar="OWNER/NAME", help="the repository, made where it does not exist")
    private = "whether it is private; by default as its owner has set"
    hub.add_argument("--hub_private_repo", nargs="?", const=True, type=true_or_false, help=private)
    hub.add_argument("--hub_revision", metavar="BRANCH", help="the branch; by default the main one")


def scored_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the scored dataset."""
    parser.add_argument("--dataset", help="the dataset that was scored, if it has moved since")
    parser.add_argument("--split", help="its split, if it is another than that of the scores")


def _length(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def shard(text: str) -> tuple[int, int]:
    """The number of a shard, from 0, and that of all shards: `3/64`."""
    index, count = map(int, text.split("/"))
    if not 0 <= index < count:
        raise ValueError
    return index, count


def true_or_false(text: str) -> bool:
    """The value of `true` or `false`, the type of an option that may have one."""
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def seed_argument(parser: argparse.ArgumentParser) -> None:
    """Add the seed of Python's, NumPy's and torch's random numbers, with SFTConfig's default."""
    parser.add_argument("--seed", type=int, default=42, help="the random seed")


VALUES: dict[Any, str] = {  # what the values of a type are, for the error
    int: "a whole number",
    float: "a number",
    _length: "a whole number or none",
    shard: "the number of a shard, from 0, and that of all: 3/64",
    true_or_false: "true or false",
}
