"""Imports go one way, and the cheap half works without a model: read in the source, and tried in a fresh Python."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import resofilter_trainer

PACKAGE = "resofilter_trainer"
HOME = Path(resofilter_trainer.__file__).parent
# A room knows those before it, never those after it. A new room gets its place here.
ORDER = [
    "config",
    "arguments",
    "launching",
    "files",
    "scores",
    "store",
    "distribution",
    "comparison",
    "comparison_config",
    "published",
    "thresholds",
    "combining",
    "dataset_card",
    "selection",
    "kept_dataset",
    "policies",
    "token_scores",
    "token_selection",
    "drift",
    "plan",
    "measurements",
    "filtering",
    "results",
    "report",
    "quantised",
    "modes",
    "up_projection",
    "sharding",
    "updates",
    "gradients",
    "losses",
    "head",
    "narrowing",
    "prefixes",
    "lean_forward",
    "resonance",
    "recorder",
    "training_recorder",
    "shrinking",
    "rows",
    "preparation",
    "row_texts",
    "provenance",
    "loading",
    "batches",
    "team",
    "passes",
    "pass_output",
    "loss_pass",
    "reference_model",
    "cleaned_dataset",
    "token_cleaning",
    "scoring",
    "streaming",
    "text_criteria",
    "criteria",
    "prompted_criteria",
    "criterion_scoring",
    "layer_pass",
    "less",
    "evaluation",
    "cleaning_run",
    "trainer_access",
    "weighting",
    "reporting",
    "stages",
    "self_evolving",
    "training_run",
    "run_report",
    "callback",
    "selector_scores",
    "selectors",
    "demo",
    "comparison_data",
    "task_evaluation",
    "comparison_cost",
    "comparison_round",
    "comparison_run",
    "comparison_report",
    "commands",
    "cli",
]
CHEAP = ORDER[: ORDER.index("quantised")]
HEAVY = {"torch", "transformers", "datasets", "trl", "accelerate", "peft", "evaluate"}


def sources() -> dict[str, Path]:
    """Every file of every room; `metrics` are read by `evaluate` as copies, and are no room."""
    files = [path for path in HOME.rglob("*.py") if path != HOME / "__init__.py"]
    return {path.relative_to(HOME).as_posix(): path for path in sorted(files)}


def room(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def imports(node: ast.AST, file: str, typing_too: bool) -> Iterator[str]:
    """Dotted names of all that is imported, in functions too; relative ones made absolute."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not typing_too:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            above = [PACKAGE, *file.split("/")[:-1]][: len(file.split("/")) - child.level + 1] if child.level else []
            stem = ".".join([*above, *([child.module] if child.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child, file, typing_too)


def imports_of(file: str, typing_too: bool) -> set[str]:
    return set(imports(ast.parse(sources()[file].read_text()), file, typing_too))


def rooms_known_to(file: str) -> set[str]:
    ours = {name.split(".")[1] for name in imports_of(file, typing_too=True) if name.startswith(f"{PACKAGE}.")}
    return ours - {"__version__"}


def test_imports_are_read_rightly():
    """The tests below pass on an empty set: here is one that is not."""
    assert {"config", "scoring", "scores", "selection", "rows"} <= rooms_known_to("commands.py")
    assert rooms_known_to("demo/problems.py") == {"config"}
    assert "pandas" in imports_of("scores.py", typing_too=True) - imports_of("scores.py", typing_too=False)


@pytest.mark.parametrize("file", [file for file in sources() if room(file) != "metrics"])
def test_imports_go_one_way(file):
    assert room(file) in ORDER, f"Give {room(file)} its place in ORDER."
    allowed = {"metrics", *ORDER[: ORDER.index(room(file))], *([room(file)] if "/" in file else [])}
    assert rooms_known_to(file) <= allowed


@pytest.mark.parametrize("file", [file for file in sources() if room(file) == "metrics"])
def test_metrics_stand_alone(file):
    assert rooms_known_to(file) == set()


@pytest.mark.parametrize("file", [file for file in sources() if room(file) in CHEAP])
def test_the_cheap_half_names_no_model_library(file):
    roots = {each.split(".")[0] for each in imports_of(file, typing_too=False)}
    assert roots & HEAVY == set()


@pytest.mark.parametrize("name", ["", *(f".{name}" for name in [*CHEAP, "cli"])])
def test_imported_without_torch(name):
    in_fresh_python(f"import {PACKAGE}{name}")


def test_policies_are_reached_by_their_public_names_without_torch():
    in_fresh_python(
        f"from {PACKAGE} import ColumnMapping, DataSelector, Provenance, ResonanceConfig, ScoreTable, Trust"
    )


def test_env_runs_without_torch():
    in_fresh_python(f"from {PACKAGE}.cli import main; main(['env'])")


def in_fresh_python(code: str) -> None:
    check = f"import sys; {code}; sys.exit(', '.join({{'torch', 'transformers', 'trl'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", resofilter_trainer.__all__)
def test_every_public_name_is_there(name):
    assert getattr(resofilter_trainer, name).__name__ == name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = resofilter_trainer.Nothing
