"""The examples of the documentation: blocks of Markdown, and how they are run. Knows text and folders, no page."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands import launch
from torch.distributed import run as torchrun

from resofilter_trainer.cli import entry
from resofilter_trainer.cli.recipe import parse_recipe, recipe_parser

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"^( *)(?:<!-- (not run|only parsed): (.+?) -->\n\1)?```([\w{}-]*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL
)
# Programs that are no part of this package. That the files they name exist is tested.
OTHERS = {"git", "pip", "python", "pytest", "accelerate", "torchrun", "llamafactory-cli", "axolotl", "srun", "export"}
MODULE = "resofilter_trainer.cli"  # what a launcher runs


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: the file.
        line: its first line there, from 1.
        language: such as `python`.
        code: the text.
        mark: `"not run"` or `"only parsed"`, by a comment before it; else empty.
        reason: the reason in that comment.
    """

    page: Path
    line: int
    language: str
    code: str
    mark: str
    reason: str


def blocks_of(page: Path) -> list[Block]:
    """Every block of a page, first to last."""
    text = page.read_text()
    return [
        Block(page, text[: found.start()].count("\n") + 2 + bool(found[2]), found[4], textwrap.dedent(found[5]),
              found[2] or "", found[3] or "")
        for found in FENCE.finditer(text)
    ]  # fmt: skip


def commands_of(code: str) -> list[list[str]]:
    """The commands of a block for the shell, as words; without comments."""
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in re.sub(r"\\\n", " ", code).splitlines()]
    return [shlex.split(command) for line in lines for command in line.split("&&") if command.strip()]


def run_block(block: Block, names: dict[str, Any]) -> None:
    """Run a block in this process and folder; Python in `names`, which it may add to."""
    if block.language == "python":
        code = "\n" * block.line + block.code  # so that a traceback has the line of the page
        exec(compile(code, str(block.page), "exec"), names)
    elif block.language == "bash":
        for words in commands_of(block.code):
            run_command(words, block.mark == "only parsed")
    elif block.language == "yaml":
        for document in yaml.safe_load_all(block.code):
            for container in containers_of(document):
                run_command(container["command"], only_parsed=True)


def run_command(words: list[str], only_parsed: bool) -> None:
    """Run a command of `resofilter`, or see that its options are known; of others, see that their files exist."""
    if words[0] == "resofilter":
        known = parse(words[1:])
        if not only_parsed:
            entry.main(words[1:])
        assert known.command in entry.COMMANDS
        return
    assert words[0] in OTHERS, words
    if MODULE in words:
        parse_launched(words)
    if recipe_in(words):
        parse_for_recipe(words)
    files = [word for word in words if re.fullmatch(r"[\w./-]+\.(py|yaml|txt)", word) and "/" in word]
    assert [file for file in files if not (ROOT / file).exists() and not Path(file).exists()] == []


def parse(argv: list[str]) -> argparse.Namespace:
    """What the commands understand of these words; an unknown option is an error."""
    parsed, rest = entry._parser().parse_known_args(argv)
    assert rest == [], rest
    return parsed


def parse_launched(words: list[str]) -> None:
    """See that a launcher and the command that it runs know these words; a variable of the shell stands for a 1."""
    launcher = next(name for name in ("torchrun", "accelerate") if name in words)
    words = [re.sub(r"\$(\(\w+\)|\w+)", "1", word) for word in words[words.index(launcher) + 1 :]]
    if launcher == "torchrun":
        torchrun.get_args_parser().parse_args(words)
    else:
        assert words[0] == "launch"
        launch.launch_command_parser().parse_args(words[1:])
    assert parse(words[words.index(MODULE) + 1 :]).command in entry.COMMANDS


def containers_of(document: Any) -> list[dict[str, Any]]:
    """The containers of a job of Kubernetes; none of anything else."""
    if not isinstance(document, dict) or document.get("kind") != "Job":
        return []
    found: list[dict[str, Any]] = document["spec"]["template"]["spec"]["containers"]
    return found


def recipe_in(words: list[str]) -> str | None:
    """The recipe that a command runs, such as `recipes/gsm8k.py`; None if it runs none."""
    return next((word for word in words if re.fullmatch(r"recipes/\w+\.py", word)), None)


def recipe_lines(page: Path) -> list[list[str]]:
    """The commands of a page, or of a recipe's own docstring, that run a recipe."""
    text = ast.get_docstring(ast.parse(page.read_text())) or "" if page.suffix == ".py" else page.read_text()
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found = [line for line in lines if re.match(r" *(python|accelerate launch) .*\brecipes/\w+\.py\b", line)]
    return [command for line in found for command in commands_of(line)]


def parse_for_recipe(words: list[str]) -> None:
    """Let a recipe parse its words of a command; an unknown option ends it with code 2."""
    recipe = recipe_in(words)
    spec = importlib.util.spec_from_file_location(Path(recipe).stem, ROOT / recipe)
    argv, sys.argv = sys.argv, words[words.index(recipe) :]
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # for the types of its dataclasses
    try:
        spec.loader.exec_module(module)
        if hasattr(module, "RecipeArguments"):
            parse_recipe(recipe_parser(module.RecipeArguments, module.PaperTraining, module.PaperModel))
        else:
            module.parse_args()
    finally:
        sys.argv = argv
        del sys.modules[spec.name]
