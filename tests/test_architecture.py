"""The rules of the house, checked in the source and in a fresh Python: imports, sizes, public names, named paths."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.sources import HOME, modules

import resofilter_trainer

PACKAGE = "resofilter_trainer"
TESTS = Path(__file__).parent
ROOT = TESTS.parent
MOST_ENTRIES = 19  # of the package's folder
MOST_LINES, MOST_METHODS = 400, 25  # of a file, of a class
# Each package and the packages it may import. A package knows only packages listed before it.
MAY_KNOW = {
    "config": "",
    "io": "config",
    "scores": "config io",
    "selecting": "config io scores",
    "ledger": "config io scores selecting",
    "report": "config io scores selecting ledger",
    "model": "config",
    "data": "config io scores selecting report model",
    "criteria": "config selecting model data",
    "scoring": "config io scores model data criteria",
    "tokens": "config io scores selecting model data scoring",
    "training": "config io scores selecting ledger report model data scoring tokens",
    "integrations": "config training",
    "evaluation": "config model data",
    "demo": "config scores selecting report data scoring training evaluation",
    "probe": "config io scores selecting report model data scoring evaluation",
    "compare": "config io scores selecting ledger data criteria scoring tokens training evaluation demo probe",
    "cli": "config io scores selecting ledger report data scoring tokens training demo probe compare",
}
WITHOUT_TORCH = ["config", "io", "scores", "selecting", "ledger", "report", "cli"]  # packages, all modules of them
ALSO_WITHOUT_TORCH = [
    *("training.plan", "training.position", "training.plan_log", "training.measurements"),
    *("training.filtering", "compare.config", "compare.cells", "compare.report", "compare.published"),
]
HEAVY = {"torch", "transformers", "datasets", "trl", "accelerate", "peft", "evaluate"}


MODULES = modules()


def package_of(module: str) -> str:
    return module.split(".")[0]


def imports(node: ast.AST, path: Path, typing_too: bool) -> Iterator[str]:
    """Dotted names of everything that is imported, in functions too; relative ones made absolute."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not typing_too:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            above = [PACKAGE, *path.relative_to(HOME).parts[:-1]]
            stem = above[: len(above) - child.level + 1] if child.level else []
            stem = [*stem, *([child.module] if child.module else [])]
            yield from (".".join([*stem, alias.name]) for alias in child.names)
        else:
            yield from imports(child, path, typing_too)


def imports_of(module: str, typing_too: bool = True) -> set[str]:
    return set(imports(ast.parse(MODULES[module].read_text()), MODULES[module], typing_too))


