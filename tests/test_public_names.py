"""The public names: the same for type checkers as at run time."""

from __future__ import annotations

import ast
from pathlib import Path

import resofilter_trainer


def test_type_checkers_are_told_of_every_name():
    module = ast.parse(Path(resofilter_trainer.__file__).read_text())
    block = next(node for node in module.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    told = {name.name: each.module for each in block.body for name in each.names}
    assert told == resofilter_trainer._MODULE_OF
    assert sorted(told) == resofilter_trainer.__all__


def test_dir_lists_every_name():
    assert set(resofilter_trainer.__all__) <= set(dir(resofilter_trainer))
