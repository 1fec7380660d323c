"""A recipe silences what other libraries say as they are imported, as the commands do."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest

import resofilter_trainer.cli.recipe as of_recipes

RECIPES = [path for path in (Path(__file__).parents[2] / "recipes").glob("*.py") if "recipe_parser" in path.read_text()]


def test_the_module_of_recipes_silences_libraries_as_it_is_imported():
    assert of_recipes.silence_libraries.__module__ == "resofilter_trainer.cli.quiet"
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
    assert logging.getLogger("bitsandbytes").isEnabledFor(logging.ERROR)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_imports_it_before_any_library(recipe):
    own = {"__future__", "collections", "dataclasses", "json", "pathlib", "typing", "warnings"}
    imports = [node for node in ast.parse(recipe.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert next(name for name in names if name.split(".")[0] not in own) == of_recipes.__name__