def known_to(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    names = {name.removeprefix(f"{PACKAGE}.") for name in imports_of(module) if name.startswith(f"{PACKAGE}.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} - {""}


def test_imports_are_read_rightly():
    """The tests below pass on an empty set: here is one that is not."""
    assert {"config", "scoring.dataset", "scores.score_table", "data.files"} <= known_to("cli.score")
    assert known_to("demo.problems") == {"config"}
    assert "pandas" in imports_of("scores.score_table") - imports_of("scores.score_table", typing_too=False)


def test_the_order_has_no_way_back():
    order = list(MAY_KNOW)
    assert set(order) == {package_of(module) for module in MODULES}
    for place, package in enumerate(order):
        assert set(MAY_KNOW[package].split()) <= set(order[:place])


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    package = package_of(module)
    others = {package_of(each) for each in known_to(module)} - {package}
    assert others <= set(MAY_KNOW[package].split())


@pytest.mark.parametrize("package", MAY_KNOW)
def test_what_a_package_may_know_it_does_know(package):
    """A line of the table that nobody needs any longer is removed."""
    used = {package_of(each) for module in MODULES if package_of(module) == package for each in known_to(module)}
    assert used - {package} == set(MAY_KNOW[package].split())


@pytest.mark.parametrize("package", MAY_KNOW)
def test_within_a_package_too_imports_go_one_way(package):
    own = {module for module in MODULES if package_of(module) == package}
    graphlib.TopologicalSorter({module: (known_to(module) & own) - {module} for module in own}).prepare()


@pytest.mark.parametrize("package", MAY_KNOW)
def test_a_package_says_what_it_is_for(package):
    text = ast.get_docstring(ast.parse(MODULES[package].read_text()))
    assert "now" in (text or ""), "one sentence for what it is for, one for what it does not know"


def test_metrics_stand_alone():
    """`evaluate` reads them as copies of single files."""
    assert known_to("evaluation.metrics.final_answer") == set()


def test_the_folder_has_few_entries():
    entries = [path for path in HOME.iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= MOST_ENTRIES


@pytest.mark.parametrize("module", MODULES)
def test_no_file_and_no_class_is_too_long(module):
    text = MODULES[module].read_text()
    assert text.count("\n") <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            assert len(methods) <= MOST_METHODS, node.name


def test_no_test_imports_another():
    """What several tests share is in `tests/helpers`, imported as `helpers`: `tests` is no package."""
    names = {path.stem for path in TESTS.rglob("test_*.py")} | {"conftest", "tests"}
    assert {"test_architecture", "test_recorder"} <= names
    for path in TESTS.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        found = {alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
        found |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {part for name in found for part in name.split(".")} & names == set(), path


def section(title: str) -> str:
    """A section of CONTRIBUTING.md."""
    return (ROOT / "CONTRIBUTING.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_packages_are_documented_as_they_are():
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*?) ?\|$", section("Packages"), flags=re.MULTILINE)
    assert [(package, " ".join(known.split(", "))) for package, known in rows] == list(MAY_KNOW.items())
    assert "The first six packages import no torch, and neither does `cli`" in " ".join(section("Packages").split())
    assert [*list(MAY_KNOW)[:6], "cli"] == WITHOUT_TORCH


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "tests/conftest.py"])
def test_every_path_that_is_named_exists(name):
    """Relative to the root; in CONTRIBUTING.md also to the package and to the tests."""
    paths = set(re.findall(r"(?<![\w/.:-])[\w.-]+(?:/[\w.*-]+)+\.(?:py|yaml|md|png|html)\b", (ROOT / name).read_text()))
    assert len(paths) > 5
    places = (ROOT, HOME, TESTS) if name == "CONTRIBUTING.md" else (ROOT,)
    assert [path for path in sorted(paths) if not any(list(place.glob(path)) for place in places)] == []


def light() -> list[str]:
    """Modules that need no model; commands import what they need when they run."""
    return [module for module in MODULES if package_of(module) in WITHOUT_TORCH] + ALSO_WITHOUT_TORCH


@pytest.mark.parametrize("module", [module for module in light() if package_of(module) != "cli"])
def test_what_needs_no_model_names_no_model_library(module):
    assert {name.split(".")[0] for name in imports_of(module, typing_too=False)} & HEAVY == set()


def test_nothing_light_imports_torch():
    names = ", ".join(f"{PACKAGE}.{module}" for module in light() if not module.endswith("__main__"))
    in_fresh_python(f"import {PACKAGE}, {names}")


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


# As of version 0.1.0: what a user's script may import stays importable.
PUBLIC = [
    "CleanedDataset", "ColumnMapping", "Criterion", "DataSelector", "DiverseSelector", "InputError", "Provenance",
    "RandomSelector", "Recorder", "Report", "Resonance", "ResonanceCallback", "ResonanceConfig", "SampleWeights",
    "ScoreTable", "Selection", "SoftPruning", "TokenCleaning", "TokenScores", "TokenSelection", "TokenSelector",
    "Trust", "clean_dataset", "literal", "load_rows", "map_columns", "read_contents", "score_by", "score_dataset",
    "score_layers", "score_stream", "self_evolve", "unpack", "write_report",
]  # fmt: skip


@pytest.mark.parametrize("name", sorted({*PUBLIC, *resofilter_trainer.__all__}))
def test_every_public_name_is_there(name):
    assert getattr(resofilter_trainer, name).__name__ == name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = resofilter_trainer.Nothing
