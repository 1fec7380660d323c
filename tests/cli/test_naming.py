"""What the library says, in the words of a command; and that the library never says it in those words itself."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator

import pytest
from helpers.sources import modules

from resofilter_trainer.cli import clean, compare, report, score, select
from resofilter_trainer.cli.naming import in_shell, options_of
from resofilter_trainer.cli.parser import CommandParser
from resofilter_trainer.cli.recipe import recipe_parser


def options(command) -> dict[str, argparse.Action]:
    parser = CommandParser()
    command.add_arguments(parser)
    return options_of(parser)


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        (score, "Skip them with drop_empty=True.", "Skip them with --drop_empty."),
        (score, "Pass drop_empty=False.", "Pass no --drop_empty."),
        (score, "Pass completion_only_loss=True.", "Pass --completion_only_loss true."),
        (score, "Pass completion_only_loss=False.", "Pass --completion_only_loss false."),
        (score, "Pass text_column=None.", "Pass no --text_column."),
        (score, "Pass max_length=None, or less.", "Pass --max_length none, or less."),
        (score, "Pass max_length=2048.", "Pass --max_length 2048."),
        (score, "Pass args.max_length=2048.", "Pass --max_length 2048."),
        (score, "A larger eps=1e-08, or lr=1.5e-05.", "A larger --eps 1e-08, or --lr 1.5e-05."),
        (score, "Use precision=\"float32\" or update='sgd'.", "Use --precision float32 or --update sgd."),
        (score, "up_projection='mlp\\\\.(a|b)$' finds nothing", "--up_projection 'mlp\\.(a|b)$' finds nothing"),
        (score, 'prompt_column=["a b", "c"].', "--prompt_column 'a b' c."),
        (score, 'prompt_column="a", completion_column="b".', "--prompt_column a --completion_column b."),
        (score, 'text_column="a", or messages_column="b"', "--text_column a, or --messages_column b"),
        (score, "dataset_text_field='body'", "--text_column body"),
        (score, "too long for ddp_timeout=5", "too long for --timeout 5"),
        (score, "Leave out assistant_only_loss=.", "Leave out --assistant_only_loss."),
        (
            score,
            "prompt_column and completion_column go together",
            "--prompt_column and --completion_column go together",
        ),
        (score, "lr must be above 0.", "--lr must be above 0."),
        (score, "It has max_length 4 tokens.", "It has --max_length 4 tokens."),
        (
            score,
            "Set chat_template_path in SFTConfig, or bf16 of SFTConfig",
            "Set --chat_template_path, or --bf16",
        ),
        (score, "Split split in SFTConfig.", "Split --split."),
        (score, 'such as up_projection=r"mlp\\.up$"', "such as --up_projection 'mlp\\.up$'"),
        (score, 'with prompt_column=["a", ...].', "with --prompt_column a ...."),
        (select, "by=['score', '-num_tokens']", "--by score,-num_tokens"),
        (select, "keep is the share", "--keep is the share"),
        (clean, "keep is the share", "--keep_tokens is the share"),
        (clean, "keep=0.01 keeps none", "--keep_tokens 0.01 keeps none"),
        (clean, "mode='rho' ranks alone: leave ranking= out", "--mode rho ranks alone: leave --ranking out"),
        (report, "and this one as selection=.", "and this one as --selection."),
    ],
)
def test_arguments_become_the_commands_options(command, message, expected):
    assert in_shell(message, options(command)) == expected


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (compare, "drop_empty=True, max_length=3 and prompt_column"),  # options that only others have
        (score, "Measure when='before', or pass selector=DataSelector()."),
        (score, "There is no dataset at '/data/keep=0.5/lr=1e-5/drop_empty=True'."),
        (score, 'The dataset has no column "text_column".'),
        (score, "The dataset has no column 'x'. It has: prompt_column, max_length."),
        (score, "/data/lr=1/max_length=3/rows.jsonl cannot be read"),
        (score, "The model's layers and the rows' output: a model, its update and its norm."),
        (score, "Leave --max_length and --drop_empty out, or --max_length=3."),
        (score, "Use max_lengths=3, not_lr=4 or text_column(3)."),
        (select, "scores are positional: scores=3"),
    ],
)
def test_anything_else_stays(command, message):
    assert in_shell(message, options(command)) == message


def test_a_list_of_columns_ends_with_its_sentence():
    said = in_shell('It has: max_length, b. Pass text_column="b".', options(score))
    assert said == "It has: max_length, b. Pass --text_column b."


def test_a_recipe_has_options_of_trls_kinds_and_may_have_names_of_its_own():
    from dataclasses import dataclass, field

    @dataclass
    class Settings:
        bf16: bool = False
        packing: bool = field(default=True)
        score_lr: float = 1e-5
        lr: float = 0.1
        model_init_kwargs: dict | str | None = None
        columns: list[str] = field(default_factory=list)

    found = options_of(recipe_parser(Settings), {"lr": "score_lr"})
    said = in_shell("lr=0 and bf16=True, packing=False or columns=['a', 'b']; model_init_kwargs={'a': 1}", found)
    assert said == "--score_lr 0 and --bf16 --packing false or --columns a b; --model_init_kwargs '{\"a\": 1}'"


def literals(tree: ast.Module) -> Iterator[str]:
    """Every string of a module but its docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def test_literals_are_found():
    text = '"""doc --a"""\ndef f():\n    """doc --b"""\n    x = "--c"\n    return f"--d {x}"\n'
    assert [each for each in literals(ast.parse(text)) if "--" in each] == ["--c", "--d "]


MODULES = {name: path for name, path in modules().items() if name.split(".")[0] != "cli"}
del MODULES["report.theme"]  # has variables of CSS, which look like flags


@pytest.mark.parametrize("module", MODULES)
def test_the_library_names_pythons_arguments(module):
    """The command line translates `name=value`; a flag would mean nothing to a reader of Python."""
    found = [each for each in literals(ast.parse(MODULES[module].read_text())) if re.search(r"(?<![\w-])--[a-z]", each)]
    assert found == []
