"""A type checker finds a mistyped keyword and a value of another type in a user's script."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import resofilter_trainer
from resofilter_trainer.config import ColumnMapping, ResonanceConfig
from resofilter_trainer.config.keywords import ColumnOptions, RowOptions, StepOptions, StreamOptions
from resofilter_trainer.data.arguments import ROW_OPTIONS

SCRIPT = """\
from resofilter_trainer import DataSelector, ResonanceCallback, ResonanceConfig, ScoreTable, Selection, score_dataset

ResonanceCallback(keep=0.5, eps=1e-4)
ResonanceCallback(keeep=0.5)  # wrong
ResonanceCallback(keep=0.5, n_layer=3)  # wrong
ResonanceCallback(n_layers="3")  # wrong
ResonanceConfig(update="adam")  # wrong
scores: ScoreTable = score_dataset("model", rows := object(), drop_duplicates=True, prompt_column=["a", "b"])
score_dataset("model", rows, drop_duplicate=True)  # wrong
score_dataset("model", rows, prompt_column=3)  # wrong
selection: Selection = DataSelector(keep=0.5).select(scores)
DataSelector(kep=0.5)  # wrong
selection.weights  # wrong
reveal_type(scores["score"])
"""


@pytest.mark.slow
def test_mypy_finds_mistyped_keywords_in_a_script(tmp_path):
    pytest.importorskip("mypy")
    script, root = tmp_path / "script.py", Path(resofilter_trainer.__file__).parents[1]
    script.write_text(SCRIPT)
    done = subprocess.run(  # with the settings and the cache of the project's own check
        [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), str(script)],
        capture_output=True, text=True, cwd=root, timeout=300,
    )  # fmt: skip
    found = sorted({int(line) for line in re.findall(r"script\.py:(\d+): error", done.stdout)})
    wrong = [number for number, line in enumerate(SCRIPT.splitlines(), start=1) if line.endswith("# wrong")]
    assert found == wrong, done.stdout + done.stderr


def names_of(kind: type) -> set[str]:
    return {each.name for each in dataclasses.fields(kind)}


def test_the_typed_keywords_are_those_that_are_taken():
    assert set(get_type_hints(RowOptions)) == set(ROW_OPTIONS)
    assert set(get_type_hints(ColumnOptions)) == names_of(ColumnMapping) | {"source"}
    assert set(get_type_hints(StepOptions)) == names_of(ResonanceConfig) - {"update"}
    own = inspect.signature(resofilter_trainer.score_dataset).parameters.keys()
    in_a_stream = {"precision", "tokens_per_batch", "sharded", "signals", "warmup", "warmup_dataset"}
    assert in_a_stream < own
    assert set(get_type_hints(StreamOptions)) == in_a_stream | set(ROW_OPTIONS) - {"source"}


@pytest.mark.parametrize("name", resofilter_trainer.__all__)
def test_the_help_names_the_parameters_that_there_are(name):
    made = getattr(resofilter_trainer, name)
    text = inspect.getdoc(made) or ""
    assert text, name
    described = re.search(r"^Args:\n((?:    .*\n|\n)*)", text + "\n", flags=re.MULTILINE)
    if described is None:
        return
    heads = re.findall(r"^    ((?:\*{0,2}\w+(?:, )?)+):", described[1], flags=re.MULTILINE)
    named = {each for head in heads for each in head.replace("*", "").split(", ")}
    taken = set(inspect.signature(made).parameters)
    assert named <= taken, f"{name} has no {named - taken}"
    assert taken - named <= {"self"}, f"{name} does not describe {taken - named}"
